"""Training and testing: data, device, the two loops, and how they are shown. Used by all train_* and eval_* scripts."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common.checkpoints import CheckpointError
from common.data import (
    DataError,
    ImageFolderLoader,
    TensorLoader,
    load_dataset,
    load_digits_set,
    write_digits_folder,
)
from shared_bases.models import NUM_CLASSES
from shared_bases.regulariser import similarity_terms
from shared_bases.runs import RunError

# As in the original: CIFAR-10 is normalised with ImageNet's constants.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALISATION = {"cifar10": IMAGENET, "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)), "ilsvrc": IMAGENET}
SECONDS_BETWEEN_LINES = 120.0


@dataclass(frozen=True)
class World:
    """Place of this process among those that `torchrun` started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def show_devices(visible_device: str):
    """Set CUDA_VISIBLE_DEVICES as --visible_device says; its default "0" gives way to a value that is set already."""
    if visible_device != "0" or not os.environ.get("CUDA_VISIBLE_DEVICES"):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_device


def join_world(device_flag: str) -> tuple[World, torch.device]:
    """The process group of `torchrun` (nccl or gloo), if there is one, and the device of this process.

    Raises RunError if the device is not there.
    """
    world = World(
        *(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    )
    name = device_flag
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world.size > 1:
        name = f"cuda:{world.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RunError(f"--device {device_flag}: not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"--device {device_flag}: only cpu and cuda are supported")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise RunError(
                f"--device {name}: {torch.cuda.device_count()} CUDA devices are visible; give more of them with "
                "--visible_device=0,1,… or use --device cpu"
            )
        torch.cuda.set_device(device)
    if world.size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return world, device


def make_loader(args, train: bool, device: torch.device, world=World(), *, seed: int = 0, channels_last=False):
    """Loader of the training or test images of args.dataset, or of the embedded digits in the same form.

    args: dataset, data_dir, embedded_data, batch_size (over all processes); ILSVRC2012 also image_size and workers;
    training also train_size. Raises DataError if the data cannot be used, RunError if there are too few images.
    """
    mean, std = NORMALISATION[args.dataset]
    limit = args.train_size if train else None
    options = {
        "train": train,
        "mean": mean,
        "std": std,
        "seed": seed,
        "device": device,
        "rank": world.rank,
        "world_size": world.size,
        "channels_last": channels_last,
    }
    try:
        if args.dataset == "ilsvrc":
            return _folder_loader(args, limit, options)
        split = "train" if train else "test"
        if args.embedded_data:
            images = load_digits_set(split, channels=3, size=32)
        else:
            images = load_dataset(args.dataset, args.data_dir, split=split)
        images = images if limit is None else images.subset(limit)
        crop = {"pad": 4, "flip": True} if train else {}
        return TensorLoader(images, args.batch_size, **crop, **options)
    except ValueError as error:  # more processes than images
        raise RunError(f"{error}; use fewer processes or a larger --batch_size") from None


def _folder_loader(args, limit, options):
    root = Path(args.data_dir)
    if args.embedded_data:
        root = write_digits_folder((root if root.is_dir() else Path("data")) / "digits")
    loader = ImageFolderLoader(
        root, args.batch_size, size=args.image_size, workers=args.workers, limit=limit, **options
    )
    if len(loader.classes) > NUM_CLASSES["ilsvrc"]:
        raise DataError(f"{root} has {len(loader.classes)} classes, the networks have 1000 outputs")
    return loader


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

    def result(self) -> tuple[float, float, float]:
        """Mean loss, top-1 and top-5 in percent."""
        loss_sum, correct, correct5, seen = self.sums.tolist()
        seen = max(seen, 1.0)
        return loss_sum / seen, 100.0 * correct / seen, 100.0 * correct5 / seen

    def text(self) -> str:
        return "loss {:.4f}, top-1 {:.3f}%, top-5 {:.3f}%".format(*self.result())


