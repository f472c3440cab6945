"""The original's flags keep their spelling, type and default; every published command parses; sweeps run every row."""

import csv
import importlib
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from shared_bases import runs, training, training_script

PAPER = Path(training_script.__file__).parent
DATASETS = ("cifar10", "cifar100", "ilsvrc")
MODELS = {
    "cifar10": "ResNet56_DoubleShared",
    "cifar100": "ResNet34_SingleShared",
    "ilsvrc": "ResNet34_DoubleShared",
}
SCRIPTS = [f"{kind}_{dataset}" for kind in ("train", "eval") for dataset in DATASETS]


def script(name):
    return importlib.import_module(f"shared_bases.{name}")


def original_flags(name):
    kind, dataset = name.split("_")
    large = dataset == "ilsvrc"
    flags = {
        "--shared_rank": (int, 32 if large else 16),
        "--unique_rank": (int, 1),
        "--batch_size": (int, 256),
        "--visible_device": (None, "0"),
        "--pretrained": (None, None),
        "--dataset_path": (None, "/media/data/ILSVRC2012/" if large else "./data/"),
        "--model": (None, MODELS[dataset]),
    }
    training_flags = {
        "--lr": (float, 0.1),
        "--momentum": (float, 0.9),
        "--weight_decay": (float, 1e-4 if large else 5e-4),
        "--lambdaR": (float, 10),
        "--starting_epoch": (int, 0),
    }
    return flags, training_flags, kind == "train" or large


@pytest.mark.parametrize("name", SCRIPTS)
def test_original_flags(name):
    flags, training_flags, takes_training_flags = original_flags(name)
    actions = script(name).build_parser()._option_string_actions
    for flag, expected in {**flags, **(training_flags if takes_training_flags else {})}.items():
        assert (actions[flag].type, actions[flag].default) == expected, flag
    if not takes_training_flags:
        assert not set(training_flags) & set(actions)


