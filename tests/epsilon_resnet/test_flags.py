"""The original's flags keep their spelling, type, default and choices; its commands parse; counts are printed."""

import csv
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from epsilon_resnet import (
    cifarCompressedResnet,
    cifarEpsilonResnet,
    compressModel,
    count,
    flags,
    imagenetCompressedResnet,
    imagenetEpsilonResnet,
    plot,
    svhnCompressedResnet,
    svhnEpsilonResnet,
    training,
)
from epsilon_resnet.schedules import scaled

PAPER = Path(count.__file__).parent
SCRIPTS = {
    Path(script.__file__).name: script
    for script in (cifarEpsilonResnet, svhnEpsilonResnet, imagenetEpsilonResnet, compressModel, cifarCompressedResnet,
                   svhnCompressedResnet, imagenetCompressedResnet, count, plot)
}  # fmt: skip
GPU_OPTIONAL, GPU_REQUIRED = {"--gpu": (None, None, False)}, {"--gpu": (None, None, True)}
UNITS = {"-n": (int, 18, False), "--num_units": (int, 18, False)}
OUTPUT = {"-o": (None, None, False), "--output": (None, None, False)}
DEPTHS = (18, 34, 50, 101, 152)
IMAGENET = {"--data": (None, None, False), "--load": (None, None, False), "--fake": (None, False, False),
            "--data_format": (None, "NCHW", False), "-d": (int, 18, False), "--depth": (int, 18, False),
            "--eval": (None, False, False), "--cfg": (None, None, False)}  # fmt: skip


def epsilon(default):
    return {"-e": (flags.number, default, False), "--epsilon": (flags.number, default, False)}


ORIGINAL = {
    cifarEpsilonResnet: {**GPU_OPTIONAL, **UNITS, **OUTPUT, **epsilon(2.5), "--load": (None, None, False)},
    svhnEpsilonResnet: {**GPU_OPTIONAL, **UNITS, **OUTPUT, **epsilon(1.5), "--load": (None, None, False)},
    imagenetEpsilonResnet: {**GPU_REQUIRED, **IMAGENET, **epsilon(2.0)},
    compressModel: {"--dir": (None, None, True), "--step": (int, None, True)},
    cifarCompressedResnet: {**GPU_REQUIRED, **UNITS, **OUTPUT, "--cfg": (None, None, True)},
    svhnCompressedResnet: {**GPU_REQUIRED, **UNITS, **OUTPUT, "--cfg": (None, None, True)},
    imagenetCompressedResnet: {**GPU_REQUIRED, **IMAGENET},
}


