"""Every command of every README and of CONTRIBUTING.md is taken by its script, and runs.

By default every command goes through its script's argument parser, and every sweep through its dry run. With
README_COMMANDS=run (see CONTRIBUTING.md) they are executed, in the order of each README and in a scratch directory for
each, with the flags of BUDGETS appended. A command that no table below knows makes a test fail.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import gpu_stages
from tests.readme_commands import (
    FENCE,
    READMES,
    ROOT,
    Command,
    check_arguments,
    commands_of,
    module_of,
    parse,
    started_by,
    texts_of,
)

DIGITS = "--embedded-data --device=cpu --train-size=32 --epochs=1 "
TEST_ONLY = "--embedded-data --device=cpu"
FOLDER = "--device=cpu --epochs=1 --image-size=32 "

# Flags that make a script's command small, appended to it; ... of scripts that are quick as they are.
BUDGETS = {
    "shiftresnet/main.py": DIGITS + "--batch_size=16",
    "shiftresnet/eval.py": TEST_ONLY,
    "shiftresnet/count.py": "",
    "shiftresnet/convert.py": "",
    "deepshift/mnist.py": DIGITS + "--batch-size=16 --print-weights=False",
    "deepshift/cifar10.py": DIGITS + "--batch-size=16 --print-weights=False",
    "deepshift/imagenet.py": FOLDER + "--batch-size=8 --workers=0 --pretrained=False --print-weights=False",
    "deepshift/count.py": "",
    "s3/main.py": FOLDER + "--batch-size=16 --workers=0",
    "s3/main_eval.py": FOLDER + "--batch-size=16 --workers=0",
    "s3/convert.py": "",
    "s3/count.py": "",
    "s3/plot.py": "",
    "shared_bases/train_cifar10.py": DIGITS + "--batch_size=16",
    "shared_bases/train_cifar100.py": DIGITS + "--batch_size=16 --train-size=16",
    "shared_bases/train_ilsvrc.py": FOLDER + "--batch_size=8 --workers=0",
    "shared_bases/eval_cifar10.py": TEST_ONLY,
    "shared_bases/count.py": "",
    "shared_bases/modelsize.py": "--repeats=1",
    "shared_bases/similarity.py": "",
    "shared_bases/plot_tradeoff.py": "",
    "shared_bases/plot_orthogonality.py": "",
    "epsilon_resnet/cifarEpsilonResnet.py": DIGITS + "--batch_size=16 -n=2",
    "epsilon_resnet/svhnEpsilonResnet.py": DIGITS + "--batch_size=16 -n=2",
    "epsilon_resnet/imagenetEpsilonResnet.py": FOLDER + "--gpu=0 -d=18 --batch_size=8 --workers=0",
    "epsilon_resnet/imagenetCompressedResnet.py": FOLDER + "--gpu=0 -d=18 --batch_size=8 --workers=0",
    "epsilon_resnet/cifarCompressedResnet.py": DIGITS + "--batch_size=16",
    "epsilon_resnet/compressModel.py": TEST_ONLY + " --criterion=gate",
    "epsilon_resnet/plot.py": "",
    "epsilon_resnet/count.py": "",
    "examples/convert_and_pack.py": "--arch=squeezenet1_1 --images=1 --image-size=48",
    "examples/shift_instead_of_3x3.py": "--arch=squeezenet1_1 --steps=1",
    "benchmarks/bench_shift.py": "--no-csv --repeats=1 --max-seconds=1 --shape 1 9 8 8",
    "benchmarks/bench_shift_conv1x1.py": "--no-csv --repeats=1 --max-seconds=1 --batch=1 --expansions=1 --no-networks",
    "benchmarks/bench_bitshift.py": "--no-csv --repeats=1 --max-seconds=1 --layers square --bits 4 --batches 1",
    "benchmarks/bench_deepshift_training.py": "--arch=lenet --batch-size=2 --repeats=1",
    "benchmarks/bench_loader.py": "--rounds=1 --output=loader.csv",
    "benchmarks/bench_shared_bases.py": "--batch-size=2 --repeats=1",
    "benchmarks/bench_epsilon_resnet.py": "--no-csv -n=2 --batch-size=2 --repeats=1",
    "common/checkpoints/__main__.py": "",
    "tests/mutants.py": "--list",
    "tests/run.sh": "--collect-only -q -n 0 tests/test_run_all.py",
}
SMALLER = {
    "shiftresnet/main.py": "--arch=shiftresnet20"
}  # under torchrun: all the digits' test images are tested there
# Not executed here, with the reason; their arguments are checked all the same.
NOT_RUN = {
    "report.py": "writes into the repository's records and READMEs; tests/test_report.py runs it on copies",
    "run_all.sh": "its dry run is checked here; .ci/run executes it, in minutes",
    "benchmarks/run.py": "writes into benchmarks/results, in minutes; the benchmarks are run one by one",
    ".ci/run": "runs these tests",
    "tests/gpu.sh": "needs a GPU",
    "benchmarks/bench_peers.py": "compares with libraries that are not in the requirements",
}
SWEEPS = re.compile(r"\w+/(sweep|run)_\w+\.sh")  # days on a GPU: the commands of their dry run are checked
# What stands for something else, and what commands within a line leave out.
WORDS = {
    "N": "2",
    "MODE": "block",
    "--reduction-mode=MODE": "--reduction-mode=block",
    "/path/to/python": sys.executable,
}
LEFT_OUT = {
    "epsilon_resnet/cifarEpsilonResnet.py": ("-o", "X"),
    "epsilon_resnet/imagenetEpsilonResnet.py": ("--gpu", "0", "--data", "DIR"),
    "epsilon_resnet/imagenetCompressedResnet.py": ("--gpu", "0", "--data", "DIR"),
}
# Files that a command before has left in the scratch directory.
FILES = {
    "README.md": {"FILE": "checkpoint/*.t7"},
    "shared_bases/README.md": {"FILE.pth": "checkpoint/*SingleShared*.pth"},
    "epsilon_resnet/README.md": {
        "FILE": "train_log/imagenetEpsilonResnet/model-*.pth",
        "FILE.cfg": "train_log.cifar10-e_2.5-n_18/*.cfg",
    },
}
# Commands that test a saved file, and what they print of its top-1 accuracy: that of its run, as the READMEs say.
PERCENT = r"([\d.]+)%?"
TESTED = {
    "shiftresnet/eval.py": ("--model", rf"Acc: {PERCENT} \("),
    "deepshift/mnist.py": ("--resume", r"Accuracy: (\d+/\d+) "),
    "deepshift/cifar10.py": ("--resume", rf" \* Acc@1 {PERCENT}"),
    "s3/main.py": ("--resume", rf" \* Acc@1 {PERCENT} Acc@5"),
    "shared_bases/eval_cifar10.py": ("--pretrained", rf"Eval_Acc_top1 = {PERCENT}"),
}
COMMANDS = {str(readme): commands_of(readme) for readme in READMES}
run_them = pytest.mark.skipif(
    os.environ.get("README_COMMANDS") != "run", reason="minutes: README_COMMANDS=run runs them"
)


def arguments_of(command: Command, folder) -> list[str]:
    """The command's arguments with words for DIR and the like."""
    arguments = [*command.arguments]
    if not command.is_block:
        arguments += LEFT_OUT.get(command.script, ())
    words = (re.sub(r"^(--\w+=)?(DIR|/path/to/imagenet)$", rf"\g<1>{folder}", word) for word in arguments)
    return [WORDS.get(word, word) for word in words]


