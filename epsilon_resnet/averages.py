"""Moving averages of everything that is measured while training, kept on the device and read once per epoch."""

import torch
from torch import Tensor

from epsilon_resnet.models import Config, Output
from epsilon_resnet.modules import is_closed
from epsilon_resnet.schedules import average_decay

STEPS_OF_START = 172  # from step 170 on the decay is 0.95
CLOSED = 0.999995  # from here on `{:.5g}` prints 1: about the last 238 training batches all found the gate closed


class Statistics:
    """The original's moving averages: v <- v - (v - x) * (1 - d), v = 0 at first, float32, updated at every step.

    names: of `values`, float32 (len(names),), on `device`: for every block is_discarded and response_abs_max, then
    the rest. Names are those of the original's log.
    """

    def __init__(self, config: Config, device):
        self.config = config
        blocks = config.block_names if config.gated else []
        self.names = [f"{name}/is_discarded" for name in blocks] + [f"{name}/response_abs_max" for name in blocks]
        self.names += ["discarded_cnt", "discarded_ratio", side_name(config, "train_error")] if config.gated else []
        self.names += ["cross_entropy_loss" if config.arch == "cifar" else "xentropy-loss"]
        self.names += ["train_error"] if config.arch == "cifar" else ["train-error-top1", "train-error-top5"]
        # As in the original: CIFAR's ratio divides by 3n + 2, which is not the number of blocks.
        self.ratio_of = len(blocks) + 2 * (config.arch == "cifar")
        self.values = torch.zeros(len(self.names), device=device)
        # 1 - d of the first steps, the last one of all that follow; counted on the device, as a recorded step needs it
        weights = [1 - average_decay(step) for step in range(STEPS_OF_START)]
        self.weights = torch.tensor(weights, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)

    def start(self, step: int):
        """The next batch is that of this 0-based global step."""
        self.place.fill_(min(step, STEPS_OF_START - 1))

    @torch.no_grad()
    def update(self, output: Output, epsilon: float, loss: Tensor, targets: Tensor):
        """Add a training batch. No call here waits for the device."""
        parts = []
        if output.peaks is not None:
            closed = is_closed(output.peaks, epsilon).float()
            count = closed.sum()
            side_error = top_k_errors(output.side_logits, targets, 1) / len(targets)
            parts = [closed, output.peaks, torch.stack([count, count / self.ratio_of, side_error])]
        errors = [top_k_errors(output.logits, targets, k) / len(targets) for k in top_ks(self.config)]
        parts.append(torch.stack([loss.detach().float(), *errors]))
        self.values -= (self.values - torch.cat(parts)) * self.weights.index_select(0, self.place)
        self.place += 1
        self.place.clamp_(max=STEPS_OF_START - 1)

    def as_dict(self) -> dict[str, float]:
        """All averages by name; waits for the device."""
        return dict(zip(self.names, self.values.tolist(), strict=True))

    def load(self, averages: dict[str, float]):
        """Go on from an earlier `as_dict()`. Raises KeyError if it is of another network."""
        self.values.copy_(torch.tensor([averages[name] for name in self.names]))


def top_ks(config: Config) -> tuple[int, ...]:
    """Which errors are measured: top-1, and top-5 on ImageNet."""
    return (1,) if config.arch == "cifar" else (1, min(5, config.num_classes))


def top_k_errors(logits: Tensor, targets: Tensor, k: int) -> Tensor:
    """How many rows of logits (N, classes) have their target not among the k largest; float32, no axes."""
    if k == 1:
        return (logits.argmax(1) != targets).sum().float()
    return (logits.topk(k, 1).indices != targets[:, None]).all(1).sum().float()


def side_name(config: Config, statistic: str) -> str:
    """Name of a statistic of the side branch, as in the original's log."""
    if config.arch == "cifar":
        return f"side_output/{config.side_block}/{statistic}"
    return f"{config.side_block.replace('/', '/side_output/')}/{statistic}"


def block_averages(averages: dict[str, float], config: Config) -> dict[str, float]:
    """Average of is_discarded for each block, in network order."""
    return {name: averages[f"{name}/is_discarded"] for name in config.block_names}
