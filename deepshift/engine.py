"""Training and testing: processes, device, the two loops, and the lines they print. Used by the three scripts."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common.checkpoints import CheckpointError
from common.data import DataError
from deepshift.runs import RunError


@dataclass(frozen=True)
class World:
    """Place of this process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(args) -> tuple[World, torch.device]:
    """The process group (torchrun's, or that of --world-size and --rank), if there is one, and this process's device.

    Raises RunError if the device is not there, or the flags of a distributed run do not fit.
    """
    _environment_of_flags(args)
    world = World(*(int(os.environ.get(name, at)) for name, at in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))
    device = _device(args, world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return world, device


def _device(args, world):
    name = args.device
    if getattr(args, "no_cuda", False):
        name = "cpu"
    elif getattr(args, "gpu", None) is not None:
        name = f"cuda:{args.gpu}"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world.size > 1:
        name = f"cuda:{world.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RunError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(f"{name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def _environment_of_flags(args):
    """--world-size, --rank and --dist-url as the environment that torchrun would have set."""
    nodes = getattr(args, "world_size", -1)
    if nodes < 2 or "RANK" in os.environ:
        return
    if not 0 <= args.rank < nodes:
        raise RunError(f"--world-size {nodes} needs --rank 0 to {nodes - 1}, not {args.rank}")
    host, port = _address(args.dist_url)
    os.environ.update(RANK=str(args.rank), WORLD_SIZE=str(nodes), LOCAL_RANK="0", MASTER_ADDR=host, MASTER_PORT=port)


def _address(url):
    host, colon, port = url.removeprefix("tcp://").rpartition(":")
    if not url.startswith("tcp://") or not colon or not port.isdigit():
        raise RunError(f"--dist-url must be tcp://HOST:PORT, not {url}; or start the processes with torchrun")
    return host, port


def processes_to_start(args) -> int:
    """How many processes --multiprocessing-distributed wants on this node; 0: this one goes on alone."""
    wanted = getattr(args, "multiprocessing_distributed", False) and "RANK" not in os.environ
    return torch.cuda.device_count() if wanted and args.device != "cpu" and torch.cuda.device_count() > 1 else 0


def start_processes(args, count: int) -> int:
    """Run this script `count` times, one per GPU of this node; returns the largest exit status."""
    nodes, node = max(1, args.world_size), max(0, args.rank)
    host, port = _address(args.dist_url)
    if nodes == 1:  # the default address is a multicast one, which PyTorch no longer supports
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            host, port = "127.0.0.1", str(free.getsockname()[1])
    children = []
    for local in range(count):
        place = {"RANK": str(node * count + local), "WORLD_SIZE": str(nodes * count), "LOCAL_RANK": str(local),
                 "MASTER_ADDR": host, "MASTER_PORT": port}  # fmt: skip
        command = [sys.executable, sys.argv[0], *args.command[1:]]
        children.append(subprocess.Popen(command, env={**os.environ, **place}))
    try:
        return max(abs(child.wait()) for child in children)
    finally:
        for child in children:
            child.terminate()


class Meter:
    """Running loss and accuracies, summed on the device so that no step waits for it."""

    def __init__(self, device):
        # float32 sums of losses would drift over an epoch
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, loss_sum, logits, targets):
        hits = logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]
        seen = torch.full_like(loss_sum, targets.numel())
        self.sums += torch.stack([loss_sum.detach(), hits[:, 0].sum(), hits.sum(), seen.detach()]).double()

    def reduce(self):
        if dist.is_initialized():
            dist.all_reduce(self.sums)

    def result(self) -> tuple[float, float, float, int, int]:
        """Mean loss, top-1 and top-5 in percent, correct, seen."""
        loss_sum, correct, correct5, seen = self.sums.tolist()
        seen = max(seen, 1.0)
        return loss_sum / seen, 100.0 * correct / seen, 100.0 * correct5 / seen, int(correct), int(seen)


@dataclass(frozen=True)
class Result:
    """Of one pass: mean loss, accuracies in percent, mean seconds per batch, loss of the last batch."""

    loss: float
    top1: float
    top5: float
    correct: int
    seen: int
    seconds: float
    batches: int
    last_loss: float


class BatchLines:
    """The original's line of a batch: time, loss and accuracies, each with its mean since the epoch began."""

    def __init__(self, prefix: str, total: int, every: int, *, top5: bool, shown: bool):
        self.prefix, self.total, self.every, self.top5, self.shown = prefix, total, every, top5, shown
        self.start = self.last = time.monotonic()
        self.loading = self.loading_sum = self.seconds = 0.0
        self.is_training = prefix.startswith("Epoch")

    def loaded(self):
        """The batch has arrived."""
        self.loading = time.monotonic() - self.last
        self.loading_sum += self.loading

    def advance(self, step: int, loss_sum, logits, targets, meter: Meter):
        now = time.monotonic()
        self.seconds, self.last = now - self.last, now
        if self.shown and step % self.every == 0:
            print(self._text(step, loss_sum, logits, targets, meter), flush=True)

    def _text(self, step, loss_sum, logits, targets, meter):
        batch = Meter(logits.device)
        batch.add(loss_sum, logits, targets)
        now, mean, count = batch.result(), meter.result(), step + 1
        width = len(str(self.total))
        fields = [f"{self.prefix}[{step:{width}d}/{self.total}]",
                  f"Time {self.seconds:6.3f} ({(self.last - self.start) / count:6.3f})"]  # fmt: skip
        if self.is_training:
            fields.append(f"Data {self.loading:6.3f} ({self.loading_sum / count:6.3f})")
        fields += [f"Loss {now[0]:.4e} ({mean[0]:.4e})", f"Acc@1 {now[1]:6.2f} ({mean[1]:6.2f})"]
        if self.top5:
            fields.append(f"Acc@5 {now[2]:6.2f} ({mean[2]:6.2f})")
        return "\t".join(fields)


