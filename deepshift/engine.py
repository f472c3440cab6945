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
from common.kernels import without_tf32
from deepshift.capture import LossLog, run_steps
from deepshift.optim import after_replay
from deepshift.run import RunError, World, choose_device, join_processes, world_of_environment


def join_world(args) -> tuple[World, torch.device]:
    """The process group (torchrun's, or that of --world-size and --rank), if there is one, and this process's device.

    Raises RunError if the device is not there, or the flags of a distributed run do not fit.
    """
    world = world_of_environment(_environment_of_flags(args))
    device = _device(args, world)
    join_processes(world, device)
    return world, device


def _device(args, world):
    if getattr(args, "no_cuda", False):
        if args.device not in ("auto", "cpu"):
            raise RunError(f"--no-cuda and --device {args.device} are two devices; leave one of both out")
        return choose_device("cpu", world)
    gpu = getattr(args, "gpu", None)  # the scripts of one GPU have no such flag
    if gpu is not None:
        if args.device not in ("auto", "cuda", f"cuda:{gpu}"):
            raise RunError(f"--gpu {gpu} and --device {args.device} are two devices; leave one of both out")
        return choose_device(f"cuda:{gpu}", world, f"--gpu {gpu}")
    return choose_device(args.device, world)


def _environment_of_flags(args):
    """--world-size, --rank and --dist-url as the environment that torchrun would have set.

    Returns how many processes this machine then has, None where the flags say nothing of it.
    """
    nodes = getattr(args, "world_size", -1)
    if nodes < 2 or "RANK" in os.environ:
        return None
    if not 0 <= args.rank < nodes:
        raise RunError(f"--world-size {nodes} needs --rank 0 to {nodes - 1}, not {args.rank}")
    host, port = _address(args.dist_url)
    os.environ.update(RANK=str(args.rank), WORLD_SIZE=str(nodes), LOCAL_RANK="0", MASTER_ADDR=host, MASTER_PORT=port)
    return 1


def _address(url):
    host, colon, port = url.removeprefix("tcp://").rpartition(":")
    if not url.startswith("tcp://") or not colon or not port.isdigit():
        raise RunError(f"--dist-url must be tcp://HOST:PORT, not {url}; or start the processes with torchrun")
    return host, port


def processes_to_start(args) -> int:
    """How many processes --multiprocessing-distributed wants on this node; 0: this one goes on alone.

    Raises RunError if the flags name one GPU, which all of them would use.
    """
    wanted = getattr(args, "multiprocessing_distributed", False) and "RANK" not in os.environ
    if not wanted or args.device.startswith("cpu") or torch.cuda.device_count() < 2:
        return 0
    one = f"--gpu {args.gpu}" if args.gpu is not None else f"--device {args.device}"
    if args.gpu is not None or args.device not in ("auto", "cuda"):
        raise RunError(f"{one} names one GPU, --multiprocessing-distributed uses all of them; leave one of both out")
    return torch.cuda.device_count()


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
                 "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": host, "MASTER_PORT": port}  # fmt: skip
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

    def start(self):
        """Begin anew, in the same tensor: a recorded step goes on writing there."""
        self.sums.zero_()

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


class TrainingStep:
    """What happens to a batch: forward, loss, backward, update, count. Nothing here waits for the device.

    Each step's loss is the mean over the global batch, so that the number of ranks does not change the gradient. An
    update follows every `batch_multiplier` batches, and the last batch. The tensors stay where they are from epoch to
    epoch, so that a recorded step can be replayed.
    """

    def __init__(self, model, optimizer, device, options: StepOptions, *, world):
        self.model, self.optimizer, self.device = model, optimizer, torch.device(device)
        self.options, self.world = options, world
        self.meter, self.losses = Meter(device), LossLog(device)
        self.number = self.steps = 0

    def start(self, steps: int):
        """An epoch of so many steps begins."""
        self.model.train()
        self.meter.start()
        self.losses.start(steps)
        self.number, self.steps = 0, steps
        self.optimizer.zero_grad(set_to_none=True)

    def rates(self) -> tuple:
        """What the host decides before a step, and a recording of it fixes."""
        return tuple(group["lr"] for group in self.optimizer.param_groups)

    def __call__(self, images, targets, batch_size):
        """batch_size: images of this step over all processes. Returns the loss that is shown, logits and targets."""
        options, many = self.options, self.options.batch_multiplier
        with torch.autocast(self.device.type, options.amp_dtype, enabled=options.amp_dtype is not None):
            logits = logits_of(self.model(images))
        loss_sum = F.cross_entropy(logits.float(), targets, reduction="sum")
        loss = loss_sum * (self.world.size / batch_size)  # DDP averages gradients over ranks
        if options.regulariser is not None:
            extra = options.regulariser()
            loss = loss + extra
            if options.logs_regulariser:
                loss_sum = loss_sum + extra * targets.numel()
        self.number += 1
        is_update = self.number % many == 0 or self.number == self.steps
        _backward(loss / many if many > 1 else loss, self.optimizer, options.scaler, is_update)
        logged = loss_sum.detach() / many
        self.meter.add(logged, logits.detach(), targets)
        self.losses.add(logged)
        return logged, logits.detach(), targets


@without_tf32()
def train_one_epoch(step: TrainingStep, loader, lines, *, epoch, graph=None) -> Result:
    """One pass over the training set.

    graph: replays the step as a CUDA graph. Raises RunError once a loss is seen not to be finite, up to 100 steps later
    on a GPU, which is not waited for.
    """
    start = time.monotonic()
    step.start(len(loader))
    for number, found in enumerate(run_steps(step, loader, graph=graph, kind=step.rates, loaded=lines.loaded)):
        if graph is not None:
            after_replay(step.optimizer)
        if (bad := step.losses.first_bad(number + 1)) is not None:
            raise RunError(f"the loss is {bad[1]} at epoch {epoch}, batch {bad[0]}; try a smaller --lr")
        lines.advance(number, *found, step.meter)
    last = found[0].item() / found[2].numel()
    step.meter.reduce()
    return Result(*step.meter.result(), (time.monotonic() - start) / len(loader), len(loader), last)


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


@without_tf32()
@torch.no_grad()
def evaluate(
    model: nn.Module, loader, lines=None, *, world=World(), compare: Callable | None = None, graph=None
) -> Result:
    """Loss and accuracies over the whole test set, each image once, in float32 whatever --amp says.

    compare: called with (images, logits) of every batch. graph: replays the step of a batch as a CUDA graph.
    """
    model.eval()
    if world.size > 1:  # running statistics differ between ranks; rank 0's are the ones that are saved
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    meter, seconds = Meter(loader.device), 0.0
    start = time.monotonic()

    def test(images, targets, _):
        logits = logits_of(model(images))
        loss_sum = F.cross_entropy(logits, targets, reduction="sum")
        meter.add(loss_sum, logits, targets)
        return images, logits, loss_sum, targets

    if graph is not None:
        graph.forget()
    for step, (images, logits, loss_sum, targets) in enumerate(run_steps(test, loader, graph=graph)):
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
        if "--debug" in (sys.argv if argv is None else argv):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted; --auto-resume goes on after the last finished epoch", file=sys.stderr)
        return 130
