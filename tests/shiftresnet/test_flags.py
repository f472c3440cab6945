"""The original's flags keep their spelling, type, default and choices; commands of its README parse."""

import csv
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from shiftresnet import count, eval, main, training
from shiftresnet.models import ARCHITECTURES

PAPER = Path(main.__file__).parent
NINE = (
    "resnet20", "shiftresnet20", "depthwiseresnet20", "resnet56", "shiftresnet56", "depthwiseresnet56", "resnet110",
    "shiftresnet110", "depthwiseresnet110",
)  # fmt: skip
ORIGINAL = {
    main: {
        "--lr": (float, 0.1, None),
        "--resume": (None, False, None),
        "-r": (None, False, None),
        "--batch_size": (int, 128, None),
        "-b": (int, 128, None),
        "--arch": (None, "shiftresnet110", NINE),
        "-a": (None, "shiftresnet110", NINE),
        "--expansion": (float, 1, None),
        "-e": (float, 1, None),
        "--reduction": (float, 1.0, None),
        "--reduction-mode": (None, "net", ("block", "net", "depthwise")),
        "--dataset": (None, "cifar10", ("cifar10", "cifar100")),
        "--datadir": (None, "./data/", None),
    },
    eval: {
        "--model": (None, None, None),
        "--suppress-errors": (None, False, None),
        "--dataset": (None, "cifar10", ("cifar10", "cifar100")),
    },
    count: {
        "--arch": (None, "shiftresnet110", NINE),
        "--expansion": (float, 1, None),
        "--reduction": (float, 1, None),
        "--reduction-mode": (None, "net", ("block", "net", "depthwise", "shuffle", "mobile")),
    },
}


@pytest.mark.parametrize("script", ORIGINAL, ids=lambda script: script.__name__)
def test_original_flags(script):
    actions = script.build_parser()._option_string_actions
    for flag, (kind, default, choices) in ORIGINAL[script].items():
        action = actions[flag]
        assert (action.type, action.default) == (kind, default), flag
        assert choices is None or set(choices) <= set(action.choices), flag
    assert set(ARCHITECTURES) == set(NINE)


@pytest.mark.parametrize("script", ORIGINAL, ids=lambda script: script.__name__)
def test_help_is_complete_and_fits_a_terminal(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = script.build_parser()
    text = parser.format_help()
    assert max(map(len, text.splitlines())) <= 100
    for action in parser._actions:
        assert action.help, action.option_strings
        takes_value = action.nargs != 0 and not action.required and action.default is not None
        assert not takes_value or "default" in action.help or "instead of" in action.help, action.option_strings


def published_commands():
    with open(PAPER / "published.csv", newline="") as file:
        return sorted({row["command"] for row in csv.DictReader(file) if row["command"]})


@pytest.mark.parametrize("command", published_commands())
def test_published_commands_parse(command):
    words = shlex.split(command)
    assert words[0] == "python"
    {"main.py": main, "eval.py": eval, "count.py": count}[words[1]].build_parser().parse_args(words[2:])
    if words[1] == "main.py":
        args, config = main.parse_args(words[2:])
        assert args.epochs == 164


@pytest.mark.parametrize("dataset", ("cifar10", "cifar100"))
def test_sweep_runs_every_published_row(dataset):
    environment = {**os.environ, "DRY_RUN": "1", "PYTHON": "python"}
    script = PAPER / f"sweep_{dataset}.sh"
    output = subprocess.run(
        ["bash", script, "--epochs", "2"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    configs = []
    for line in output.splitlines():
        words = shlex.split(line)
        args, config = main.parse_args(words[3:])
        assert args.epochs == 2 and args.auto_resume
        configs.append(config)
    assert len(set(configs)) == len(configs) == {"cifar10": 27, "cifar100": 39}[dataset]
    with open(PAPER / "published.csv", newline="") as file:
        published = {
            main.parse_args(shlex.split(row["command"])[2:])[1]
            for row in csv.DictReader(file)
            if row["table"].startswith("README CIFAR")
            and row["dataset"] == dataset
            and row["metric"] == "top1_acc_percent"
        }
    assert published == set(configs)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch=resnet21"], "invalid choice: 'resnet21'"),
        (["--arch=shiftresnet20", "--reduction=2"], "has no reduction"),
        (["--arch=resnet20", "--reduction=400"], "leaves 0 of 16 channels"),
        (["--arch=shiftresnet20", "--expansion=-1"], "expansion must be a positive number"),
        (["--batch_size=0"], "--batch_size must be at least 1"),
        (["--epochs=0"], "--epochs must be at least 1"),
        (["--lr=nan"], "--lr must be a positive number"),
        (["--dataset=imagenet"], "invalid choice: 'imagenet'"),
        (["--amp=fp16", "--device=cpu"], "--amp fp16 needs a GPU"),
    ],
)
def test_bad_flags_end_with_one_line_and_status_2(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_learning_rates_of_both_recipes():
    def rates(*flags):
        args, _ = main.parse_args(list(flags))
        values = [training.learning_rate(args, epoch) for epoch in range(args.epochs)]
        return args.epochs, [values.count(rate) for rate in (0.1, 0.01, 0.001)]

    assert rates() == (164, [82, 41, 41])
    assert rates("--recipe=published") == (160, [82, 42, 36])
    assert rates("--epochs=8") == (8, [4, 2, 2])
