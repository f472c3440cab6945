"""Training and testing: processes, device, the two loops, and the lines they print. Used by both scripts."""

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
from s3.capture import LossLog, run_steps
from s3.run import RunError, World, choose_device, join_processes, world_of_environment

FORMATS = {"Time": "6.3f", "Data": "6.3f", "Loss": ".4e", "Acc@1": "6.2f", "Acc@5": "6.2f"}


def join_world(args) -> tuple[World, torch.device]:
    """The process group (torchrun's, or that of --world-size and --rank), if there is one, and this process's device.

    Raises RunError if the device is not there, or the flags of a distributed run do not fit.
    """
    world = world_of_environment(_environment_of_flags(args))
    device = _device(args, world)
    join_processes(world, device)
    return world, device


def _device(args, world):
    gpu = getattr(args, "gpu", None)  # the scripts of one GPU have no such flag
    if gpu is not None:
        if args.device not in ("auto", "cuda", f"cuda:{gpu}"):
            raise RunError(f"--gpu {gpu} and --device {args.device} are two devices; leave one of both out")
        return choose_device(f"cuda:{gpu}", world, f"--gpu {gpu}")
    return choose_device(args.device, world)


def _environment_of_flags(args):
    """--world-size, --rank and --dist-url as the environment that torchrun would have set (env:// wants it set).

    Returns how many processes this machine then has, None where the flags say nothing of it.
    """
    nodes = getattr(args, "world_size", -1)
    if nodes < 2 or "RANK" in os.environ:
        return None
    if not 0 <= args.rank < nodes:
        raise RunError(f"--world-size {nodes} needs --rank 0 to {nodes - 1}, not {args.rank}")
    place = {"RANK": str(args.rank), "WORLD_SIZE": str(nodes), "LOCAL_RANK": "0"}
    if args.dist_url != "env://":
        place["MASTER_ADDR"], place["MASTER_PORT"] = _address(args.dist_url)
    elif "MASTER_ADDR" not in os.environ:
        raise RunError(
            "--dist-url env:// needs MASTER_ADDR and MASTER_PORT in the environment, or give tcp://HOST:PORT"
        )
    os.environ.update(place)
    return 1


def _address(url):
    host, colon, port = url.removeprefix("tcp://").rpartition(":")
    if not url.startswith("tcp://") or not colon or not port.isdigit():
        raise RunError(f"--dist-url must be tcp://HOST:PORT or env://, not {url}; or start the processes with torchrun")
    return host, port


def processes_to_start(args) -> int:
    """How many processes --multiprocessing-distributed wants on this node; 0: this one goes on alone.

    Raises RunError if the flags name one GPU, which all of them would use.
    """
    wanted = getattr(args, "multiprocessing_distributed", False) and "LOCAL_RANK" not in os.environ
    if not wanted or args.device.startswith("cpu") or torch.cuda.device_count() < 2:
        return 0
    one = f"--gpu {args.gpu}" if args.gpu is not None else f"--device {args.device}"
    if args.gpu is not None or args.device not in ("auto", "cuda"):
        raise RunError(f"{one} names one GPU, --multiprocessing-distributed uses all of them; leave one of both out")
    return torch.cuda.device_count()


def start_processes(args, count: int) -> int:
    """Run this script `count` times, one per GPU of this node; returns the largest exit status."""
    numbers = {"WORLD_SIZE": args.world_size, "RANK": args.rank}
    if args.dist_url == "env://":  # as in the original, -1 means the environment's number, of nodes
        numbers = {name: int(os.environ.get(name, at)) if at == -1 else at for name, at in numbers.items()}
    nodes, node = max(1, numbers["WORLD_SIZE"]), max(0, numbers["RANK"])
    if nodes == 1:  # the default address is a multicast one, which PyTorch no longer supports
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = ("127.0.0.1", str(free.getsockname()[1]))
    elif args.dist_url == "env://":
        address = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    else:
        address = _address(args.dist_url)
    children = []
    for local in range(count):
        place = {"RANK": str(node * count + local), "WORLD_SIZE": str(nodes * count), "LOCAL_RANK": str(local),
                 "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": address[0], "MASTER_PORT": address[1]}  # fmt: skip
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

    def result(self) -> tuple[float, float, float, int]:
        """Mean loss, top-1 and top-5 in percent, images seen."""
        loss_sum, correct, correct5, seen = self.sums.tolist()
        seen = max(seen, 1.0)
        return loss_sum / seen, 100.0 * correct / seen, 100.0 * correct5 / seen, int(seen)


@dataclass(frozen=True)
class Result:
    """Of one pass: mean loss, accuracies in percent, images seen, seconds."""

    loss: float
    top1: float
    top5: float
    seen: int
    seconds: float


def progress_line(prefix: str, step: int, total: int, meters: dict[str, tuple[float, float]]) -> str:
    """The original's line of batch `step`, from 0, of `total`; meters: name -> (value, mean), in the line's order."""
    fields = [f"{name} {now:{FORMATS[name]}} ({mean:{FORMATS[name]}})" for name, (now, mean) in meters.items()]
    return "\t".join([f"{prefix}[{step:{len(str(total))}d}/{total}]", *fields])