@pytest.mark.parametrize("name", [*SCRIPTS, "count", "modelsize", "similarity", "plot_tradeoff"])
def test_help_is_complete_and_fits_a_terminal(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = script(name).build_parser()
    assert max(map(len, parser.format_help().splitlines())) <= 100
    for action in parser._actions:
        assert action.help, action.option_strings
        takes_value = action.nargs != 0 and not action.required and action.default is not None
        assert not takes_value or "default" in action.help or "instead of" in action.help, action.option_strings


def published_rows():
    with open(PAPER / "published.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("command", sorted({row["command"] for row in published_rows()}))
def test_published_commands_parse(command):
    train, evaluate = (shlex.split(part) for part in command.split(" && "))
    assert (train[0], evaluate[0]) == ("python3", "python3")
    args, config = script(train[1].removesuffix(".py")).parse_args(train[2:])
    tested = script(evaluate[1].removesuffix(".py")).build_parser().parse_args(evaluate[2:])
    assert tested.model == args.model
    assert training_script.run_paths(args)[1] == tested.pretrained, "the file that is trained is the one that is tested"
    if args.visible_device != "0" or args.dataset != "ilsvrc":  # not of the first README, whose schedule was another
        assert runs.published_command(args, config) == command.removeprefix("python3 ")


def test_other_hyper_parameters_reproduce_nothing():
    flags = ["--lr=0.1", "--model=ResNet32_SingleShared", "--shared_rank=8"]
    parse = script("train_cifar10").parse_args
    assert runs.published_command(*parse(flags)).startswith("train_cifar10.py --lr=0.1 ")
    for other in (["--lambdaR=0"], ["--batch_size=128"], ["--unique_rank=2"], ["--momentum=0"]):
        assert runs.published_command(*parse([*flags, *other])) is None


def test_file_names_keep_the_trap_of_the_default_weight():
    parse = script("train_cifar10").parse_args
    name = "./checkpoint/CIFAR10-ResNet56_DoubleShared-S16-U1-L{}-0.pth"
    assert training_script.run_paths(parse([])[0])[1] == name.format("10")
    assert training_script.run_paths(parse(["--lambdaR=10"])[0])[1] == name.format("10.0")


@pytest.mark.parametrize("dataset", DATASETS)
def test_sweep_runs_every_published_row(dataset):
    environment = {**os.environ, "DRY_RUN": "1", "PYTHON": "python"}
    command = ["bash", PAPER / f"sweep_{dataset}.sh", "--epochs", "2"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    reproduced, paths = [], set()
    for line in output.splitlines():
        args, config = script(f"train_{dataset}").parse_args(shlex.split(line)[3:])
        assert args.epochs == 2 and args.auto_resume
        reproduced.append(runs.published_command(args, config))
        paths.add(training_script.run_paths(args)[1])
    published = {
        row["command"].removeprefix("python3 ")
        for row in published_rows()
        if row["command"].startswith(f"python3 train_{dataset}.py") and not row["table"].startswith("first README")
    }
    assert set(reproduced) == published and len(reproduced) == len(paths) == {"ilsvrc": 9}.get(dataset, 6)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("train_cifar10", ["--model=ResNet33"], "The model is currently not supported: 'ResNet33'"),
        ("eval_cifar100", ["--model=ResNet56_DoubleShared"], "The model is currently not supported"),
        ("train_cifar10", ["--shared_rank=0"], "shared_rank must be at least 1"),
        ("train_cifar10", ["--unique_rank=-1"], "unique_rank must be at least 1"),
        ("train_cifar10", ["--shared_rank=200"], "shared_rank 200 is larger than the channels allow"),
        ("train_cifar100", ["--model=ResNext50_SingleShared"], "4 times a power of two"),
        ("eval_cifar10", ["--shared_rank=-2"], "shared_rank must be at least 1"),
        ("eval_cifar10", ["--lr=0.1"], "unrecognized arguments: --lr=0.1"),
        ("train_cifar10", ["--batch_size=0"], "--batch_size must be at least 1"),
        ("train_cifar10", ["--epochs=0"], "--epochs must be at least 1"),
        ("train_cifar10", ["--train-size=0"], "--train-size must be at least 1"),
        ("train_cifar10", ["--starting_epoch=300"], "leaves none of 300 epochs"),
        ("train_cifar10", ["--lr=nan"], "--lr must be a positive number"),
        ("train_cifar10", ["--lambdaR=-1"], "--lambdaR must be a number that is not negative"),
        ("train_ilsvrc", ["--image-size=8"], "--image-size must be at least 32"),
        ("train_cifar10", ["--amp=fp16", "--device=cpu"], "--amp fp16 needs a GPU"),
    ],
)
def test_bad_flags_end_with_one_line_and_status_2(name, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script(name).main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def rates(name, *flags):
    """(epochs, {learning rate: number of epochs with it}, epochs after which training restarts)."""
    args, _ = script(name).parse_args(list(flags))
    schedule = training.schedule_of(args.dataset, args.model, args.recipe)
    values = [round(args.lr * schedule.factor(done, args.epochs), 9) for done in range(args.epochs)]
    restarts = [done for done in range(args.epochs) if schedule.starts_stage(done, args.epochs)]
    return args.epochs, {value: values.count(value) for value in values}, restarts


def test_schedules():
    steps = {0.1: 150, 0.01: 75, 0.001: 75}
    assert rates("train_cifar10") == (300, steps, [])
    assert rates("train_cifar100") == (300, steps, [150, 225])
    assert rates("train_cifar100", "--recipe=steps") == (300, steps, [])
    assert rates("train_cifar100", "--recipe=head") == (300, {0.1: 300}, [])
    assert rates("train_cifar100", "--epochs=4") == (4, {0.1: 2, 0.01: 1, 0.001: 1}, [2, 3])
    assert rates("train_ilsvrc") == (150, {0.1: 60, 0.01: 40, 0.001: 40, 0.0001: 10}, [])
    mobile = {0.1: 150, 0.01: 75, 0.001: 60}
    assert rates("train_ilsvrc", "--model=MobileNetV2-Shared") == (300, {**mobile, 0.0005: 15}, [])
    sep20 = rates("train_ilsvrc", "--model=MobileNetV2", "--recipe=sep20")
    assert sep20 == (300, {**mobile, 0.0001: 15}, [])


def test_several_visible_gpus_start_one_process_each(monkeypatch):
    started = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("os.execv", lambda program, words: started.append(words))
    args, _ = script("train_ilsvrc").parse_args(["--visible_device=0,1,2,3"])
    training_script.use_all_gpus(args)
    assert "--nproc-per-node=4" in started[0] and started[0][-1] == "--visible_device=0,1,2,3"
    args.device = "cpu"
    training_script.use_all_gpus(args)
    monkeypatch.setenv("WORLD_SIZE", "4")
    args.device = "auto"
    training_script.use_all_gpus(args)
    assert len(started) == 1
