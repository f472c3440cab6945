"""Processes and devices, the two loops, and how they are shown. Used by every script of this paper."""

import os
import subprocess
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common.checkpoints import CheckpointError
from common.data import DataError
from common.kernels import without_tf32
from epsilon_resnet.averages import top_k_errors, top_ks
from epsilon_resnet.capture import LossLog, run_steps
from epsilon_resnet.inputs import TEST_BATCH_SIZE
from epsilon_resnet.run import (
    RunError,
    World,
    choose_device,
    gpu_errors_explained,
    has_gpu,
    join_processes,
    numbered_gpu,
    nvidia_problem,
    world_of_environment,
)

SIDE_WEIGHT = 0.1
SECONDS_BETWEEN_LINES = 120.0


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

    Several ids give one process per GPU, or with an explicit --device cpu as many CPU processes. Raises RunError if
    there is no GPU of such a number.
    """
    ids = gpu_ids(gpu)
    if len(ids) < 2 or "WORLD_SIZE" in os.environ:
        return 0
    if device == "cpu":
        return len(ids)
    if device not in ("auto", "cuda") or not has_gpu():
        return 0
    for number in ids:  # here, because each of the processes would say it
        numbered_gpu(number, f"--gpu {gpu}")
    return len(ids)


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
    world = world_of_environment()
    chosen = _device(world, gpu, device)
    join_processes(world, chosen)
    return world, chosen


def _device(world, gpu, name):
    ids = gpu_ids(gpu)
    if not ids or name not in ("auto", "cuda"):
        return choose_device(name, world)
    if name == "auto" and not has_gpu():
        if world.is_main and nvidia_problem() is None:  # else choose_device says more
            print("warning: no CUDA device here, --gpu is ignored and the CPU used", file=sys.stderr)
        return choose_device("auto", world)
    if len(ids) < world.local_size:
        raise RunError(
            f"--gpu {gpu}: {world.local_size} processes of this machine would share {len(ids)} of its GPUs; name one "
            "for each, or leave --gpu out"
        )
    return numbered_gpu(ids[world.local_rank], f"--gpu {gpu}")


class Meter:
    """Loss and errors of one pass, summed on the device so that no step waits for it."""

    def __init__(self, config, device):
        self.ks = top_ks(config)
        self.sums = torch.zeros(2 + len(self.ks) + 1, dtype=torch.float64, device=device)

    def start(self):
        """Begin anew, in the same tensor: a recorded step goes on writing there."""
        self.sums.zero_()

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


class TrainingStep:
    """What happens to a batch: forward, loss, backward, update, averages, count. Nothing here waits for the device.

    Each step's loss is the mean over this rank's batch, as in each tower of the original. decay: function of the
    0-based global step -> weight decay of the first parameter group. The tensors stay where they are from epoch to
    epoch, so that a recorded step can be replayed.
    """

    def __init__(self, model, optimizer, statistics, device, *, world, decay, amp_dtype=None, scaler=None):
        self.model, self.optimizer, self.statistics, self.device = model, optimizer, statistics, torch.device(device)
        self.world, self.decay, self.amp_dtype, self.scaler = world, decay, amp_dtype, scaler
        self.meter, self.losses = Meter(statistics.config, device), LossLog(device)
        self.number, self.epsilon = 0, 0.0

    def start(self, first_step: int, steps: int, epsilon: float):
        """An epoch of so many steps begins; first_step: their first's global number, from 0. epsilon: the threshold."""
        self.model.train()
        self.meter.start()
        self.losses.start(steps)
        self.statistics.start(first_step)
        self.number, self.epsilon = first_step, epsilon

    def next(self):
        """Set the weight decay of the step that comes."""
        self.optimizer.param_groups[0]["weight_decay"] = self.decay(self.number)
        self.number += 1

    def rates(self) -> tuple:
        """What the host decides before a step, and a recording of it fixes."""
        return *((group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups), self.epsilon

    def __call__(self, images, targets, batch_size):
        """batch_size: images of this step over all processes; not needed here."""
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            output = self.model(images)
        loss = F.cross_entropy(output.logits.float(), targets)
        cost = loss
        if output.side_logits is not None:
            cost = loss + SIDE_WEIGHT * F.cross_entropy(output.side_logits.float(), targets)
        _update(cost, self.optimizer, self.scaler)
        self.statistics.update(output, self.epsilon, loss, targets)
        self.meter.add(loss, output, targets)
        self.losses.add(cost)


def train_one_epoch(step: TrainingStep, batches, *, epoch, epsilon, graph=None) -> dict:
    """One epoch of steps; returns Meter.result() over all ranks. epoch: from 1.

    graph: replays the step as a CUDA graph. Raises RunError once a step's loss is seen not to be finite, up to 100
    steps later on a GPU, which is not waited for.
    """
    step.start((epoch - 1) * len(batches), len(batches), epsilon)
    progress = Progress("train", len(batches), step.meter, step.world.is_main)
    for done, _ in enumerate(run_steps(step, batches, graph=graph, kind=step.rates, loaded=step.next), start=1):
        if (bad := step.losses.first_bad(done)) is not None:
            advice = "try smaller rates with --lr_schedule"
            raise RunError(f"the loss is {bad[1]} at epoch {epoch}, batch {bad[0]}; {advice}")
        progress.advance()
    if step.world.size > 1:  # as in the original: the statistics are those of the first tower
        dist.broadcast(step.statistics.values, 0)
    step.meter.reduce()
    progress.finish()
    return step.meter.result()


def _update(cost, optimizer, scaler):
    optimizer.zero_grad(set_to_none=True)
    if scaler is None:
        cost.backward()
        optimizer.step()
    else:
        scaler.scale(cost).backward()
        scaler.step(optimizer)
        scaler.update()


@gpu_errors_explained(TEST_BATCH_SIZE)
@without_tf32()
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