def summary_line(top1: float, top5: float) -> str:
    """The original's line after a test; accuracies in percent."""
    return f" * Acc@1 {top1:.3f} Acc@5 {top5:.3f}"


class BatchLines:
    """Prints progress_line of every `every`-th batch; shown=False: nothing."""

    def __init__(self, prefix: str, total: int, every: int, shown: bool):
        self.prefix, self.total, self.every, self.shown = prefix, total, every, shown
        self.start = self.last = time.monotonic()
        self.loading = self.loading_sum = 0.0

    def loaded(self):
        """The batch has arrived."""
        self.loading = time.monotonic() - self.last
        self.loading_sum += self.loading

    def advance(self, step: int, loss_sum, logits, targets, meter: Meter):
        """The batch is done; meter: with it."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        if not self.shown or step % self.every:
            return
        batch, count = Meter(logits.device), step + 1
        batch.add(loss_sum, logits, targets)
        meters = {"Time": (seconds, (now - self.start) / count)}
        if self.prefix.startswith("Epoch"):
            meters["Data"] = self.loading, self.loading_sum / count
        pairs = zip(batch.result()[:3], meter.result()[:3], strict=True)
        meters.update(zip(("Loss", "Acc@1", "Acc@5"), pairs, strict=True))
        print(progress_line(self.prefix, step, self.total, meters), flush=True)


@dataclass
class StepOptions:
    """What a training step does besides: mixed precision, and a regulariser, which the printed loss leaves out."""

    amp_dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    regulariser: Callable[[], torch.Tensor] | None = None


class TrainingStep:
    """What happens to a batch: forward, loss, backward, update, count. Nothing here waits for the device.

    Each step's loss is the mean over the global batch, so that the number of ranks does not change the gradient. The
    tensors stay where they are from epoch to epoch, so that a recorded step can be replayed.
    """

    def __init__(self, model, optimizer, device, options: StepOptions, *, world):
        self.model, self.optimizer, self.device = model, optimizer, torch.device(device)
        self.options, self.world = options, world
        self.meter, self.losses = Meter(device), LossLog(device)

    def rates(self) -> tuple:
        """What the host decides before a step, and a recording of it fixes."""
        return tuple(group["lr"] for group in self.optimizer.param_groups)

    def __call__(self, images, targets, batch_size):
        """batch_size: images of this step over all processes. Returns the summed loss, logits and targets."""
        options = self.options
        with torch.autocast(self.device.type, options.amp_dtype, enabled=options.amp_dtype is not None):
            logits = logits_of(self.model(images))
        loss_sum = F.cross_entropy(logits.float(), targets, reduction="sum")
        loss = loss_sum * (self.world.size / batch_size)  # DDP averages gradients over ranks
        if options.regulariser is not None:
            loss = loss + options.regulariser()
        _update(loss, self.optimizer, options.scaler)
        self.losses.add(loss)
        self.meter.add(loss_sum, logits.detach(), targets)
        return loss_sum.detach(), logits.detach(), targets


def train_one_epoch(step: TrainingStep, loader, lines, *, epoch, graph=None) -> Result:
    """One pass over the training set.

    graph: replays the step as a CUDA graph. Raises RunError once a loss is seen not to be finite, up to 100 steps later
    on a GPU, which is not waited for.
    """
    start = time.monotonic()
    step.model.train()
    step.meter.start()
    step.losses.start(len(loader))
    for number, found in enumerate(run_steps(step, loader, graph=graph, kind=step.rates, loaded=lines.loaded)):
        if (bad := step.losses.first_bad(number + 1)) is not None:
            raise RunError(f"the loss is {bad[1]} at epoch {epoch}, batch {bad[0]}; try a smaller --lr")
        lines.advance(number, *found, step.meter)
    step.meter.reduce()
    return Result(*step.meter.result(), time.monotonic() - start)


def _update(loss, optimizer, scaler):
    optimizer.zero_grad(set_to_none=True)
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


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
    meter, start = Meter(loader.device), time.monotonic()

    def test(images, targets, _):
        logits = logits_of(model(images))
        loss_sum = F.cross_entropy(logits, targets, reduction="sum")
        meter.add(loss_sum, logits, targets)
        return images, logits, loss_sum, targets

    if graph is not None:
        graph.forget()
    loaded = (lambda: None) if lines is None else lines.loaded
    for step, (images, logits, loss_sum, targets) in enumerate(run_steps(test, loader, graph=graph, loaded=loaded)):
        if lines is not None:
            lines.advance(step, loss_sum, logits, targets, meter)
        if compare is not None:
            compare(images, logits)
    meter.reduce()
    return Result(*meter.result(), time.monotonic() - start)


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
    except OSError as error:  # of the system: a folder that may not be read, a port in use
        if "--debug" in (sys.argv if argv is None else argv):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted; --auto-resume goes on after the last finished epoch", file=sys.stderr)
        return 130
