"""Training and testing: data, device, the two loops, and how they are shown. Used by main.py and eval.py."""

import contextlib
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common.checkpoints import CheckpointError
from common.data import DataError, TensorLoader, load_dataset, load_digits_set
from common.kernels import without_tf32
from shiftresnet.capture import LossLog, run_steps
from shiftresnet.models import NUM_CLASSES
from shiftresnet.modules import ShiftConv
from shiftresnet.run import (
    RunError,
    World,
    choose_device,
    gpu_errors_explained,
    join_processes,
    world_of_environment,
)

# As in the original, for CIFAR-10 and CIFAR-100 alike.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
TEST_BATCH_SIZE = {"cuda": 1000, "cpu": 50}  # on a CPU larger activations leave its cache, and come as fresh pages
SECONDS_BETWEEN_LINES = 120.0


def join_world(device_flag: str) -> tuple[World, torch.device]:
    """The process group of `torchrun` (nccl or gloo), if there is one, and the device of this process.

    Raises RunError if the device is not there.
    """
    world = world_of_environment()
    device = choose_device(device_flag, world)
    join_processes(world, device)
    return world, device


def load_split(dataset: str, data_dir: str, split: str, embedded: bool, size: int | None = None):
    """One split of CIFAR (or of the embedded digits, 32x32 RGB), its first `size` images if given."""
    if embedded:
        images = load_digits_set(split, channels=3, size=32)
    else:
        images = load_dataset(dataset, data_dir, split=split)
    return images if size is None else images.subset(size)


def test_loader(images, device, world=World(), channels_last=False) -> TensorLoader:
    return TensorLoader(
        images,
        TEST_BATCH_SIZE[torch.device(device).type],
        train=False,
        mean=MEAN,
        std=STD,
        device=device,
        rank=world.rank,
        world_size=world.size,
        channels_last=channels_last,
    )


class Meter:
    """Running loss and accuracy, summed on the device so that no step waits for it."""

    def __init__(self, device):
        # float32 sums of losses would drift over an epoch; MPS aside, every device has float64
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def start(self):
        """Begin anew, in the same tensor: a recorded step goes on writing there."""
        self.sums.zero_()

    def add(self, loss_sum, logits, targets):
        correct = (logits.argmax(1) == targets).sum()
        seen = torch.full_like(correct, targets.numel())
        self.sums += torch.stack([loss_sum.detach().double(), correct.double(), seen.double()])

    def reduce(self):
        if dist.is_initialized():
            dist.all_reduce(self.sums)

    def result(self) -> tuple[float, float, int, int]:
        """Mean loss, accuracy in percent, correct, seen."""
        loss_sum, correct, seen = self.sums.tolist()
        seen = max(seen, 1.0)
        return loss_sum / seen, 100.0 * correct / seen, int(correct), int(seen)

    def text(self) -> str:
        return "Loss: {:.3f} | Acc: {:.3f}% ({}/{})".format(*self.result())


class Progress:
    """Steps of one pass: a bar on a terminal, else a line now and then and one at the end."""

    def __init__(self, label: str, total: int, meter: Meter, shown: bool = True):
        self.label, self.total, self.meter, self.shown = label, total, meter, shown
        self.step, self.start = 0, time.monotonic()
        self.last_shown = self.start
        self.bar = None
        if shown and sys.stdout.isatty():
            from tqdm import tqdm

            layout = "{desc} [{bar}] {n_fmt}/{total_fmt} | Tot: {elapsed}{postfix}"
            self.bar = tqdm(
                total=total, desc=f" {label:5}", bar_format=layout, ascii=".>=", file=sys.stdout, dynamic_ncols=True
            )

    def advance(self):
        self.step += 1
        if not self.shown:
            return
        now, last = time.monotonic(), self.step == self.total
        if self.bar is not None:
            if last or now - self.last_shown > 0.5:
                self.last_shown = now
                self.bar.set_postfix_str(self.meter.text(), refresh=False)
            self.bar.update()
        elif now - self.last_shown > SECONDS_BETWEEN_LINES and not last:
            self.last_shown = now
            print(
                f" {self.label:5} {self.step}/{self.total} | Tot: {now - self.start:.0f}s | {self.meter.text()}",
                flush=True,
            )

    def finish(self):
        """Show the final numbers (of all ranks, if the meter was reduced)."""
        if self.bar is not None:
            self.bar.set_postfix_str(self.meter.text(), refresh=True)
            self.bar.close()
        elif self.shown:
            seconds = time.monotonic() - self.start
            print(f" {self.label:5} {self.step}/{self.total} | Tot: {seconds:.1f}s | {self.meter.text()}", flush=True)