@pytest.mark.parametrize("script", ORIGINAL, ids=lambda script: script.__name__)
def test_original_flags(script):
    actions = script.build_parser()._option_string_actions
    for flag, expected in ORIGINAL[script].items():
        action = actions[flag]
        assert (action.type, action.default, action.required) == expected, flag
        assert not flag.endswith("depth") or action.choices == DEPTHS


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_complete_and_fits_a_terminal(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = SCRIPTS[name].build_parser()
    assert max(map(len, parser.format_help().splitlines())) <= 100
    for action in parser._actions:
        assert action.help, action.option_strings


def parse(command):
    words = shlex.split(command)
    script = SCRIPTS[Path(words[1]).name]
    return script, script.build_parser().parse_args(words[2:])


def published_commands():
    with open(PAPER / "published.csv", newline="") as file:
        return sorted({row["command"] for row in csv.DictReader(file) if row["command"]})


@pytest.mark.parametrize("command", published_commands())
def test_published_commands_parse_and_are_recognised(command):
    parts = command.split(" && ")
    for part in parts:
        script, args = parse(part)
        if len(parts) > 1 or script not in (cifarEpsilonResnet, imagenetEpsilonResnet):
            continue
        names = ("depth", "epsilon") if script is imagenetEpsilonResnet else cifarEpsilonResnet.REPRODUCES_FLAGS
        name = Path(script.__file__).name
        assert flags.published_command(name, script.build_parser(), args, names) == part.removeprefix("python ")
        args.embedded_data = True
        assert flags.published_command(name, script.build_parser(), args, names) is None


@pytest.mark.parametrize(
    ("name", "count"), [("cifar10", 6), ("cifar100", 6), ("svhn", 5), ("svnh", 5), ("imagenet", 5)]
)
def test_run_scripts_have_the_originals_experiments(name, count):
    environment = {**os.environ, "DRY_RUN": "1", "PYTHON": "python", "DATA": "/data"}
    command = ["bash", PAPER / f"run_{name}.sh", "--epochs", "2"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    lines = [line.removeprefix("+ ") for line in output.splitlines()]
    assert len(lines) == count
    assert sum(" --auto-resume" in line for line in lines) == {"imagenet": 3, "svhn": 3, "svnh": 3}.get(name, 4)
    for line in lines:
        script, args = parse(line)
        if hasattr(script, "parse_args"):
            assert "--auto-resume" not in line or args.epochs == 2
        if script is compressModel:
            step = {"cifar10": 303420, "cifar100": 303420, "imagenet": 550000}.get(name, 200 * 4721)
            assert args.step == step
    assert not any("cifar10-" in line for line in lines) or name == "cifar10"


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (cifarEpsilonResnet, ["-n", "18"], "one of the arguments --cifar10 --cifar100 is required"),
        (cifarEpsilonResnet, ["--cifar10", "-e", "-1"], "epsilon must be 0 or more, not -1"),
        (cifarEpsilonResnet, ["--cifar10", "-e", "nan"], "epsilon must be 0 or more, not nan"),
        (cifarEpsilonResnet, ["--cifar10", "-e", "x"], "invalid epsilon value: 'x'"),
        (cifarEpsilonResnet, ["--cifar10", "-n", "1"], "--num_units must be at least 2, not 1"),
        (cifarEpsilonResnet, ["--cifar10", "--epochs=0"], "--epochs must be at least 1"),
        (cifarEpsilonResnet, ["--cifar10", "--lr_schedule=5"], "'5' is not a schedule; write EPOCH:RATE"),
        (cifarEpsilonResnet, ["--cifar10", "--lr_schedule=5:1,5:2"], "epochs must increase"),
        (cifarEpsilonResnet, ["--cifar10", "--amp=fp16", "--device=cpu"], "--amp fp16 needs a GPU"),
        (imagenetEpsilonResnet, ["--data=x"], "the following arguments are required: --gpu"),
        (imagenetEpsilonResnet, ["--gpu=0", "-d", "20"], "invalid choice: 20"),
        (imagenetEpsilonResnet, ["--gpu=0", "--eval"], "--eval needs --load FILE"),
        (compressModel, ["--dir=x", "--step=1", "--tol=2"], "--tol must be in [0, 1)"),
        (count, [], "one of the arguments -n/--num_units -d/--depth --cfg is required"),
        (count, ["-n", "1"], "the side branch needs at least 2"),
    ],
)
def test_bad_flags_end_with_one_line_and_status_2(script, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words", (["--gpu=0,a"], ["--gpu=0,0"], ["--gpu=-1"]))
def test_gpu_lists(words):
    from epsilon_resnet.engine import gpu_ids
    from epsilon_resnet.runs import RunError

    assert gpu_ids("0,2") == [0, 2] and gpu_ids(None) == gpu_ids("") == []
    with pytest.raises(RunError, match="write device numbers"):
        gpu_ids(words[0].removeprefix("--gpu="))


def test_schedules_scale_with_the_epochs_and_keep_their_order():
    args = cifarEpsilonResnet.parse_args(["--cifar10", "--epochs=100"])
    rule = training.learning_rate_of(args)
    assert rule.schedule == ((0, 0.1), (8, 0.01), (12, 0.001), (30, 0.0002))
    assert rule.after_loss == ((0, 0.1), (4, 0.01), (6, 0.001), (15, 0.0002))
    assert scaled(((0, 0.1), (82, 0.01), (123, 0.001)), 0.001) == ((0, 0.1), (1, 0.01), (2, 0.001))


@pytest.mark.parametrize(
    ("words", "parameters", "without", "macs"),
    [
        (["-n", "18"], 1_728_356, 1_727_962, 252_887_680),
        (["-n", "3", "--cifar100"], 278_936, 275_572, 40_551_040 + 5_760),
        (["-n", "50", "--cifar100"], 4_848_088, 4_844_724, 705_872_512 + 5_760),
        (["-d", "34"], 22_053_392, 21_795_880, 3_663_761_408),
        (["-d", "152"], 61_212_176, 60_185_128, 11_513_626_624),
    ],
)
def test_counts(words, parameters, without, macs, capsys):
    count.main(words)
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert lines["parameters"] == str(parameters) and lines["multiply-adds"] == str(macs)
    assert lines["parameters without side branch"] == str(without)


def test_no_module_hides_one_of_python():
    """A script's own folder comes first on the path: statistics.py here would break torch.compile."""
    later = {"compression", "annotationlib"}  # new in Python 3.14
    ours = {path.stem for path in PAPER.glob("*.py")} - {"__init__"}
    assert not ours & (set(sys.stdlib_module_names) | later)