class Progress:
    """Steps of one pass: a bar on a terminal, else a line every two minutes."""

    def __init__(self, label: str, total: int, meter: Meter, shown: bool = True):
        self.label, self.total, self.meter, self.shown = label, total, meter, shown
        self.step, self.start = 0, time.monotonic()
        self.last_shown = self.start
        self.bar = None
        if shown and sys.stdout.isatty():
            from tqdm import tqdm

            layout = "{desc} [{bar}] {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"
            self.bar = tqdm(
                total=total, desc=label, bar_format=layout, file=sys.stdout, dynamic_ncols=True, leave=False
            )

    def advance(self):
        self.step += 1
        now = time.monotonic()
        if self.bar is not None:
            if now - self.last_shown > 0.5:
                self.last_shown = now
                self.bar.set_postfix_str(self.meter.text(), refresh=False)
            self.bar.update()
        elif self.shown and now - self.last_shown > SECONDS_BETWEEN_LINES:
            self.last_shown = now
            print(f"{self.label} {self.step}/{self.total}, {now - self.start:.0f}s: {self.meter.text()}", flush=True)

    def finish(self):
        if self.bar is not None:
            self.bar.close()


def train_one_epoch(model, net, loader, optimizer, *, similarity, weight, epoch, world, amp_dtype=None, scaler=None):
    """One pass over the training set. Returns mean cross entropy, top-1 and top-5 in percent over all ranks.

    model: what is called (net, or net under DDP or torch.compile). similarity, weight: kind of the orthogonality term
    and its factor lambdaR. epoch: from 1, for messages. Each step's cross entropy is the mean over the global batch, so
    that the number of ranks does not change the gradient. Raises RunError once a loss is seen not to be finite (one
    step later on a GPU, which is not waited for).
    """
    model.train()
    meter = Meter(loader.device)
    progress = Progress("train", len(loader), meter, world.is_main)
    unchecked = None
    for step, ((images, targets), batch_size) in enumerate(zip(loader, loader.batch_sizes, strict=True)):
        with torch.autocast(loader.device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(images)
        loss_sum = F.cross_entropy(logits.float(), targets, reduction="sum")
        terms = similarity_terms(net, similarity)
        # DDP averages gradients over ranks. A weight of 0 stays in: unused bases are still decayed, as in the original.
        loss = loss_sum * (world.size / batch_size) + sum(weight * term for term in terms)
        optimizer.zero_grad(set_to_none=True)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        meter.add(loss_sum, logits, targets)
        if step == 0 and world.is_main:
            _show_first_losses(loss_sum / len(targets), terms)
        if loader.device.type == "cpu":
            _require_finite(loss, epoch, step)
        elif unchecked is not None:
            _require_finite(unchecked, epoch, step - 1)
        unchecked = loss.detach()
        progress.advance()
    _require_finite(unchecked, epoch, len(loader) - 1)
    meter.reduce()
    progress.finish()
    return meter.result()


def _show_first_losses(cross_entropy, terms):
    print(f"accuracy_loss: {cross_entropy.item():.6f}")
    for term in terms:
        print(f"similarity loss: {term.item():.6f}")
    sys.stdout.flush()


def _require_finite(loss, epoch, step):
    value = loss.item()
    if value != value or value in (float("inf"), float("-inf")):
        raise RunError(f"the loss is {value} at epoch {epoch}, batch {step + 1}; try a smaller --lr")


@torch.no_grad()
def evaluate(model: nn.Module, loader, *, world=World()) -> tuple[float, float, float]:
    """Mean cross entropy, top-1 and top-5 in percent of the whole test set, each image once, in float32."""
    model.eval()
    if world.size > 1:  # running statistics differ between ranks; rank 0's are the ones that are saved
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    meter = Meter(loader.device)
    progress = Progress("test", len(loader), meter, world.is_main)
    for images, targets in loader:
        logits = model(images)
        meter.add(F.cross_entropy(logits, targets, reduction="sum"), logits, targets)
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
        main(argv)
        return 0
    except (RunError, CheckpointError, DataError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted; a training command goes on with --resume after the last finished epoch", file=sys.stderr)
        return 130
