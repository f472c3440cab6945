"""What a run is: its place among several processes, its device, and the error that ends it with one line.

This file is the same, byte for byte, in all five papers, because a paper stands alone: change one, copy it over the
other four, and run tests/test_run_py.py, which holds them equal. Which flags name a device differs from paper to paper
and is in engine.py.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

NVIDIA_DRIVER, NVIDIA_DEVICES = Path("/proc/driver/nvidia"), Path("/dev/nvidiactl")
LEAST_DRIVER = {12: 525, 13: 580}  # the oldest driver for each CUDA major version
WHAT_TO_INSTALL = (
    f"install requirements-cuda12.txt (for drivers from {LEAST_DRIVER[12]} on), or a newer driver (from "
    f"{LEAST_DRIVER[13]} on) and requirements.txt"
)
GIB = 2**30


class RunError(Exception):
    """A user's mistake or a run that cannot go on; the text is one line: what is wrong and what to do."""


@dataclass(frozen=True)
class World:
    """Place of this process among those of the run. local_rank and local_size count those of this machine only."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_of_environment(local_size: int | None = None) -> World:
    """The place that torchrun, or the flags of a script, wrote into the environment.

    local_size: processes of this machine, where torchrun did not start them. Raises RunError if it is no place.
    """
    # Where nothing says how many processes are on this machine, the safe reading is that all of them are: two
    # processes on one GPU are refused then, instead of sharing it in silence.
    size = _number_of_environment("WORLD_SIZE", 1)
    local_size = local_size or _number_of_environment("LOCAL_WORLD_SIZE", size)
    world = World(_number_of_environment("RANK", 0), size, _number_of_environment("LOCAL_RANK", 0), local_size)
    if not 0 <= world.rank < world.size or not 0 <= world.local_rank < world.local_size:
        raise RunError(
            f"RANK={world.rank} of WORLD_SIZE={world.size}, LOCAL_RANK={world.local_rank} of "
            f"LOCAL_WORLD_SIZE={world.local_size} in the environment do not fit; start the processes with torchrun"
        )
    return world


def _number_of_environment(name, default):
    text = os.environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise RunError(f"{name}={text} in the environment is not a number; unset it, or use torchrun") from None


def choose_device(name: str, world: World, flag: str | None = None, advice: str = "use --device cpu") -> torch.device:
    """The device called `name`: auto, cpu, cuda or cuda:N. A GPU always carries its number.

    "cuda", and "auto" where there is a GPU, mean this process's own: the one with the number of its local rank. "auto"
    says on stderr why a GPU that is there cannot be used. flag: what the user typed (default: "--device <name>");
    advice: what else to do without that GPU. Raises RunError if the device is not there, or if several processes of
    this machine would share it.
    """
    flag = flag or f"--device {name}"
    if name == "auto":
        name = "cuda" if has_gpu() else "cpu"
        if name == "cpu" and (problem := nvidia_problem()) and world.is_main:
            print(f"warning: {problem}; the CPU is used", file=sys.stderr, flush=True)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RunError(f"{flag}: not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"{flag}: only cpu and cuda are supported")
    if device.type == "cpu":
        return torch.device("cpu")
    if device.index is None:
        return numbered_gpu(world.local_rank, flag, advice)
    if world.local_size > 1:
        raise RunError(
            f"{flag}: all {world.local_size} processes of this machine would use that one GPU; leave it out, and each "
            "process takes its own"
        )
    return numbered_gpu(int(name.partition(":")[2]), flag, advice)  # of 3-digit numbers torch.device makes others


def numbered_gpu(index: int, flag: str, advice: str = "use --device cpu") -> torch.device:
    """GPU `index`. flag, advice: as of choose_device. Raises RunError if PyTorch sees no GPU of that number."""
    name, count = f"cuda:{index}", torch.cuda.device_count()
    asked = flag if flag.endswith(name) else f"{flag}, {name}"
    if count == 0 and (problem := nvidia_problem()):
        raise RunError(f"{asked}: {problem}; or {advice}")
    if not 0 <= index < count:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        among = "" if shown is None else f" in CUDA_VISIBLE_DEVICES={shown}"
        raise RunError(f"{asked}: this machine has {count} CUDA device{'' if count == 1 else 's'}{among}; {advice}")
    return torch.device("cuda", index)


def join_processes(world: World, device: torch.device):
    """Make `device` the current one and join the run's process group (nccl or gloo) if there are several processes.

    Raises RunError if CUDA cannot use the device, or the other processes are not reached.
    """
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
        except (RuntimeError, AssertionError) as error:  # an old driver; a GPU that is lost, or full
            reason = nvidia_problem() or _first_line(error)
            raise RunError(f"{device} cannot be used: {reason}; or use --device cpu") from error
    if world.size > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            raise RunError(f"the other processes are not reached: {_first_line(error)}") from error


def fp16_refusal(device_flag: str) -> str | None:
    """Why --amp fp16 cannot be used on the device of this flag, as an error message; None if it can."""
    if not device_flag.startswith("cpu") and has_gpu():
        return None
    problem = None if device_flag.startswith("cpu") else nvidia_problem()
    return f"--amp fp16 needs a GPU{f', and {problem}' if problem else ''}; use --amp bf16 on the CPU"


def nvidia_problem() -> str | None:
    """Why PyTorch cannot use the NVIDIA GPU of this machine, in one line; None if it can, or where there is none.

    Nor is anything said where an empty CUDA_VISIBLE_DEVICES (or -1) hides the GPUs, which is done on purpose. Raises
    RunError if that variable names GPUs that are not there.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown in ("", "-1") or not (NVIDIA_DRIVER.exists() or shutil.which("nvidia-smi")):
        return None
    usable, warning = _ask_pytorch()
    if usable:
        return None
    version, built_for = driver_version(), torch.version.cuda
    build = f"built for CUDA {built_for}" if built_for else "a CPU build"
    found = f"{f'driver {version}' if version else 'no driver answers'}, PyTorch {torch.__version__} {build}"
    cannot = f"PyTorch cannot use this machine's NVIDIA GPU ({found})"
    least = LEAST_DRIVER.get(int(built_for.partition(".")[0]), 0) if built_for else 0
    if not built_for or int(version.partition(".")[0] or 0) < least:
        return f"{cannot}: {WHAT_TO_INSTALL}"
    if NVIDIA_DRIVER.exists() and not NVIDIA_DEVICES.exists():  # /proc is the host's in a container, too
        return f"{cannot}: there is no {NVIDIA_DEVICES}; a container must be started with its GPUs"
    if shown and not warning:
        raise RunError(f"CUDA_VISIBLE_DEVICES={shown} names no GPU of this machine ({found}); see nvidia-smi -L")
    return f"{cannot}: {warning or 'see nvidia-smi'}"


