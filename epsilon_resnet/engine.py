"""Processes and devices, the two loops, and how they are shown. Used by every script of this paper."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common.checkpoints import CheckpointError
from common.data import DataError
from epsilon_resnet.averages import top_k_errors, top_ks
from epsilon_resnet.runs import RunError

SIDE_WEIGHT = 0.1
SECONDS_BETWEEN_LINES = 120.0


@dataclass(frozen=True)
class World:
    """Place of this process among those that `torchrun` (or --gpu with several devices) started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def gpu_ids(flag: str | None) -> list[int]:
    """Device numbers of --gpu; [] if it was left out or empty. Raises RunError if it is no comma list of numbers."""
    try:
        ids = [int(word) for word in flag.split(",")] if flag else []
    except ValueError:
        ids = [-1]
    if any(number < 0 for number in ids) or len(set(ids)) != len(ids):
        raise RunError(f"--gpu {flag}: write device numbers with commas between them, such as 0,1")
    return ids


def needs_processes(gpu: str | None, device: str) -> int:
    """How many processes --gpu asks for that are not running yet; 0 if this one is enough.

    Several ids give one process per GPU, or with an explicit --device cpu as many CPU processes.
    """
    count = len(gpu_ids(gpu))
    usable = device == "cpu" or (device in ("auto", "cuda") and torch.cuda.is_available())
    return count if count > 1 and usable and "WORLD_SIZE" not in os.environ else 0