class MnistLines:
    """The original's line every --log-interval batches of MNIST training; shown=False: none (testing has none)."""

    def __init__(self, epoch: int, loader, every: int, shown: bool):
        self.epoch, self.loader, self.every, self.shown = epoch, loader, every, shown
        self.seen = 0

    def loaded(self):
        pass

    def advance(self, step, loss_sum, logits, targets, meter):
        if self.shown and step % self.every == 0:
            total, part = self.loader.num_images, 100.0 * step / len(self.loader)
            loss = loss_sum.item() / targets.numel()
            print(f"Train Epoch: {self.epoch} [{self.seen}/{total} ({part:.0f}%)]\tLoss: {loss:.6f}", flush=True)
        self.seen += self.loader.batch_sizes[step]


@dataclass
class StepOptions:
    """What a training step does besides: mixed precision, accumulation over batches, a regulariser."""

    amp_dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    batch_multiplier: int = 1
    regulariser: Callable[[], torch.Tensor] | None = None
    logs_regulariser: bool = False


def train_one_epoch(model, loader, optimizer, lines, options: StepOptions, *, epoch, world) -> Result:
    """One pass over the training set.

    Each step's loss is the mean over the global batch, so that the number of ranks does not change the gradient.
    An update follows every `batch_multiplier` batches, and the last batch. Raises RunError once a loss is seen not to
    be finite (one step later on a GPU, which is not waited for).
    """
    model.train()
    device, many = loader.device, options.batch_multiplier
    meter, start, unchecked = Meter(device), time.monotonic(), None
    optimizer.zero_grad(set_to_none=True)
    for step, ((images, targets), batch_size) in enumerate(zip(loader, loader.batch_sizes, strict=True)):
        lines.loaded()
        with torch.autocast(device.type, options.amp_dtype, enabled=options.amp_dtype is not None):
            logits = logits_of(model(images))
        loss_sum = F.cross_entropy(logits.float(), targets, reduction="sum")
        loss = loss_sum * (world.size / batch_size)  # DDP averages gradients over ranks
        if options.regulariser is not None:
            extra = options.regulariser()
            loss = loss + extra
            if options.logs_regulariser:
                loss_sum = loss_sum + extra * targets.numel()
        is_update = (step + 1) % many == 0 or step + 1 == len(loader)
        _backward(loss / many if many > 1 else loss, optimizer, options.scaler, is_update)
        logged = loss_sum.detach() / many
        meter.add(logged, logits.detach(), targets)
        if unchecked is not None and device.type != "cpu":
            _require_finite(unchecked, epoch, step - 1)
        elif device.type == "cpu":
            _require_finite(logged, epoch, step)
        unchecked = logged
        lines.advance(step, logged, logits.detach(), targets, meter)
    _require_finite(unchecked, epoch, len(loader) - 1)
    last = unchecked.item() / targets.numel()
    meter.reduce()
    return Result(*meter.result(), (time.monotonic() - start) / len(loader), len(loader), last)


def _backward(loss, optimizer, scaler, is_update):
    (loss if scaler is None else scaler.scale(loss)).backward()
    if not is_update:
        return
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)


def logits_of(output):
    """GoogLeNet and Inception also return the outputs of their side branches while they train."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _require_finite(loss, epoch, step):
    value = loss.item()
    if value != value or value in (float("inf"), float("-inf")):
        raise RunError(f"the loss is {value} at epoch {epoch}, batch {step}; try a smaller --lr")


@torch.no_grad()
def evaluate(model: nn.Module, loader, lines=None, *, world=World(), compare: Callable | None = None) -> Result:
    """Loss and accuracies over the whole test set, each image once, in float32 whatever --amp says.

    compare: called with (images, logits) of every batch.
    """
    model.eval()
    if world.size > 1:  # running statistics differ between ranks; rank 0's are the ones that are saved
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    meter, seconds = Meter(loader.device), 0.0
    start = time.monotonic()
    for step, (images, targets) in enumerate(loader):
        logits = logits_of(model(images))
        loss_sum = F.cross_entropy(logits, targets, reduction="sum")
        meter.add(loss_sum, logits, targets)
        if lines is not None:
            lines.loaded()
            lines.advance(step, loss_sum, logits, targets, meter)
        if compare is not None:
            seconds += _timed(compare, images, logits)
    last = loss_sum.item() / targets.numel()
    meter.reduce()
    return Result(*meter.result(), (time.monotonic() - start - seconds) / len(loader), len(loader), last)


def _timed(function, *arguments):
    start = time.monotonic()
    function(*arguments)
    return time.monotonic() - start


def run_script(main, argv=None) -> int:
    """Run a script's `main`; a user's mistake becomes one line on stderr and exit status 1 (--debug: the traceback).

    Returns the exit status. A process among several does not return: it ends here.
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
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted; --auto-resume goes on after the last finished epoch", file=sys.stderr)
        return 130
