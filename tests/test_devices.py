"""Every way to name a device, in every script: the right device, or one line and an exit status that is not 0.

The GPUs are made up: what is asked of them is answered by a machine of our own, down to the C function that makes a
GPU the current one. `torch.cuda.set_device` itself is PyTorch's, because it refuses what the C function never sees: a
device without a number.
"""

import importlib
import os
import subprocess
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
# Script: what it needs on the command line besides a device.
ONE_GPU = {
    "shiftresnet.main": [],
    "shiftresnet.eval": ["--model=none.t7"],
    "deepshift.mnist": ["--embedded-data"],
    "shared_bases.train_cifar10": ["--embedded-data"],
    "shared_bases.train_cifar100": ["--embedded-data"],
    "shared_bases.train_ilsvrc": ["--embedded-data"],
    "shared_bases.eval_cifar10": ["--embedded-data"],
    "shared_bases.eval_cifar100": ["--embedded-data"],
    "shared_bases.eval_ilsvrc": ["--embedded-data"],
    "shared_bases.modelsize": [],
    "epsilon_resnet.compressModel": ["--dir=none", "--step=1"],
}
GPU_NUMBER = {
    "deepshift.cifar10": ["--embedded-data"],
    "deepshift.imagenet": ["--embedded-data", "-e"],
    "s3.main_eval": ["--embedded-data", "-e"],
}
GPU_LIST = {
    "epsilon_resnet.cifarEpsilonResnet": ["--cifar10"],
    "epsilon_resnet.svhnEpsilonResnet": [],
    "epsilon_resnet.imagenetEpsilonResnet": ["--embedded-data"],
    "epsilon_resnet.imagenetCompressedResnet": ["--embedded-data"],
}
TESTS_GPU_LIST = {
    "epsilon_resnet.cifarCompressedResnet": ["--cfg=cifar"],
    "epsilon_resnet.svhnCompressedResnet": ["--cfg=cifar"],
    "epsilon_resnet.imagenetEpsilonResnet": ["--embedded-data", "--eval", "--load=none"],
    "epsilon_resnet.imagenetCompressedResnet": ["--embedded-data", "--cfg=imagenet"],
}
DEVICE_FLAG = {**ONE_GPU, **GPU_NUMBER, "s3.main": ["--embedded-data"], **GPU_LIST}
NEEDS_GPU_FLAG = ("imagenetEpsilonResnet", "imagenetCompressedResnet", "cifarCompressedResnet", "svhnCompressedResnet")


class Joined(Exception):
    """Where the test ends: the device is known, and the process group joined."""


@dataclass
class Machine:
    """`gpus` GPUs as PyTorch sees them. current: what was made the current GPU; backends: of the process groups."""

    gpus: int
    current: list = field(default_factory=list)
    backends: list = field(default_factory=list)
    started: list = field(default_factory=list)  # command lines
    latched: int | None = None

    def visible(self):
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        if shown is None:
            return self.gpus
        numbers = [int(word) for word in shown.split(",") if word.strip().lstrip("-").isdigit()]
        return len([number for number in numbers if 0 <= number < self.gpus])

    def is_available(self):
        """As CUDA's runtime does, this keeps what CUDA_VISIBLE_DEVICES says when it is asked first."""
        self.latched = self.visible() if self.latched is None else self.latched
        return self.latched > 0

    def device_count(self):
        return self.visible() if self.latched is None else self.latched

    def set_device(self, index):
        assert isinstance(index, int) and 0 <= index < self.device_count()
        self.current.append(index)

    def join(self, backend):
        self.backends.append(backend)

    def start(self, command, **options):
        self.started.append(command)
        return SimpleNamespace(returncode=0, stdout="")


@pytest.fixture
def run(monkeypatch, capsys):
    """call(script, flags, gpus, **environment) -> (device or exit status, stderr, machine)."""

    def call(script, flags, gpus=2, needed=None, **environment):
        machine = Machine(gpus)
        for name in NAMES:
            monkeypatch.setenv(name, "put back afterwards")
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        for name in ("is_available", "device_count"):
            monkeypatch.setattr(torch.cuda, name, getattr(machine, name))
        monkeypatch.setattr(torch._C, "_cuda_setDevice", machine.set_device, raising=False)
        monkeypatch.setattr(torch.distributed, "init_process_group", machine.join)
        monkeypatch.setattr(subprocess, "run", machine.start)
        monkeypatch.setattr(os, "execv", lambda program, command: machine.start(command))
        module = importlib.import_module(script)
        engine = importlib.import_module(script.split(".")[0] + ".engine")
        joined = engine.join_world

        def join_world(*arguments):
            raise Joined(joined(*arguments)[1])

        monkeypatch.setattr(engine, "join_world", join_world)
        needed = DEVICE_FLAG[script] if needed is None else needed
        try:
            result = engine.run_script(module.main, [*needed, *flags])
        except Joined as stop:
            (result,) = stop.args
        finally:
            monkeypatch.setattr(engine, "join_world", joined)
        return result, capsys.readouterr().err, machine

    return call


