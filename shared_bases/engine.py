"""Training and testing: data, device, the two loops, and how they are shown. Used by all train_* and eval_* scripts."""

import os
import sys
import time
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
from common.kernels import without_tf32
from shared_bases.capture import LossLog, run_steps
from shared_bases.models import NUM_CLASSES
from shared_bases.regulariser import similarity_terms
from shared_bases.run import RunError, World, choose_device, join_processes, world_of_environment

# As in the original: CIFAR-10 is normalised with ImageNet's constants.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALISATION = {"cifar10": IMAGENET, "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)), "ilsvrc": IMAGENET}
SECONDS_BETWEEN_LINES = 120.0


def show_devices(visible_device: str, device: str = "auto"):
    """Set CUDA_VISIBLE_DEVICES as --visible_device says, before anything asks PyTorch for a GPU.

    Its default "0" gives way to a value that is set already, and to a --device that is not auto or cuda: cuda:1 is the
    second GPU of the machine, not of the one that would be visible.
    """
    by_default = visible_device == "0"
    if by_default and ("CUDA_VISIBLE_DEVICES" in os.environ or device not in ("auto", "cuda")):
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = visible_device


def join_world(device_flag: str) -> tuple[World, torch.device]:
    """The process group of `torchrun` (nccl or gloo), if there is one, and the device of this process.

    Raises RunError if the device is not there.
    """
    world = world_of_environment()
    advice = "show more of them with --visible_device=0,1,… or use --device cpu"
    device = choose_device(device_flag, world, advice=advice)
    join_processes(world, device)
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


class TrainingStep:
    """What happens to a batch: forward, loss, backward, update, count. Nothing here waits for the device.

    model: what is called (net, or net under DDP or torch.compile). similarity, weight: kind of the orthogonality term
    and its factor lambdaR. Each step's cross entropy is the mean over the global batch, so that the number of ranks
    does not change the gradient. The tensors stay where they are from epoch to epoch, so that a recorded step can be
    replayed.
    """

    def __init__(self, model, net, optimizer, device, *, similarity, weight, world, amp_dtype=None, scaler=None):
        self.model, self.net, self.optimizer, self.device = model, net, optimizer, torch.device(device)
        self.similarity, self.weight, self.world = similarity, weight, world
        self.amp_dtype, self.scaler = amp_dtype, scaler
        self.meter, self.losses = Meter(device), LossLog(device)

    def rates(self) -> tuple:
        """What the host decides before a step, and a recording of it fixes."""
        return tuple(group["lr"] for group in self.optimizer.param_groups)

    def __call__(self, images, targets, batch_size):
        """batch_size: images of this step over all processes. Returns the mean cross entropy here, and the terms R."""
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            logits = self.model(images)
        loss_sum = F.cross_entropy(logits.float(), targets, reduction="sum")
        terms = similarity_terms(self.net, self.similarity)
        # DDP averages gradients over ranks. A weight of 0 stays in: unused bases are still decayed, as in the original.
        loss = loss_sum * (self.world.size / batch_size) + sum(self.weight * term for term in terms)
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.meter.add(loss_sum, logits, targets)
        self.losses.add(loss)
        return loss_sum.detach() / len(targets), [term.detach() for term in terms]


def train_one_epoch(step: TrainingStep, loader, *, epoch, graph=None) -> tuple[float, float, float]:
    """One pass over the training set. Returns mean cross entropy, top-1 and top-5 in percent over all ranks.

    epoch: from 1, for messages. graph: replays the step as a CUDA graph. Raises RunError once a loss is seen not to be
    finite, up to 100 steps later on a GPU, which is not waited for.
    """
    step.model.train()
    step.meter.start()
    step.losses.start(len(loader))
    progress = Progress("train", len(loader), step.meter, step.world.is_main)
    for done, found in enumerate(run_steps(step, loader, graph=graph, kind=step.rates), start=1):
        if done == 1 and step.world.is_main:
            _show_first_losses(*found)
        if (bad := step.losses.first_bad(done)) is not None:
            raise RunError(f"the loss is {bad[1]} at epoch {epoch}, batch {bad[0] + 1}; try a smaller --lr")
        progress.advance()
    step.meter.reduce()
    progress.finish()
    return step.meter.result()


def _show_first_losses(cross_entropy, terms):
    print(f"accuracy_loss: {cross_entropy.item():.6f}")
    for term in terms:
        print(f"similarity loss: {term.item():.6f}")
    sys.stdout.flush()


@without_tf32()
@torch.no_grad()
def evaluate(model: nn.Module, loader, *, world=World(), graph=None) -> tuple[float, float, float]:
    """Mean cross entropy, top-1 and top-5 in percent of the whole test set, each image once, in float32.

    graph: replays the step of a batch as a CUDA graph.
    """
    model.eval()
    if world.size > 1:  # running statistics differ between ranks; rank 0's are the ones that are saved
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    meter = Meter(loader.device)
    progress = Progress("test", len(loader), meter, world.is_main)

    def test(images, targets, _):
        logits = model(images)
        meter.add(F.cross_entropy(logits, targets, reduction="sum"), logits, targets)

    if graph is not None:
        graph.forget()
    for _ in run_steps(test, loader, graph=graph):
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
        if "--debug" in (sys.argv if argv is None else argv):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted; a training command goes on with --resume after the last finished epoch", file=sys.stderr)
        return 130