@pytest.mark.parametrize("readme", COMMANDS)
def test_every_command_is_known_and_parses(readme, tmp_path):
    for command in COMMANDS[readme]:
        arguments = arguments_of(command, tmp_path)
        known = command.script in BUDGETS or command.script in NOT_RUN or SWEEPS.fullmatch(command.script)
        assert known, f"{command}: {command.script} is in no table of {Path(__file__).name}; add it to BUDGETS"
        if command.script.endswith(".py"):
            check_arguments(command.script, arguments)
        elif command.script == "tests/gpu.sh":
            gpu_stages.build_parser().parse_args(arguments)
        elif command.script in (".ci/run", "tests/run.sh"):
            subprocess.run(["bash", "-n", ROOT / command.script], check=True)
            tests = [word for word in arguments if not word.startswith("-")]
            assert all((ROOT / word).exists() for word in tests), f"{command}: no such test"
        else:
            environment = {name: WORDS.get(value, value) for name, value in command.environment.items()}
            started = started_by(command, arguments, {"DATA": str(tmp_path), **environment})
            assert started or "--list" in arguments, f"{command} starts nothing"
            for script, words in started:
                check_arguments(script, words)


SAMPLE = """\
See `count.py` and `python count.py -n 18`.

```bash
# a comment
$ A=1 python main.py \\
  --x # why
./a.sh
```

```
python not_a_command.py
```
<!-- results -->
`python recorded.py 1`
<!-- /results -->
"""


