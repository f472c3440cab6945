"""Flags keep the original's spelling, aliases, types and defaults; its commands parse; mistakes are one line."""

import csv
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from s3 import convert, count, engine, main, main_eval, plot

PAPER = Path(main.__file__).parent
SCRIPTS = {"main": main, "main_eval": main_eval}
COMMON = {
    "-j": (int, 4), "--workers": (int, 4), "--start-epoch": (int, 0), "-b": (int, 256), "--batch-size": (int, 256),
    "--lr": (float, 0.1), "--learning-rate": (float, 0.1), "--momentum": (float, 0.9), "--wd": (float, 1e-4),
    "--weight-decay": (float, 1e-4), "--resume": (None, ""), "-e": (None, False), "--evaluate": (None, False),
    "--pretrained": (None, False), "--seed": (int, None),
}  # fmt: skip
ORIGINAL = {
    "main": {
        **COMMON, "--epochs": (int, 200), "--rs": (float, 1e-5), "--reg-sparse": (float, 1e-5), "-p": (int, 100),
        "--print-freq": (int, 100),
    },
    "main_eval": {
        **COMMON, "--epochs": (int, 90), "-p": (int, 10), "--print-freq": (int, 10), "-a": (None, "resnet18"),
        "--arch": (None, "resnet18"), "--world-size": (int, -1), "--rank": (int, -1), "--gpu": (int, None),
        "--dist-url": (None, "tcp://224.66.41.62:23456"), "--dist-backend": (None, "nccl"),
        "--multiprocessing-distributed": (None, False),
    },
}  # fmt: skip
EXTENSIONS = {
    "--arch": "resnet18", "--method": "s3", "--weight-bits": 3, "--init": "default", "--schedule": "original",
    "--dataset": "imagenet", "--num-classes": None, "--image-size": 224, "--skip-damaged": False,
    "--use-kernel": False,
}  # fmt: skip
ADDED = ("--data-dir", "--embedded-data", "--train-size", "--device", "--amp", "--compile", "--channels-last",
         "--deterministic", "--output-dir", "--auto-resume", "--debug")  # fmt: skip


@pytest.mark.parametrize("name", ORIGINAL)
def test_original_flags(name):
    actions = SCRIPTS[name].build_parser()._option_string_actions
    for flag, (kind, default) in ORIGINAL[name].items():
        assert (actions[flag].type, actions[flag].default) == (kind, default), flag
    assert set(ADDED) <= set(actions)


def test_extensions_are_marked_and_leave_the_original_alone():
    parser = main.build_parser()
    group = next(group for group in parser._action_groups if "extensions" in group.title)
    found = {flag: action.default for action in group._group_actions for flag in action.option_strings}
    assert found == {**EXTENSIONS, "-a": "resnet18"}