def check(outcome, expected):
    """expected: a device, or words of the one line with which the script must end."""
    result, told, machine = outcome
    if expected == "cpu" or expected.startswith("cuda:") and " " not in expected:
        assert result == torch.device(expected) and told.count("\n") <= 1, told
        assert machine.current == ([result.index] if result.type == "cuda" else [])
        return
    assert result == 1 and expected in told, (result, told)
    assert told.startswith("error: ") and told.count("\n") == 1 and "Traceback" not in told
    assert not machine.started


def rank(number, of, **others):
    return {"RANK": number, "WORLD_SIZE": of, "LOCAL_RANK": number, **others}


WAYS = {  # flags, GPUs, environment, device or message
    "auto without a GPU": ([], 0, {}, "cpu"),
    "auto": ([], 2, {}, "cuda:0"),
    "auto, said so": (["--device=auto"], 2, {}, "cuda:0"),
    "cpu": (["--device=cpu"], 2, {}, "cpu"),
    "cpu with a number": (["--device=cpu:0"], 2, {}, "cpu"),
    "cuda": (["--device=cuda"], 2, {}, "cuda:0"),
    "cuda:0": (["--device=cuda:0"], 2, {}, "cuda:0"),
    "cuda:1": (["--device=cuda:1"], 2, {}, "cuda:1"),
    "cuda:2": (["--device=cuda:2"], 2, {}, "cuda:2: this machine has 2 CUDA devices"),
    "cuda:256, which PyTorch calls cuda:0": (["--device=cuda:256"], 2, {}, "this machine has 2 CUDA devices"),
    "cuda without a GPU": (["--device=cuda"], 0, {}, "--device cuda, cuda:0: this machine has 0 CUDA devices"),
    "cuda:-1": (["--device=cuda:-1"], 2, {}, "--device cuda:-1: not a device"),
    "a typing error": (["--device=gpu"], 2, {}, "--device gpu: not a device; use auto, cpu, cuda or cuda:N"),
    "another kind": (["--device=mps"], 2, {}, "only cpu and cuda are supported"),
    "hidden GPUs": ([], 2, {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
    "cuda, hidden": (["--device=cuda"], 2, {"CUDA_VISIBLE_DEVICES": ""}, "this machine has 0 CUDA devices in CUDA_VIS"),
    "the second GPU is the first": ([], 2, {"CUDA_VISIBLE_DEVICES": "1"}, "cuda:0"),
    "beyond those shown": (["--device=cuda:1"], 2, {"CUDA_VISIBLE_DEVICES": "1"}, "1 CUDA device in CUDA_VISIBLE_DEV"),
    "torchrun": ([], 2, rank(1, 2, CUDA_VISIBLE_DEVICES="0,1"), "cuda:1"),
    "torchrun, cuda": (["--device=cuda"], 2, rank(1, 2, CUDA_VISIBLE_DEVICES="1,0"), "cuda:1"),
    "torchrun, cpu": (["--device=cpu"], 2, rank(1, 2), "cpu"),
    "torchrun without a GPU": ([], 0, rank(1, 2), "cpu"),
    "torchrun, too few GPUs": ([], 2, rank(2, 3, CUDA_VISIBLE_DEVICES="0,1"), "cuda:2: this machine has 2 CUDA dev"),
    "torchrun, one GPU for all": (["--device=cuda:0"], 2, rank(1, 2), "all 2 processes of this machine would use"),
    "torchrun, a GPU on each node": (["--device=cuda:1"], 2, {**rank(1, 2, LOCAL_WORLD_SIZE=1), "LOCAL_RANK": 0},
                                     "cuda:1"),
    "no place": ([], 2, {"RANK": 2, "WORLD_SIZE": 2}, "RANK=2 of WORLD_SIZE=2"),
    "no number": ([], 2, {"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is not a number"),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("script", DEVICE_FLAG)
def test_device(script, way, run):
    flags, gpus, environment, expected = WAYS[way]
    needs_flag = script.split(".")[1] in NEEDS_GPU_FLAG
    outcome = run(script, [*flags, *(["--gpu="] if needs_flag else [])], gpus, **environment)
    check(outcome, expected)
    backend = "nccl" if expected.startswith("cuda:") else "gloo"
    joins = "WORLD_SIZE" in environment and " " not in expected
    assert outcome[2].backends == ([backend] if joins else [])


@pytest.mark.parametrize("script", GPU_NUMBER)
@pytest.mark.parametrize(("flags", "environment", "expected"), [
    (["--gpu=0"], {}, "cuda:0"),
    (["--gpu=1"], {}, "cuda:1"),
    (["--gpu=1", "--device=cuda"], {}, "cuda:1"),
    (["--gpu=1", "--device=cuda:1"], {}, "cuda:1"),
    (["--gpu=2"], {}, "--gpu 2, cuda:2: this machine has 2 CUDA devices"),
    (["--gpu=1", "--device=cuda:0"], {}, "--gpu 1 and --device cuda:0 are two devices"),
    (["--gpu=1", "--device=cpu"], {}, "--gpu 1 and --device cpu are two devices"),
    (["--gpu=0"], rank(0, 2), "--gpu 0: all 2 processes of this machine would use that one GPU"),
    (["--gpu=1"], rank(1, 2), "--gpu 1: all 2 processes of this machine would use that one GPU"),
    (["--gpu=1"], rank(3, 4, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2), "--gpu 1: all 2 processes"),
    (["--gpu=0", "--multiprocessing-distributed"], {}, "--gpu 0 names one GPU, --multiprocessing-distributed uses all"),
    (["--device=cuda:1", "--multiprocessing-distributed"], {}, "--device cuda:1 names one GPU"),
    (["--gpu=1", "--world-size=2", "--rank=1", "--dist-url=tcp://h:1"], {}, "cuda:1"),  # one process per node
])  # fmt: skip
def test_gpu_number(script, flags, environment, expected, run):
    check(run(script, flags, **environment), expected)


def test_no_cuda(run):
    check(run("deepshift.mnist", ["--no-cuda"]), "cpu")
    check(run("deepshift.mnist", ["--no-cuda", "--device=cuda"]), "--no-cuda and --device cuda are two devices")


@pytest.fixture
def compressed(monkeypatch):
    """Stands for the files that tests of epsilon-ResNets read before they ask for a device."""
    from epsilon_resnet import cifarCompressedResnet, imagenetCompressedResnet, imagenetEpsilonResnet, pruning

    def read(path):
        config = SimpleNamespace(arch=path, size=18, num_classes=10)
        network = SimpleNamespace(config=config, content={}, pixel_mean=None, build=lambda: None)
        return SimpleNamespace(config=config, network=network, fields={})

    monkeypatch.setattr(pruning, "read_compressed", read)
    for module in (imagenetEpsilonResnet, imagenetCompressedResnet):
        monkeypatch.setattr(module, "read_network", lambda path: SimpleNamespace(build=lambda: None))
    monkeypatch.setattr(cifarCompressedResnet, "print_fields", lambda compressed: None)
    monkeypatch.setattr(cifarCompressedResnet, "dataset_of", lambda args, network: args.dataset or "cifar10")


GPU_LIST_WAYS = [
    (["--gpu=0"], 2, {}, "cuda:0"),
    (["--gpu=1"], 2, {}, "cuda:1"),
    (["--gpu=1", "--device=cuda"], 2, {}, "cuda:1"),
    (["--gpu=1", "--device=cuda:0"], 2, {}, "cuda:0"),  # --device is the way here to say instead
    (["--gpu=1", "--device=cpu"], 2, {}, "cpu"),
    (["--gpu=1"], 0, {}, "cpu"),
    (["--gpu=2"], 2, {}, "--gpu 2, cuda:2: this machine has 2 CUDA devices"),
    (["--gpu=one"], 2, {}, "write device numbers with commas"),
    (["--gpu=0,1"], 2, rank(1, 2), "cuda:1"),
    (["--gpu=1,0"], 2, rank(1, 2), "cuda:0"),
    (["--gpu=0,2"], 4, rank(1, 2), "cuda:2"),
    (["--gpu=0"], 2, rank(0, 2), "--gpu 0: 2 processes of this machine would share 1 of its GPUs"),
    (["--gpu=1"], 2, rank(1, 2), "--gpu 1: 2 processes of this machine would share 1 of its GPUs"),
    (["--gpu=0,1"], 4, rank(3, 4), "--gpu 0,1: 4 processes of this machine would share 2 of its GPUs"),
    (["--gpu=0"], 0, rank(1, 2), "cpu"),
]


@pytest.mark.parametrize(("flags", "gpus", "environment", "expected"), GPU_LIST_WAYS)
@pytest.mark.parametrize("script", GPU_LIST)
def test_gpu_list(script, flags, gpus, environment, expected, run):
    check(run(script, flags, gpus, **environment), expected)


@pytest.mark.parametrize(("flags", "gpus", "environment", "expected"), GPU_LIST_WAYS)
@pytest.mark.parametrize("script", TESTS_GPU_LIST)
def test_gpu_list_of_tests(script, flags, gpus, environment, expected, run, compressed):
    check(run(script, flags, gpus, needed=TESTS_GPU_LIST[script], **environment), expected)


@pytest.mark.parametrize("script", GPU_LIST)
def test_several_gpus_start_processes(script, run):
    """One for each, after it is known that all of them are there."""
    status, _, machine = run(script, ["--gpu=0,1"])
    assert status == 0 and "--nproc_per_node=2" in machine.started[0] and not machine.current
    check(run(script, ["--gpu=0,2"]), "--gpu 0,2, cuda:2: this machine has 2 CUDA devices")


SHARED_BASES = [name for name in ONE_GPU if name.startswith("shared_bases.") and not name.endswith("modelsize")]


@pytest.mark.parametrize(("flags", "shown", "environment", "expected"), [
    ([], "0", {}, "cuda:0"),
    (["--visible_device=1"], "1", {}, "cuda:0"),
    (["--visible_device=1", "--device=cuda"], "1", {}, "cuda:0"),
    (["--visible_device=1"], "1", {"CUDA_VISIBLE_DEVICES": "0"}, "cuda:0"),
    (["--visible_device=1,0", "--device=cuda:1"], "1,0", {}, "cuda:1"),
    (["--visible_device=0,1"], "0,1", rank(1, 2), "cuda:1"),
    (["--visible_device=1", "--device=cuda:1"], "1", {}, "1 CUDA device in CUDA_VISIBLE_DEVICES=1; show more of them"),
    (["--visible_device=5", "--device=cuda"], "5", {}, "0 CUDA devices in CUDA_VISIBLE_DEVICES=5; show more of them"),
    ([], "0", rank(1, 2), "1 CUDA device in CUDA_VISIBLE_DEVICES=0; show more of them with --visible_device=0,1"),
])  # fmt: skip
@pytest.mark.parametrize("script", SHARED_BASES)
def test_visible_device(script, flags, shown, environment, expected, run):
    """What is shown is decided before PyTorch is asked for a GPU, also where --amp fp16 asks first."""
    training = ["--amp=fp16"] if ".train" in script and " " not in expected else []
    outcome = run(script, [*flags, *training], **environment)
    check(outcome, expected)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown
    assert outcome[2].latched in (None, outcome[2].visible())


def test_ilsvrc_starts_a_process_for_each_visible_device(run):
    outcome = run("shared_bases.train_ilsvrc", ["--visible_device=1,0", "--amp=fp16"])
    assert "--nproc-per-node=2" in outcome[2].started[0]


@pytest.mark.parametrize("script", DEVICE_FLAG)
def test_a_gpu_that_cannot_be_used(script, run, monkeypatch):
    """Such as one whose driver is too old, or that fell off the bus: CUDA says so when it is made the current one."""

    def refuse(machine, index):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors…")

    monkeypatch.setattr(Machine, "set_device", refuse)
    flags = ["--gpu=0"] if script.split(".")[1] in NEEDS_GPU_FLAG else []
    check(run(script, flags), "cuda:0 cannot be used: CUDA error: no kernel image is available for execution")


def test_processes_that_are_not_reached(run, monkeypatch):
    def refuse(machine, backend):
        raise torch.distributed.DistNetworkError("The client socket has timed out after 60000ms")

    monkeypatch.setattr(Machine, "join", refuse)
    check(run("s3.main", [], 0, **rank(1, 2)), "the other processes are not reached: The client socket has timed out")


@pytest.mark.parametrize("name", ["bench_shift_cuda", "bench_bitshift_cuda"])
def test_benchmarks_number_their_gpu(name, monkeypatch):
    """As the papers' scripts: `--device cuda` becomes a device that can be made the current one."""
    from benchmarks import timing

    module, machine, empty = importlib.import_module(f"benchmarks.{name}"), Machine(2), torch.empty

    def hardware(device):
        raise Joined(device)

    def made_up(*size, device):
        return SimpleNamespace(device=torch.device("cuda", torch.device(device).index or 0))

    monkeypatch.setattr(torch._C, "_cuda_setDevice", machine.set_device, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", machine.device_count)
    monkeypatch.setattr(timing, "hardware", hardware)
    for given, index in (("cuda", 0), ("cuda:1", 1)):
        monkeypatch.setattr(torch, "empty", made_up)
        with pytest.raises(Joined) as stop:
            module.main(["--device", given])
        monkeypatch.setattr(torch, "empty", empty)
        assert stop.value.args == (torch.device("cuda", index),) and machine.current[-1] == index