def test_what_is_found_in_a_readme(tmp_path):
    (tmp_path / "README.md").write_text(SAMPLE)
    expected = [(1, "python count.py -n 18", False), (5, "A=1 python main.py --x", True)]
    assert texts_of(tmp_path / "README.md") == [*expected, (7, "./a.sh", True)]


def test_commands_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="shiftresnet/README.md:3: there is no train.py"):
        parse(Path("shiftresnet/README.md"), 3, "python train.py", True)
    with pytest.raises(AssertionError, match="unrecognized arguments: --no-such-flag"):
        check_arguments("shiftresnet/count.py", ["--no-such-flag"])
    with pytest.raises(AssertionError, match="invalid choice: 'nothing'"):
        check_arguments("deepshift/cifar10.py", ["--arch", "nothing"])


def test_tables_name_scripts_that_exist_and_are_in_a_readme():
    scripts = {command.script for commands in COMMANDS.values() for command in commands}
    assert set(BUDGETS) <= scripts, "no README has a command of these any more"
    assert set(NOT_RUN) <= scripts


def printed_blocks():
    """(README, command, text) of every "`command` prints" with a block of output after it."""
    for readme, commands in COMMANDS.items():
        content = (ROOT / readme).read_text()
        for command in commands:
            for block in re.finditer(rf"`{re.escape(command.text)}` prints\n\n```\n(.*?)```", content, re.DOTALL):
                yield pytest.param(command, block[1], id=f"{readme}-{command.line}")


@pytest.mark.parametrize("command, expected", list(printed_blocks()))
def test_output_is_what_the_readme_says(command, expected, tmp_path, monkeypatch):
    assert run(command.script, command.arguments, tmp_path, monkeypatch).strip() == expected.strip()


PYTHON_BLOCKS = [
    pytest.param(block[2], id=f"{readme}-{number}")
    for readme in COMMANDS
    for number, block in enumerate(FENCE.finditer((ROOT / readme).read_text()))
    if block[1] == "python"
]