def has_gpu() -> bool:
    """Whether PyTorch can use a GPU. Unlike torch.cuda.is_available it prints nothing: see nvidia_problem."""
    return _ask_pytorch()[0]


def _ask_pytorch():
    """(whether PyTorch can use a GPU, its warning if not, which on a screen takes several lines)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    return usable, _first_line(caught[0].message) if caught else ""


def driver_version() -> str:
    """Version of NVIDIA's driver, such as 535.104.05; "" where it does not tell."""
    try:
        text = (NVIDIA_DRIVER / "version").read_text()
    except OSError:
        try:
            ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            text = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            text = ""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?", text)
    return found[0] if found else ""


@contextlib.contextmanager
def gpu_errors_explained(batch_size: int | None = None, flag: str | None = None):
    """Within it a GPU that is out of memory, or lost, ends the run with one line, a RunError.

    batch_size: of what runs there; flag: which one lowers it. None: there is no batch, or no such flag.
    """
    try:
        yield
    except RuntimeError as error:  # torch's OutOfMemoryError and AcceleratorError are RuntimeErrors, too
        text = _first_line(error)
        # The driver and the libraries say it in words of their own.
        is_full = re.search(r"^CUDA.* out of memory|CU(BLAS|DNN)\w*_ALLOC_FAILED", text)
        if is_full or isinstance(error, torch.cuda.OutOfMemoryError):
            size = "" if batch_size is None else f" with a batch size of {batch_size}"
            lower = "use --device cpu" if flag is None else f"lower {flag}"
            others = "or free what another process has taken (nvidia-smi lists them)"
            raise RunError(f"the GPU is out of memory{size}{_memory_text()}; {lower}, {others}") from error
        if text.startswith(("CUDA error", "CUDA driver error")) and "capturing" not in text:  # which is a bug of ours
            raise RunError(f"the GPU failed: {text.rstrip('.')}; nvidia-smi may say why, --debug says where") from error
        raise


def _memory_text():
    try:
        free, total = torch.cuda.mem_get_info()
        ours = torch.cuda.memory_reserved()
    except Exception:  # a GPU in trouble may refuse this as well, in ways of its own
        return ""
    return f", {free / GIB:.1f} of {total / GIB:.1f} GiB are free and {ours / GIB:.1f} GiB are this process's"


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
