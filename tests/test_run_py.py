"""run.py, the same text in all five papers: GPUs that PyTorch cannot use, and GPUs that fail or fill up in a run."""

import importlib
import os
import warnings
from pathlib import Path

import pytest
import torch

from shiftresnet import run as any_run  # they are equal: test_the_five_copies_are_equal

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ("shiftresnet", "deepshift", "s3", "shared_bases", "epsilon_resnet")
GIB = 2**30
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which…\nmore\nlines"
DATA = ["--embedded-data", "--device=cpu"]
SHORT = [*DATA, "--train-size=64", "--epochs=1", "--seed=1"]
TINY = ["--batch_size=16", "--steps_per_epoch=1", "-n", "2", "--cifar10"]
TRAIN = {  # script: flags, batch size, the flag that lowers it
    "shiftresnet.main": ([*SHORT, "--arch=shiftresnet20", "--batch_size=16"], 16, "--batch_size"),
    "deepshift.mnist": ([*SHORT, "--batch-size=16"], 16, "--batch-size"),
    "deepshift.cifar10": ([*SHORT, "-b=16", "-a=resnet20"], 16, "--batch-size"),
    "deepshift.imagenet": ([*SHORT, "-b=16", "--image-size=32", "-j=0"], 16, "--batch-size"),
    "s3.main": ([*SHORT, "-b=16", "--dataset=cifar10", "-a=resnet20"], 16, "--batch-size"),
    "s3.main_eval": ([*SHORT, "-b=16", "--dataset=cifar10", "-a=resnet20"], 16, "--batch-size"),
    "shared_bases.train_cifar10": ([*SHORT, "--batch_size=16", "--model=ResNet32_SingleShared"], 16, "--batch_size"),
    "epsilon_resnet.cifarEpsilonResnet": ([*SHORT, *TINY], 16, "--batch_size"),
}
TEST = {
    "deepshift.mnist": ([*SHORT, "-e", "--test-batch-size=99"], 99, "--test-batch-size"),
    "deepshift.cifar10": ([*SHORT, "-e", "-b=16", "-a=resnet20"], 16, "--batch-size"),
    "s3.main": ([*SHORT, "-e", "-b=16", "--dataset=cifar10", "-a=resnet20"], 16, "--batch-size"),
    "s3.main_eval": ([*SHORT, "-e", "-b=16", "--dataset=cifar10", "-a=resnet20"], 16, "--batch-size"),
    "shared_bases.eval_cifar10": ([*DATA, "--batch_size=16"], 16, "--batch_size"),
    # After an epoch of training: these scripts have no flag for the batch of a test.
    "shiftresnet.main": (TRAIN["shiftresnet.main"][0], 1000, "use --device cpu"),
    "epsilon_resnet.cifarEpsilonResnet": ([*SHORT, *TINY], 128, "use --device cpu"),
}


def test_the_five_copies_are_equal():
    texts = {paper: (ROOT / paper / "run.py").read_bytes() for paper in PAPERS}
    different = [paper for paper, text in texts.items() if text != texts[PAPERS[0]]]
    assert not different, f"copy {PAPERS[0]}/run.py, or the edited one, over the others: {', '.join(different)} differ"


def status_of(script, flags, output=None):
    module, engine = importlib.import_module(script), importlib.import_module(script.split(".")[0] + ".engine")
    return engine.run_script(module.main, [*flags, *([] if output is None else [f"--output-dir={output}"])])


def one_line(capsys):
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and "Traceback" not in told, told
    return told


def fail_in_loss(monkeypatch, error, in_test=False):
    """Raise an error from the loss of the next step, or of the next test."""
    loss = torch.nn.functional.cross_entropy

    def cross_entropy(*arguments, **options):
        if in_test and torch.is_grad_enabled():
            return loss(*arguments, **options)
        raise error

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB // 2, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 * GIB)
    return "0.5 of 80.0 GiB are free and 3.0 GiB are this process's"


@pytest.mark.parametrize("script", TRAIN)
def test_out_of_memory_in_training(script, memory, monkeypatch, capsys, tmp_path):
    flags, size, flag = TRAIN[script]
    fail_in_loss(monkeypatch, torch.cuda.OutOfMemoryError(FULL))
    assert status_of(script, flags, tmp_path) == 1
    told = one_line(capsys)
    assert f"the GPU is out of memory with a batch size of {size}, {memory}; lower {flag}, or free what another" in told


@pytest.mark.parametrize("script", TEST)
def test_out_of_memory_in_evaluation(script, memory, monkeypatch, capsys, tmp_path):
    flags, size, advice = TEST[script]
    fail_in_loss(monkeypatch, torch.cuda.OutOfMemoryError(FULL), in_test=True)
    output = None if ".eval" in script else tmp_path
    assert status_of(script, flags, output) == 1
    told = one_line(capsys)
    assert f"out of memory with a batch size of {size}, {memory}; " in told and advice in told


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder with the finished run of ShiftResNet's command in TRAIN."""
    folder = tmp_path_factory.mktemp("trained")
    assert status_of("shiftresnet.main", TRAIN["shiftresnet.main"][0], folder) == 0
    return folder


