"""A training step that never waits for the device, and its recording as one CUDA graph (--cuda-graph).

The same file in every paper: change one, copy it to the other four; a test holds them equal.
"""

import gc
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # steps before a recording: they make momentum buffers, and cuDNN chooses its algorithms


def why_not(device, *, processes: int, amp: str, compiled: bool) -> str | None:
    """Why a run cannot replay its steps, in words that follow "--cuda-graph"; None if it can."""
    if torch.device(device).type != "cuda":
        return "needs a GPU; leave it out on the CPU"
    if processes > 1:
        return "is for one process; leave it out under torchrun"
    if amp == "fp16":
        return "does not go with --amp fp16, whose scaler decides on the host; use --amp bf16"
    return "does not go with --compile; choose one of them" if compiled else None


class LossLog:
    """The loss of every step of an epoch, kept on the device; looked at every 100 steps, on a CPU at every one.

    Reading a loss waits for all that was queued before it, so reading each would leave a GPU idle between steps.
    """

    def __init__(self, device):
        self.device = torch.device(device)
        self.every = 1 if self.device.type == "cpu" else 100
        self.place = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.losses, self.checked = torch.zeros(0, device=self.device), 0

    def start(self, steps: int):
        """Forget the losses; `steps` follow."""
        if len(self.losses) != steps:  # else in place: a recorded step goes on writing there
            self.losses = torch.zeros(steps, device=self.device)
        self.place.zero_()
        self.checked = 0

    def add(self, loss: Tensor):
        """loss: of one step, no axes, any floating type."""
        self.losses.index_copy_(0, self.place, loss.detach().float().view(1))
        self.place += 1

    def first_bad(self, done: int) -> tuple[int, float] | None:
        """(0-based step, loss) of the first one that is not finite, if it is time to look after `done` steps."""
        if done % self.every and done != len(self.losses):
            return None
        new, start = self.losses[self.checked : done].tolist(), self.checked
        self.checked = done
        # a difference of a number with itself is 0, but for NaN and the infinities
        return next(((start + i, loss) for i, loss in enumerate(new) if loss - loss != 0), None)


class StepGraph:
    """Runs a step as it is a few times, records it as a CUDA graph, and from then on replays it.

    A step is a function of no arguments whose tensors stay where they are: a replay reads and writes the same
    addresses. What the host decides (learning rate, size of the batch) is fixed in a recording, so a step of another
    `kind` is recorded anew; the memory of the recording before is used again. On a CPU every step runs as it is.
    """

    def __init__(self, device):
        self.device = torch.device(device)
        self.kind = self.graph = self.result = self.inputs = None
        self.runs = Counter()
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, step: Callable, size: int, kind: tuple):
        """One step. size: of its batch. kind: all else that a recording fixes. Returns what the step returns."""
        if self.stream is None:
            return step()
        if self.kind != (size, kind):
            self.runs[size] += 1
            if self.runs[size] <= WARM_UP:
                return self.aside(step)
            self._record(step, size, kind)
        self.graph.replay()
        return self.result

    def forget(self):
        """Record the next step anew, whatever its kind: other tensors hold what it reads, as after an evaluation."""
        self.kind = None

    def aside(self, step: Callable):
        """Run a step as it is, but on the stream that records: its gradients then belong to that stream."""
        if self.stream is None:
            return step()
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = step()
        current.wait_stream(self.stream)
        return result

    def _record(self, step, size, kind):
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle() if self.graph is None else self.graph.pool()
        torch.cuda.synchronize(self.device)
        # torch.cuda.graph() also collects garbage and empties the cache: half a second at every new learning rate.
        gc.disable()
        try:
            with torch.cuda.stream(self.stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    result = step()
                finally:
                    graph.capture_end()
        finally:
            gc.enable()
        self.graph, self.result, self.kind = graph, result, (size, kind)

    def fixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A batch of a loader that cannot `take`, copied to where the recorded step reads it."""
        if self.inputs is None or self.inputs[0].shape != images.shape:
            self.inputs = images.clone(), targets.clone()
        else:
            self.inputs[0].copy_(images)
            self.inputs[1].copy_(targets)
        return self.inputs


def run_steps(step: Callable, loader, *, graph: StepGraph | None = None, kind=tuple, loaded=lambda: None):
    """Run step(images, targets, size) for every batch of the loader's epoch; yields what it returns.

    size: images of the batch over all processes. graph: replays the step; the last batch, if it is shorter, runs as it
    is. loaded: called when a batch is there. kind: called after it, gives what the host decided, see StepGraph.
    """
    sizes = loader.batch_sizes
    if graph is None:
        for (images, targets), size in zip(loader, sizes, strict=True):
            loaded()
            yield step(images, targets, size)
    elif hasattr(loader, "take"):
        loader.stage()
        for size in sizes:
            loaded()
            whole = lambda size=size: step(*loader.take(size), size)  # noqa: E731
            yield graph(whole, size, kind()) if size == sizes[0] else graph.aside(whole)
    else:
        for (images, targets), size in zip(loader, sizes, strict=True):
            loaded()
            if size != sizes[0] or len(images) != size:
                yield graph.aside(lambda images=images, targets=targets, size=size: step(images, targets, size))
                continue
            batch = graph.fixed(images, targets)
            yield graph(lambda batch=batch, size=size: step(*batch, size), size, kind())