@pytest.mark.parametrize("code", PYTHON_BLOCKS)
def test_python_blocks_run(code, tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.chdir(tmp_path)
    weight = torch.tensor([-4.0, -2, -1, -0.0, 1, 2, 4])
    torch.save({"net": torch.nn.Linear(2, 2)}, "old.t7")
    torch.save({"state_dict": {"module.layer1.0.conv1.weight": weight}}, "s3-3bit-resnet18-pytorch-imagenet.pth.tar")
    names = {"torch": torch}
    exec(code, names)
    printed = capsys.readouterr().out
    if "bitshift_conv2d" in code:
        assert printed.startswith("2880 instead of 18432 bytes; tensor(") and len(code.splitlines()) <= 11
        assert torch.allclose(names["z"], torch.conv2d(names["y"], names["weight"], padding=1), atol=1e-4)
    elif "bitshift_linear" in code:
        assert printed == "2097152 instead of 16384000 bytes\n" and names["y"].shape == (1, 1000)
    elif "read_foreign" in code:
        assert set(names["state"]) == {"weight", "bias"}
    else:
        assert printed.strip() == code.rpartition("# ")[2].strip(), "what the comment says it prints"


def run(script: str, arguments, folder: Path, monkeypatch) -> str:
    """Output of a script that ended well; run in this process: importing PyTorch takes longer than most of them."""
    import torch

    module_of(script)  # so that the script finds its modules loaded
    said, threads = io.StringIO(), torch.get_num_threads()
    with monkeypatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(ROOT / script), *arguments])
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr("common.data.digits._read_digits", few_digits)
        status = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as error:
            status = error.code
        torch.set_num_threads(threads)
    assert status in (0, None), f"exit status {status} of {script} {arguments}:\n{said.getvalue()[-3000:]}"
    return said.getvalue()


def few_digits():
    """The first 200: 160 for training, 40 for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images[:200].astype("int64"), digits.target[:200].astype("int64")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """train/ and val/ of ten classes with two images each, 64x64."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    images, targets = few_digits()
    for split, start in (("train", 0), ("val", 2)):
        for digit in range(10):
            (root / split / str(digit)).mkdir(parents=True)
            for number, image in enumerate(images[targets == digit][start : start + 2]):
                pixels = Image.fromarray((image * 15).astype("uint8")).resize((64, 64))
                pixels.save(root / split / str(digit) / f"{number}.png")
    return root


def prepare(command: Command, folder: Path, monkeypatch):
    """What a reader who comes to this command has: a pre-trained network, a file of the original, an earlier run."""
    if networks := [word for word in command.arguments if word.startswith("resnet20") and word.endswith(".th")]:
        import torch

        from deepshift.zoo import build_model

        torch.save(build_model("cifar10", "resnet20").state_dict(), folder / networks[0])
    elif "model_best.pth.tar" in command.arguments:
        if not (folder / "model_best.pth.tar").exists():  # no accuracy of a run is better than 0%
            shutil.copy(folder / "checkpoint.pth.tar", folder / "model_best.pth.tar")
    elif command.script == "shiftresnet/convert.py":
        source, target = (folder / name for name in command.arguments)
        source.parent.mkdir()
        shutil.move(target, source)
    elif command.script == "shared_bases/train_cifar10.py" and "--resume" in command.arguments:
        first = [word for word in command.arguments if word != "--resume"]
        run(command.script, [*first, *BUDGETS[command.script].split()], folder, monkeypatch)


def present_file(command: Command, word: str, folder: Path) -> str:
    """The word, or the file in the scratch directory that it stands for: FILE, or a step that a short run has not."""
    flag, equals, name = word.rpartition("=") if word.startswith("--") else ("", "", word)
    pattern = FILES.get(str(command.readme), {}).get(name)
    if found := re.fullmatch(r"(.*/compressed_model_)\d+(\.cfg)", name):
        pattern = f"{found[1]}*{found[2]}"
    if pattern is None:
        return word
    found = sorted(folder.glob(pattern))
    assert found, f"{command}: no command before it has left a {pattern}"
    return f"{flag}{equals}{found[0].relative_to(folder)}"


def last_step(arguments, folder: Path) -> list[str]:
    """--step of the newest checkpoint of a run, whose step in the README is that of a long run."""
    run_folder = folder / arguments[arguments.index("--dir") + 1]
    return [f"--step={max(int(path.stem.split('-')[1]) for path in run_folder.glob('model-*.pth'))}"]