def test_out_of_memory_of_a_saved_network(trained, monkeypatch, capsys):
    fail_in_loss(monkeypatch, torch.cuda.OutOfMemoryError(FULL))
    assert status_of("shiftresnet.eval", [*DATA, f"--model={trained}/*.t7"]) == 1
    assert "out of memory with a batch size of 1000; use --device cpu" in one_line(capsys)  # without a GPU to ask


@pytest.mark.parametrize("script", TRAIN)
def test_a_gpu_that_is_full_before_the_first_step(script, monkeypatch, capsys, tmp_path):
    """The driver's words for it, when the network is put there."""
    flags, size, flag = TRAIN[script]

    def full(*arguments, **options):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    assert status_of(script, flags, tmp_path) == 1
    assert f"out of memory with a batch size of {size}; lower {flag}, or free" in one_line(capsys)


@pytest.mark.parametrize("script", dict(zip([name.split(".")[0] for name in TRAIN], TRAIN, strict=True)).values())
def test_a_gpu_that_is_lost(script, monkeypatch, capsys, tmp_path):
    error = RuntimeError("CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA` to enable…")
    fail_in_loss(monkeypatch, error)
    assert status_of(script, TRAIN[script][0], tmp_path) == 1
    assert "the GPU failed: CUDA error: unspecified launch failure; nvidia-smi" in one_line(capsys)


def test_the_last_good_checkpoint_is_named(trained, monkeypatch, capsys):
    fail_in_loss(monkeypatch, torch.cuda.OutOfMemoryError(FULL))
    assert status_of("shiftresnet.main", [*TRAIN["shiftresnet.main"][0], "--epochs=2", "--resume"], trained) == 1
    assert "the last good checkpoint is" in one_line(capsys)


def test_other_errors_are_not_explained_away():
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("CUDA error: no")):
        with pytest.raises(type(error), match=str(error)), any_run.gpu_errors_explained(1, "--batch_size"):
            raise error
    for text in ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling…"):
        with pytest.raises(any_run.RunError, match="out of memory; use --device cpu"), any_run.gpu_errors_explained():
            raise RuntimeError(text)


# Which CUDA.

VERSION = "NVRM version: NVIDIA UNIX {}  {}  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc version 12.3.0\n"
KINDS = ("x86_64 Kernel Module", "Open Kernel Module for x86_64", "aarch64 Kernel Module")
SCRIPTS = {
    "shiftresnet.main": ["--auto-resume"], "shiftresnet.eval": ["--model=none"], "deepshift.mnist": [],
    "deepshift.cifar10": [], "deepshift.imagenet": [], "s3.main": [], "s3.main_eval": [],
    "shared_bases.train_cifar10": [], "shared_bases.eval_cifar100": [], "shared_bases.modelsize": [],
    "epsilon_resnet.cifarEpsilonResnet": ["--cifar10"], "epsilon_resnet.imagenetEpsilonResnet": ["--gpu=0"],
    "epsilon_resnet.compressModel": ["--dir=none", "--step=1"],
}  # fmt: skip


class Joined(Exception):
    """Where a test of the device ends."""


@pytest.fixture
def nvidia(monkeypatch, tmp_path):
    """call(driver's version, CUDA of PyTorch): a machine with that driver, whose GPU PyTorch cannot use."""

    def call(version, built_for, kind=KINDS[0], devices=True):
        folder, nodes = tmp_path / "nvidia", tmp_path / "nvidiactl"
        folder.mkdir(exist_ok=True)
        (folder / "version").write_text(VERSION.format(kind, version))
        nodes.touch()
        for paper in PAPERS:
            run = importlib.import_module(f"{paper}.run")
            monkeypatch.setattr(run, "NVIDIA_DRIVER", folder)
            monkeypatch.setattr(run, "NVIDIA_DEVICES", nodes if devices else tmp_path / "none")
        monkeypatch.setattr(torch.version, "cuda", built_for)

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "put back afterwards")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return call


def start(script, flags, monkeypatch):
    """Run a script until its device is known. Returns the device, or the exit status."""
    module, engine = importlib.import_module(script), importlib.import_module(script.split(".")[0] + ".engine")
    joined = engine.join_world

    def join_world(*arguments):
        raise Joined(joined(*arguments)[1])

    monkeypatch.setattr(engine, "join_world", join_world)
    data = [] if script.endswith("modelsize") else ["--embedded-data"]
    try:
        return engine.run_script(module.main, [*SCRIPTS[script], *data, *flags])
    except Joined as stop:
        return stop.args[0]