@pytest.mark.parametrize("script", [main, main_eval, convert, count, plot], ids=lambda script: script.__name__)
def test_help_is_complete_and_fits_a_terminal(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = script.build_parser()
    assert max(map(len, parser.format_help().splitlines())) <= 100
    assert all(action.help for action in parser._actions)
    assert max(map(len, script.__doc__.splitlines())) <= 79


def published_commands():
    with open(PAPER / "published.csv", newline="") as file:
        return [command for command in dict.fromkeys(row["command"] for row in csv.DictReader(file)) if command]


def parsed(command):
    words = shlex.split(re.sub(r"\(.*\)", "", command))
    return SCRIPTS[words[1].removesuffix(".py")], words[2:]


@pytest.mark.parametrize("command", published_commands())
def test_published_commands_parse_and_are_recognised(command):
    script, words = parsed(command)
    args = script.parse_args(words)
    assert args.data == "/path/to/imagenet"
    if script is main:
        task = main.S3Task()
        assert task.published_command(args, 1000) == command.removeprefix("python ")
        assert task.published_command(args, 10) is None
        for change in (["--lr=0.2"], ["--method=float"], ["--weight-bits=4"], ["--epochs=90"], ["--init=dense"]):
            assert task.published_command(main.parse_args([*words, *change]), 1000) is None
    else:
        assert args.evaluate and args.resume.startswith("s3-3bit-resnet")


def test_what_follows_from_other_flags():
    args = main.parse_args(["--dataset", "digits", "-a", "resnet8"])
    assert args.embedded_data
    args = main.parse_args(["/data", "--dataset=cifar10", "--arch=resnet20"])
    assert args.data_dir == "/data"
    assert main.parse_args(["--res", "x", "DIR", "--ev", "--reg", "1e-4"]).rs == 1e-4


def test_main_eval_knows_torchvisions_networks_only(capsys):
    for name in ("resnet18", "alexnet", "vit_b_16"):
        assert main_eval.parse_args(["DIR", "-a", name]).arch == name
    for name in ("get_model", "list_models", "ResNet"):
        with pytest.raises(SystemExit):
            main_eval.parse_args(["DIR", "-a", name])


MISTAKES = [
    (main, "", "the folder DIR with train/ and val/ is required"),
    (main, "DIR --weight-bits 5", "--weight-bits must be 2, 3 or 4, not 5"),
    (main, "DIR --weight-bits 1 --method denseshift", "--weight-bits must be 2, 3 or 4, not 1"),
    (main, "DIR --arch resnet20", "--arch resnet20: not a network for --dataset imagenet; choose from resnet18"),
    (main, "--dataset cifar10 --arch resnet50x", "--arch resnet50x: not a network for --dataset cifar10"),
    (main, "DIR --lr nan", "--lr must be a number"),
    (main, "DIR --rs -1", "--rs must be a number of at least 0"),
    (main, "DIR --epochs 0", "--epochs must be at least 1"),
    (main, "DIR --num-classes 0", "--num-classes must be at least 1"),
    (main, "DIR --image-size 8", "--image-size must be at least 32"),
    (main, "DIR --use-kernel", "--use-kernel: the packed kernels are for inference"),
    (main, "DIR --amp fp16 --device cpu", "--amp fp16 needs a GPU"),
    (main, "DIR --dataset svhn", "invalid choice: 'svhn'"),
    (main_eval, "DIR --arch get_model", "--arch get_model: not a network"),
    (main_eval, "--dataset cifar10 --pretrained --arch resnet8", "--pretrained: torchvision has weights for ImageNet"),
    (main_eval, "DIR --gpu -1", "--gpu must be at least 0"),
    (count, "--arch resnet19", "no resnet19 for imagenet"),
    (count, "--weight-bits 5", "invalid choice: 5"),
    (count, "--image-size 1000", "--image-size 1000: the images are too large"),
    (convert, "a.tar", "give a file to write"),
    (convert, "a.tar a.tar", "the trained one is not overwritten"),
]


@pytest.mark.parametrize(("script", "text", "message"), MISTAKES, ids=[f"{m[0].__name__} {m[1]}" for m in MISTAKES])
def test_bad_flags_end_with_one_line_and_status_2(script, text, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(text.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("place", "flags", "message"), [
    ({}, ["--world-size=2"], "--world-size 2 needs --rank 0 to 1, not -1"),
    ({}, ["--world-size=2", "--rank=1", "--dist-url=somewhere"], "--dist-url must be tcp://HOST:PORT"),
    ({}, ["--world-size=2", "--rank=1", "--dist-url=env://"], "needs MASTER_ADDR"),
    ({}, ["--gpu=99"], "cuda:99: this machine has"),
    ({}, ["--device=tpu"], "--device tpu"),
])  # fmt: skip
def test_distributed_flags_that_do_not_fit(place, flags, message, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert engine.run_script(main_eval.main, ["DIR", "-e", *flags]) == 1
    assert message in capsys.readouterr().err


def test_addresses_of_nodes(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")  # put back what the function sets
        monkeypatch.delenv(name)
    args = main_eval.parse_args(["DIR", "--world-size=2", "--rank=1", "--dist-url=tcp://10.0.0.1:2345"])
    engine._environment_of_flags(args)
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["1", "2", "10.0.0.1", "2345"]


def test_one_process_per_gpu(monkeypatch):
    """--multiprocessing-distributed: ranks of this node's processes, and env:// with the environment's node."""
    started = []

    class Process:
        def __init__(self, command, env):
            started.append((command, env))

        def wait(self):
            return 0

        def terminate(self):
            pass

    monkeypatch.setattr(engine.subprocess, "Popen", Process)
    monkeypatch.setattr(engine.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", "123")
    args = main_eval.parse_args(["DIR", "--multiprocessing-distributed", "--dist-url=env://"])
    assert engine.processes_to_start(args) == 2
    assert engine.start_processes(args, 2) == 0
    places = [[env[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")] for _, env in started]
    assert places == [["2", "4", "0", "host"], ["3", "4", "1", "host"]]
    assert started[0][0][-3:] == ["DIR", "--multiprocessing-distributed", "--dist-url=env://"]


def test_sweep_trains_both_networks_on_one_schedule():
    environment = {**os.environ, "DRY_RUN": "1", "SEEDS": "1 2", "OUTPUT": "out"}
    command = ["bash", PAPER / "sweep_cifar10.sh", "--epochs", "5", "--device", "cpu"]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    runs = [main.parse_args(shlex.split(line)[2:]) for line in lines]
    assert [(args.method, args.seed) for args in runs] == [("s3", 1), ("float", 1), ("s3", 2), ("float", 2)]
    differing = {"method", "seed", "output_dir", "command"}
    for args in runs:
        assert args.auto_resume and args.weight_bits == 3 and args.arch == "resnet20" and args.epochs == 5
        rest = {name: value for name, value in vars(args).items() if name not in differing}
        assert rest == {name: value for name, value in vars(runs[0]).items() if name not in differing}
    assert len({args.output_dir for args in runs}) == 4