def execute(command: Command, image_folder: Path, folder: Path, monkeypatch):
    prepare(command, folder, monkeypatch)
    arguments = [present_file(command, word, folder) for word in arguments_of(command, image_folder)]
    arguments += BUDGETS[command.script].split()
    if command.script == "epsilon_resnet/compressModel.py":
        arguments += last_step(arguments, folder)
    if command.script in ("s3/main.py", "s3/main_eval.py") and "--dataset" in arguments:
        arguments += ["--embedded-data", "--train-size=32"]
    if command.launcher[:1] == ("torchrun",) or command.script.endswith(".sh"):
        launcher = ["bash"]
        if command.launcher[:1] == ("torchrun",):
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            arguments += SMALLER.get(command.script, "").split()
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launcher, str(ROOT / command.script), *arguments], cwd=folder, env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
        assert done.returncode == 0, f"exit status {done.returncode}:\n{done.stdout[-3000:]}"
    else:
        check_accuracy(command, arguments, run(command.script, arguments, folder, monkeypatch), folder)


def check_accuracy(command: Command, arguments, printed: str, folder: Path):
    """A file that was tested has the accuracy that its training told: of the best epoch, or for MNIST of the last."""
    flag, pattern = TESTED.get(command.script, ("", ""))
    is_test = {"-e", "--evaluate"} & set(arguments) or "eval" in command.script
    words = [word for argument in arguments for word in argument.split("=")]
    if not is_test or flag not in words:
        return
    path = folder / words[words.index(flag) + 1]
    results = [line for name in (path.parent, path.with_suffix("")) if (name / "metrics.jsonl").exists()
               for line in map(json.loads, (name / "metrics.jsonl").open()) if line["type"] == "result"]  # fmt: skip
    if not results:  # a file of the original, or one that stands for a longer run's
        assert "*" in path.name or not path.exists() or path.name == "model_best.pth.tar", f"{command}: whose {path}?"
        return
    expected = results[-1]["top1" if command.script == "deepshift/mnist.py" else "best_top1"]
    assert re.search(pattern, printed), f"{command} prints no accuracy:\n{printed[-1000:]}"
    found = re.search(pattern, printed)[1]
    value = 100 * int(found.split("/")[0]) / int(found.split("/")[1]) if "/" in found else float(found)
    assert value == pytest.approx(expected, abs=6e-4), f"{command} prints {value}%, training told {expected}%"


def test_accuracies_that_differ_are_told(tmp_path):
    command = parse(Path("deepshift/README.md"), 1, "python mnist.py -e --resume run/weights.pth", True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"type": "result", "top1": 75.0, "best_top1": 80.0}\n')
    check_accuracy(command, command.arguments, "Accuracy: 30/40 (75%)", tmp_path)
    with pytest.raises(AssertionError, match="prints 77.5%, training told 75.0%"):
        check_accuracy(command, command.arguments, "Accuracy: 31/40 (78%)", tmp_path)
    with pytest.raises(AssertionError, match="prints no accuracy"):
        check_accuracy(command, command.arguments, "", tmp_path)


@run_them
@pytest.mark.slow
@pytest.mark.parametrize("readme", COMMANDS)
def test_commands_run(readme, image_folder, tmp_path, monkeypatch):
    """One test per README: its commands go on from what those before them left."""
    if (logs := ROOT / Path(readme).parent / "logs").is_dir():
        (tmp_path / "logs").symlink_to(logs)
    wrong = []
    for command in COMMANDS[readme]:
        if command.script not in BUDGETS:
            continue
        start = time.monotonic()
        try:
            execute(command, image_folder, tmp_path, monkeypatch)
        except Exception as error:  # so that one run names all the wrong commands
            wrong.append(f"{command}\n{type(error).__name__}: {error}")
        print(f"{time.monotonic() - start:6.1f} s  {command}")
    assert not wrong, "\n\n".join(wrong)