def start_processes(count: int, script: str, argv) -> int:
    """Run the same command in `count` processes (torchrun on this machine); returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", script]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **os.environ}
    return subprocess.run([*command, *words], env=environment).returncode


def join_world(gpu: str | None, device: str) -> tuple[World, torch.device]:
    """The process group of `torchrun` (nccl or gloo), if there is one, and the device of this process.

    gpu: the original's comma list; device: auto, cpu, cuda or cuda:N, which wins over gpu unless it is auto.
    Raises RunError if the device is not there.
    """
    world = World(
        *(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    )
    chosen = _device(world, gpu_ids(gpu), device)
    if chosen.type == "cuda":
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise RunError(f"{chosen}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
        torch.cuda.set_device(chosen)
    if world.size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return world, chosen


def _device(world, ids, name):
    if name == "auto":
        if not torch.cuda.is_available():
            if ids and world.is_main:
                print("warning: no CUDA device here, --gpu is ignored and the CPU used", file=sys.stderr)
            return torch.device("cpu")
        name = "cuda"
    if name == "cuda":
        index = ids[world.local_rank % len(ids)] if ids else world.local_rank
        return torch.device("cuda", index)
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise RunError(f"--device {name}: not a device for this; use auto, cpu, cuda or cuda:N")
    return device


class Meter:
    """Loss and errors of one pass, summed on the device so that no step waits for it."""

    def __init__(self, config, device):
        self.ks = top_ks(config)
        self.sums = torch.zeros(2 + len(self.ks) + 1, dtype=torch.float64, device=device)

    def add(self, loss, output, targets):
        """loss: mean cross entropy of the batch."""
        count = len(targets)
        errors = [top_k_errors(output.logits, targets, k) for k in self.ks]
        side = output.side_logits
        errors.append(errors[0] * 0 if side is None else top_k_errors(side, targets, 1))
        seen = torch.full_like(errors[0], count)
        self.sums += torch.stack([loss.detach().double() * count, seen.double(), *(e.double() for e in errors)])

    def reduce(self):
        if dist.is_initialized():
            dist.all_reduce(self.sums)

    def result(self) -> dict:
        """Mean loss, images seen, errors as fractions: one per k, and `side_error`."""
        loss, seen, *wrong, side = self.sums.tolist()
        seen = max(seen, 1.0)
        return {"loss": loss / seen, "seen": int(seen), "errors": [value / seen for value in wrong],
                "side_error": side / seen}  # fmt: skip

    def text(self) -> str:
        result = self.result()
        return f"loss {result['loss']:.4f}, error {result['errors'][0]:.4f} ({result['seen']} images)"


class Progress:
    """Steps of one pass: a bar on a terminal, else a line now and then and one at the end."""

    def __init__(self, label: str, total: int, meter: Meter, shown: bool = True):
        self.label, self.total, self.meter, self.shown = label, total, meter, shown
        self.step, self.start = 0, time.monotonic()
        self.last_shown = self.start
        self.bar = None
        if shown and sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=f" {label:5}", file=sys.stdout, dynamic_ncols=True, leave=False)

    def advance(self):
        self.step += 1
        if self.bar is not None:
            self.bar.update()
        elif self.shown and time.monotonic() - self.last_shown > SECONDS_BETWEEN_LINES and self.step < self.total:
            self.last_shown = time.monotonic()
            print(f" {self.label:5} {self.step}/{self.total} | {self.last_shown - self.start:.0f}s", flush=True)

    def finish(self):
        """Show the final numbers (of all ranks, if the meter was reduced)."""
        if self.bar is not None:
            self.bar.close()
        if self.shown:
            seconds = time.monotonic() - self.start
            print(f" {self.label:5} {self.step}/{self.total} | {seconds:.1f}s | {self.meter.text()}", flush=True)


def train_one_epoch(model, batches, optimizer, statistics, *, epoch, world, epsilon, decay, amp_dtype=None,
                    scaler=None) -> dict:  # fmt: skip
    """One epoch of steps; returns Meter.result() over all ranks.

    decay: function of the 0-based global step -> weight decay of the first parameter group. Each step's loss is the
    mean over this rank's batch, as in each tower of the original. Raises RunError once a step's loss is seen not to be
    finite (one step later on a GPU, which is not waited for).
    """
    model.train()
    device = batches.device
    meter = Meter(statistics.config, device)
    progress = Progress("train", len(batches), meter, world.is_main)
    first_step, unchecked = (epoch - 1) * len(batches), None
    for step, (images, targets) in enumerate(batches):
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            output = model(images)
        loss = F.cross_entropy(output.logits.float(), targets)
        cost = loss
        if output.side_logits is not None:
            cost = loss + SIDE_WEIGHT * F.cross_entropy(output.side_logits.float(), targets)
        optimizer.param_groups[0]["weight_decay"] = decay(first_step + step)
        _step(cost, optimizer, scaler)
        statistics.update(first_step + step, output, epsilon, loss, targets)
        meter.add(loss, output, targets)
        if device.type == "cpu":
            _require_finite(cost, epoch, step)
        elif unchecked is not None:
            _require_finite(unchecked, epoch, step - 1)
        unchecked = cost.detach()
        progress.advance()
    _require_finite(unchecked, epoch, len(batches) - 1)
    if world.size > 1:  # as in the original: the statistics are those of the first tower
        dist.broadcast(statistics.values, 0)
    meter.reduce()
    progress.finish()
    return meter.result()


def _step(cost, optimizer, scaler):
    optimizer.zero_grad(set_to_none=True)
    if scaler is None:
        cost.backward()
        optimizer.step()
    else:
        scaler.scale(cost).backward()
        scaler.step(optimizer)
        scaler.update()


def _require_finite(loss, epoch, step):
    value = loss.item()
    if value != value or value in (float("inf"), float("-inf")):
        raise RunError(f"the loss is {value} at epoch {epoch}, batch {step}; try smaller rates with --lr_schedule")


@torch.no_grad()
def evaluate(model, batches, *, world=World(), shown=True) -> dict:
    """Meter.result() over the whole test set, each image once, in float32 whatever --amp says.

    Gates act here too, on the test batches: the result belongs to the batch size and the order.
    """
    model.eval()
    if world.size > 1:  # running statistics differ between ranks; rank 0's are the ones that are saved
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    meter = Meter(model.config, batches.device)
    progress = Progress("test", len(batches), meter, shown and world.is_main)
    for images, targets in batches:
        output = model(images)
        meter.add(F.cross_entropy(output.logits, targets), output, targets)
        progress.advance()
    meter.reduce()
    progress.finish()
    return meter.result()


def run_script(main, argv=None) -> int:
    """Run a script's `main`; a user's mistake becomes one line on stderr and exit status 1 (--debug: the traceback).

    Returns the exit status. A process among several of `torchrun` does not return: it ends here.
    """
    status = _status_of(main, argv)
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # Gloo's threads outlive the group; one that frees a tensor while Python shuts down would abort the process.
        os._exit(status)
    return status


def _status_of(main, argv) -> int:
    try:
        return main(argv) or 0
    except (RunError, CheckpointError, DataError) as error:
        if "--debug" in (sys.argv if argv is None else argv):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted; with --auto-resume the same command goes on after the last finished epoch", file=sys.stderr)
        return 130