class TrainingStep:
    """What happens to a batch: forward, loss, backward, update, count. Nothing here waits for the device.

    Each step's loss is the mean over the global batch, so that the number of ranks does not change the gradient. The
    tensors stay where they are from epoch to epoch, so that a recorded step can be replayed.
    """

    def __init__(self, model, optimizer, device, *, world, amp_dtype=None, scaler=None):
        self.model, self.optimizer, self.device = model, optimizer, torch.device(device)
        self.world, self.amp_dtype, self.scaler = world, amp_dtype, scaler
        self.meter, self.losses = Meter(device), LossLog(device)

    def rates(self) -> tuple:
        """What the host decides before a step, and a recording of it fixes."""
        return tuple(group["lr"] for group in self.optimizer.param_groups)

    def __call__(self, images, targets, batch_size):
        """batch_size: images of this step over all processes."""
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            logits = self.model(images)
        loss_sum = F.cross_entropy(logits.float(), targets, reduction="sum")
        loss = loss_sum * (self.world.size / batch_size)  # DDP averages gradients over ranks
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.meter.add(loss_sum, logits, targets)
        self.losses.add(loss_sum)


def train_one_epoch(step: TrainingStep, loader, *, epoch, graph=None) -> tuple[float, float]:
    """One pass over the training set. Returns mean loss and top-1 in percent over all ranks.

    graph: replays the step as a CUDA graph. Raises RunError once a step's loss is seen not to be finite, up to 100
    steps later on a GPU, which is not waited for.
    """
    step.model.train()
    step.meter.start()
    step.losses.start(len(loader))
    progress = Progress("train", len(loader), step.meter, step.world.is_main)
    for done, _ in enumerate(run_steps(step, loader, graph=graph, kind=step.rates), start=1):
        if (bad := step.losses.first_bad(done)) is not None:
            raise RunError(f"the loss is {bad[1]} at epoch {epoch}, batch {bad[0]}; try a smaller --lr")
        progress.advance()
    step.meter.reduce()
    progress.finish()
    return step.meter.result()[:2]


@contextlib.contextmanager
def fused_shifts(model: nn.Module):
    """Within it the network's shift blocks run fused: see `ShiftConv.fuse`. Yields the memory format for its images.

    On a CPU that is channels-last, which the fused kernel wants; a network without shifts stays as it is.
    """
    blocks = [module for module in model.modules() if isinstance(module, ShiftConv)]
    try:
        for block in blocks:
            block.fuse()
        on_cpu = blocks and blocks[0].conv1.weight.is_cpu
        yield torch.channels_last if on_cpu else torch.preserve_format
    finally:
        for block in blocks:
            block.unfuse()


@gpu_errors_explained(TEST_BATCH_SIZE["cuda"])
@without_tf32()
@torch.no_grad()
def evaluate(model: nn.Module, loader, *, world=World()) -> tuple[float, float]:
    """Mean loss and top-1 in percent over the whole test set, each image once, in float32 whatever --amp says."""
    model.eval()
    if world.size > 1:  # running statistics differ between ranks; rank 0's are the ones that are saved
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    meter = Meter(loader.device)
    progress = Progress("test", len(loader), meter, world.is_main)
    with fused_shifts(model) as memory_format:
        for images, targets in loader:
            logits = model(images.to(memory_format=memory_format))
            meter.add(F.cross_entropy(logits, targets, reduction="sum"), logits, targets)
            progress.advance()
    meter.reduce()
    progress.finish()
    return meter.result()[:2]


def require_classes(config, dataset: str):
    """Raises RunError unless the network has as many outputs as the data set has classes."""
    if config.num_classes != NUM_CLASSES[dataset]:
        fitting = [name for name, count in NUM_CLASSES.items() if count == config.num_classes]
        advice = f"use --dataset={fitting[0]}" if fitting else "no data set here has as many"
        raise RunError(f"the network has {config.num_classes} classes, {dataset} has {NUM_CLASSES[dataset]}; {advice}")


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
        main(argv)
        return 0
    except (RunError, CheckpointError, DataError) as error:
        if "--debug" in (sys.argv if argv is None else argv):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on after the last finished epoch", file=sys.stderr)
        return 130
