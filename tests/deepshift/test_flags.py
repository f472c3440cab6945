"""Flags keep the original's spelling, aliases, types and defaults; its commands parse; mistakes are one line."""

import csv
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from deepshift import cifar10, count, flags, imagenet, mnist
from deepshift.runs import label

PAPER = Path(mnist.__file__).parent
BOOL = flags.str_to_bool
SCRIPTS = {"mnist": mnist, "cifar10": cifar10, "imagenet": imagenet}
TASKS = {
    "mnist": mnist.Mnist(mnist.parse_args),
    "cifar10": cifar10.Cifar10(cifar10.parse_args),
    "imagenet": imagenet.ImageNet(imagenet.parse_args),
}
COMMON = {
    "--model": (None, ""), "--weights": (None, ""), "--shift-depth": (int, 0), "-st": (None, "PS"),
    "--shift-type": (None, "PS"), "-r": (None, "deterministic"), "--rounding": (None, "deterministic"),
    "-wb": (int, 5), "--weight-bits": (int, 5), "-ab": (None, ["16", "16"]), "--activation-bits": (None, ["16", "16"]),
    "-opt": (None, "SGD"), "--optimizer": (None, "SGD"), "--opt": (None, "SGD"), "--resume": (None, ""),
    "-e": (None, False), "--evaluate": (None, False), "--pretrained": (BOOL, False), "--save-model": (BOOL, True),
    "--print-weights": (BOOL, True), "--desc": (None, None), "--use-kernel": (BOOL, False),
}  # fmt: skip
LARGE = {
    "-j": (int, 4), "--workers": (int, 4), "--start-epoch": (int, 0), "--lr": (float, 0.1),
    "--learning-rate": (float, 0.1), "--lr-schedule": (BOOL, True), "--lr-sign": (float, None),
    "--momentum": (float, 0.9), "--wd": (float, 1e-4), "--weight-decay": (float, 1e-4), "-s": (int, 0),
    "--world-size": (int, -1), "--rank": (int, -1), "--dist-url": (None, "tcp://224.66.41.62:23456"),
    "--dist-backend": (None, "nccl"), "--gpu": (int, None), "--multiprocessing-distributed": (None, False),
    "--seed": (int, None), "-a": (None, "resnet18"), "--arch": (None, "resnet18"),
}  # fmt: skip
ORIGINAL = {
    "mnist": {
        **COMMON, "--type": (None, "linear"), "-j": (int, 1), "--workers": (int, 1), "--epochs": (int, 10),
        "--batch-size": (int, 64), "--test-batch-size": (int, 1000), "--lr": (float, 0.01), "--momentum": (float, 0.0),
        "--log-interval": (int, 10), "--seed": (int, 1), "--no-cuda": (None, False),
    },
    "cifar10": {
        **COMMON, **LARGE, "--epochs": (int, 200), "-b": (int, 128), "--batch-size": (int, 128), "-alt": (BOOL, False),
        "--alternate-update": (BOOL, False), "--lr-step-size": (int, None), "-p": (int, 50), "--print-freq": (int, 50),
        "--freeze": (BOOL, False),
    },
    "imagenet": {
        **COMMON, **LARGE, "--epochs": (int, 90), "-b": (int, 256), "--batch-size": (int, 256), "-bm": (int, 1),
        "--batch-multiplier": (int, 1), "--lr-step-size": (int, 30), "-p": (int, 10), "--print-freq": (int, 10),
        "--opt-ckpt": (None, ""),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ORIGINAL)
def test_original_flags(name):
    actions = SCRIPTS[name].build_parser()._option_string_actions
    for flag, (kind, default) in ORIGINAL[name].items():
        assert (actions[flag].type, actions[flag].default) == (kind, default), flag
    assert {"-b", "-s", "--learning-rate"}.isdisjoint(actions) or name != "mnist"


@pytest.mark.parametrize("script", [*SCRIPTS.values(), count], ids=[*SCRIPTS, "count"])
def test_help_is_complete_and_fits_a_terminal(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = script.build_parser()
    assert max(map(len, parser.format_help().splitlines())) <= 100
    assert all(action.help for action in parser._actions)


def published_commands():
    with open(PAPER / "published.csv", newline="") as file:
        return list(dict.fromkeys(row["command"] for row in csv.DictReader(file) if "versus" not in row["command"]))


def parsed(command):
    words = shlex.split(command.replace("<path_to_imagenet_dataset>", "DIR"))
    name = words[1].removesuffix(".py")
    return name, SCRIPTS[name].parse_args(words[2:])


@pytest.mark.parametrize("command", published_commands())
def test_published_commands_parse_and_are_recognised(command):
    name, args = parsed(command)
    task = TASKS[name]
    found = task.published_command(args)
    assert parsed(f"python {found}")[1].__dict__ | {"command": 0} == args.__dict__ | {"command": 0}
    args.lr = 0.123
    assert task.published_command(args) is None


@pytest.mark.parametrize(
    "command",
    [
        "python imagenet.py --arch resnet18 -e --shift-depth 1000 --pretrained True --use-kernel True DIR",
        "python imagenet.py --arch resnet18 -e --pretrained True --use-kernel True DIR",
        "python mnist.py --shift-depth 1000 --shift-type Q --desc test -e --use-kernel True",
        "python cifar10.py --shift-type PS --opt radam",
    ],
)
def test_commands_with_kernels_and_without_depth_parse(command):
    name, args = parsed(command)
    assert args.shift_depth == (flags.ALL_LAYERS if name == "cifar10" else 1000 * ("--shift-depth" in command))


def test_abbreviations_and_truth_values():
    args = cifar10.parse_args("--opt radam --lr-step 5 --lr-schedule no --save-model F -ab 3 5 -st q".upper().lower()
                              .replace("-st q", "-st Q").split())  # fmt: skip
    assert (args.optimizer, args.lr_step_size, args.lr_schedule, args.save_model) == ("radam", 5, False, False)
    assert (args.activation_integer_bits, args.activation_fraction_bits) == (3, 5)
    assert imagenet.parse_args(["DIR", "--opt", "radam", "-ab", "3", "5"]).optimizer == "radam"
    assert [BOOL(word) for word in ("Y", "tRue", "1", "on", "n", "OFF", "0")] == [True] * 4 + [False] * 3


def test_depth_follows_from_type_only_where_it_is_not_given(capsys):
    assert cifar10.parse_args(["--shift-type", "Q"]).shift_depth == flags.ALL_LAYERS
    assert cifar10.parse_args(["--shift-type", "Q", "--shift-depth", "0"]).shift_depth == 0
    assert cifar10.parse_args([]).shift_depth == 0
    assert "all layers are converted" in cifar10.parse_args(["-st", "PS"]).notes[0]
    assert any("radam" in note for note in cifar10.parse_args(["-st", "PS"]).notes)


def test_labels():
    assert label("shift", "0", None, None) == "shift_0"
    assert label("shift_ps", "all", 5, None) == "shift_ps_all_wb_5"
    assert label("shift_q", "all", 5, "from_pretrained") == "shift_q_all_wb_5_from_pretrained"
    assert label("shift_ps", "3", 4, "") == "shift_ps_3_wb_4"


MISTAKES = [
    (mnist, "-wb 7", "--weight-bits must be 2 to 6, not 7"),
    (mnist, "-wb 1", "--weight-bits must be 2 to 6, not 1"),
    (mnist, "-ab 3", "--activation-bits takes two integers"),
    (mnist, "-ab 3 4 5", "--activation-bits takes two integers"),
    (mnist, "-ab 3 x", "--activation-bits takes two integers"),
    (mnist, "-ab 0 5", "--activation-bits must be 1 to 32"),
    (mnist, "--use-kernel True", "Our custom kernel currently supports inference only, not training."),
    (mnist, "-e --use-kernel True --shift-depth 3 -ab 20 20", "computes in 32 bits"),
    (mnist, "--save-model perhaps", "invalid truth value 'perhaps'"),
    (cifar10, "--optimizer adamw", "unknown --optimizer 'adamw'"),
    (cifar10, "--arch resnet21", "invalid choice: 'resnet21'"),
    (cifar10, "--arch densenet201", "invalid choice: 'densenet201'"),
    (cifar10, "--lr nan", "--lr must be a number"),
    (cifar10, "--epochs 0", "--epochs must be at least 1"),
    (cifar10, "--shift 3", "ambiguous option: --shift"),
    (imagenet, "-ab 3 5 DIR", "after -ab put another option or -- before it"),
    (imagenet, "--arch resnet18", "the folder DIR with train/ and val/ is required"),
    (imagenet, "DIR --arch nonet", "--arch nonet: not a classification network"),
    (imagenet, "DIR -bm 0", "--batch-multiplier must be at least 1"),
    (count, "cifar10 --arch nonet", "no network nonet for cifar10"),
    (count, "cifar10 -wb 9", "--weight-bits must be 2 to 6"),
]


@pytest.mark.parametrize(("script", "text", "message"), MISTAKES, ids=[text for _, text, _ in MISTAKES])
def test_bad_flags_end_with_one_line_and_status_2(script, text, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(text.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def dry_run(script, *arguments):
    environment = {**os.environ, "DRY_RUN": "1", "JOBS": "1", "OUTPUT": "./models"}
    command = ["bash", PAPER / script, *arguments]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    return [shlex.split(line)[3:] for line in lines]


def test_sweep_of_mnist_runs_every_row_with_three_seeds():
    task, found = TASKS["mnist"], {}
    for words in dry_run("sweep_mnist.sh", "--device", "cpu"):
        args = mnist.parse_args(words)
        assert args.auto_resume and args.device == "cpu"
        assert not args.weights or args.weights.startswith(f"./models/seed{args.seed}/mnist/{args.arch}/shift_0/")
        found.setdefault(task.published_command(args), set()).add(args.seed)
    expected = {c.removeprefix("python ") for c in published_commands() if c.startswith("python mnist.py")}
    assert found == {command: {1, 2, 3} for command in expected}


@pytest.mark.parametrize(("name", "arguments"), [("cifar10", []), ("imagenet", ["DIR"])])
def test_other_sweeps_run_every_published_row(name, arguments):
    commands = [SCRIPTS[name].parse_args(words) for words in dry_run(f"sweep_{name}.sh", *arguments, "--amp", "bf16")]
    task = TASKS[name]
    assert all(args.amp == "bf16" and args.auto_resume for args in commands)
    found = [task.published_command(args) for args in commands]
    expected = [c.removeprefix("python ") for c in published_commands() if c.startswith(f"python {name}.py")]
    unique = {task.published_command(parsed(f"python {command}")[1]) for command in expected}
    assert set(found) == unique
    starts = [bool(args.weights) for args in commands]
    assert starts == sorted(starts), "float networks come before those that start from them"