OLD_DRIVER = ("driver 535.104.05", "built for CUDA 13.0", "install requirements-cuda12.txt", "580 on")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_old_driver_is_told(script, nvidia, monkeypatch, capsys):
    """On the CPU where the script chooses, with an error where the user does; in one line either way."""
    nvidia("535.104.05", "13.0")
    assert start(script, [], monkeypatch) == torch.device("cpu")
    told = capsys.readouterr().err
    assert told.startswith("warning: ") and told.count("\n") == 1 and all(part in told for part in OLD_DRIVER)
    assert start(script, ["--device=cpu"], monkeypatch) == torch.device("cpu") and not capsys.readouterr().err
    assert start(script, ["--device=cuda"], monkeypatch) == 1
    told = one_line(capsys)
    assert "cuda:0: PyTorch cannot use" in told and all(part in told for part in OLD_DRIVER)


def test_an_old_driver_is_told_by_the_first_process_only(nvidia, monkeypatch, capsys):
    nvidia("535.104.05", "13.0")
    for rank, lines in ((0, 1), (1, 0)):
        assert any_run.choose_device("auto", any_run.World(rank, 2, rank, 2)) == torch.device("cpu")
        assert capsys.readouterr().err.count("\n") == lines


def test_an_old_driver_that_fails_late(nvidia, monkeypatch):
    """NVML counts GPUs that CUDA then refuses to use."""
    nvidia("535.104.05", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def refuse(index):
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).")

    monkeypatch.setattr(torch._C, "_cuda_setDevice", refuse, raising=False)
    device = any_run.choose_device("cuda", any_run.World())
    with pytest.raises(any_run.RunError, match="cuda:0 cannot be used: .*535.104.05.*requirements-cuda12.txt"):
        any_run.join_processes(any_run.World(), device)


@pytest.mark.parametrize(("version", "built_for", "parts"), [
    ("535.104.05", "13.0", ["driver 535.104.05", "built for CUDA 13.0", "install requirements-cuda12.txt"]),
    ("470.57.02", "12.8", ["driver 470.57.02", "built for CUDA 12.8", "525"]),
    ("580.65.06", None, ["driver 580.65.06", "a CPU build", "requirements.txt"]),
    ("580.65.06", "13.0", ["driver 580.65.06", "built for CUDA 13.0", "see nvidia-smi"]),
    ("550.54", "12.8", ["driver 550.54", "built for CUDA 12.8", "see nvidia-smi"]),
])  # fmt: skip
def test_what_is_told_of_a_driver(version, built_for, parts, nvidia):
    for kind in KINDS:
        nvidia(version, built_for, kind)
        problem = any_run.nvidia_problem()
        assert all(part in problem for part in [torch.__version__, *parts]) and "\n" not in problem


def test_the_reason_that_pytorch_gives(nvidia, monkeypatch):
    def is_available():
        warnings.warn("CUDA initialization: Error 802: system not yet initialized\n(Triggered …)", stacklevel=1)
        return False

    nvidia("580.65.06", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert any_run.nvidia_problem().endswith(": CUDA initialization: Error 802: system not yet initialized")


def test_a_container_without_its_gpus(nvidia):
    nvidia("580.65.06", "13.0", devices=False)
    assert "a container must be started with its GPUs" in any_run.nvidia_problem()


def test_gpus_that_are_not_shown(nvidia, monkeypatch, capsys):
    """Hidden on purpose: nothing is said. Numbers that the machine does not have: an error, not the CPU."""
    nvidia("580.65.06", "13.0")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert any_run.nvidia_problem() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert start("deepshift.mnist", [], monkeypatch) == 1
    assert "CUDA_VISIBLE_DEVICES=7 names no GPU of this machine" in one_line(capsys)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert start("shared_bases.train_cifar10", ["--visible_device=5"], monkeypatch) == 1
    assert "CUDA_VISIBLE_DEVICES=5 names no GPU of this machine" in one_line(capsys)


def test_fp16_says_why_there_is_no_gpu(nvidia, monkeypatch, capsys):
    nvidia("535.104.05", "13.0")
    with pytest.raises(SystemExit, match="2"):
        start("s3.main", ["--amp=fp16"], monkeypatch)
    told = capsys.readouterr().err
    assert "--amp fp16 needs a GPU, and PyTorch cannot use" in told and "driver 535.104.05" in told


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """call(what it prints): a machine where only nvidia-smi tells of the driver, as under WSL."""

    def call(text):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{text}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(any_run, "NVIDIA_DRIVER", tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return call


def test_nvidia_smi_is_asked_too(nvidia_smi):
    nvidia_smi("535.104.05")
    assert "driver 535.104.05" in any_run.nvidia_problem()
    nvidia_smi("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.")
    assert "no driver answers" in any_run.nvidia_problem()


def test_nothing_is_asked_without_nvidia(monkeypatch, tmp_path):
    """Nothing is run, and CUDA is not asked a second time."""

    def refuse(*arguments, **options):
        raise AssertionError("asked")

    monkeypatch.setattr(any_run, "NVIDIA_DRIVER", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    for module, name in ((any_run.subprocess, "run"), (torch.cuda, "is_available")):
        monkeypatch.setattr(module, name, refuse)
    assert any_run.nvidia_problem() is None
