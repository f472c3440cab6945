"""What changes during training, as plain functions of epoch and step: learning rate, epsilon, weight decay, averages.

Epochs count from 1. An entry (a, v) of a schedule is set once epoch a is complete, so it acts from epoch a + 1 on.
"""

from dataclasses import dataclass, field

Schedule = tuple[tuple[int, float], ...]

INITIAL_LEARNING_RATE = 0.1
INITIAL = {
    "cifar": ((0, 0.1), (82, 0.01), (123, 0.001), (300, 0.0002)),
    "svhn": ((1, 0.1), (20, 0.01), (28, 0.001), (50, 0.0001)),
    "imagenet": ((30, 1e-2), (60, 1e-3), (85, 1e-4), (95, 1e-5)),
}
AFTER_LOSS = {  # offsets from the epoch in which blocks were lost
    "cifar": ((0, 0.1), (41, 0.01), (61, 0.001), (150, 0.0002)),
    "svhn": ((1, 0.1), (10, 0.01), (14, 0.001), (25, 0.0001)),
    "imagenet": None,
}


def scaled(schedule: Schedule | None, factor: float) -> Schedule | None:
    """The schedule with its epochs multiplied by `factor` and rounded; no plateau gets shorter than one epoch."""
    if schedule is None or factor == 1:
        return schedule
    entries: list[tuple[int, float]] = []
    for epoch, value in schedule:
        earliest = entries[-1][0] + 1 if entries else 0
        entries.append((max(earliest, round(epoch * factor)), value))
    return tuple(entries)


def parse_schedule(text: str) -> Schedule:
    """`0:0.1,82:0.01` as ((0, 0.1), (82, 0.01)). Raises ValueError if it is not of this form."""
    try:
        entries = tuple((int(epoch), float(value)) for epoch, value in (item.split(":") for item in text.split(",")))
    except ValueError:
        raise ValueError(f"{text!r} is not a schedule; write EPOCH:RATE,EPOCH:RATE such as 0:0.1,82:0.01") from None
    epochs = [epoch for epoch, _ in entries]
    if epochs != sorted(set(epochs)) or epochs[0] < 0 or any(not 0 < value < float("inf") for _, value in entries):
        raise ValueError(f"{text!r}: epochs must increase from 0 or more, rates must be positive")
    return entries


@dataclass
class LearningRate:
    """The learning rate that starts again whenever blocks were lost (Sec. 3.4; the original's LearningRateSetter).

    schedule: in force now. after_loss: what replaces it, shifted by the epoch of the loss; None: it is never replaced.
    """

    schedule: Schedule
    after_loss: Schedule | None = None
    history: list[float] = field(default_factory=list)
    last_changed: int = 0

    def after_epoch(self, epoch: int, count: float | None = None) -> tuple[float | None, int]:
        """(learning rate to set, or None to leave it; which rule gave it) after `epoch` is complete, 0: before all.

        count: closed blocks at the end of the epoch. Rules: 1 too little history, 2 no new loss, both with the
        schedule's value for exactly this epoch; 3 at least one more block than an epoch ago: start again.
        """
        if epoch > 0:
            self.history.append(count)
        if self.after_loss is None or len(self.history) < 2 or epoch - self.last_changed < 1:
            return dict(self.schedule).get(epoch), 1
        before, now = self.history[-2:]
        if max(before, now) < before + 1:
            return dict(self.schedule).get(epoch), 2
        self.last_changed = epoch
        self.schedule = tuple((epoch + offset, value) for offset, value in self.after_loss)
        return self.after_loss[0][1], 3  # at once, though SVHN's first offset is 1

    def state_dict(self) -> dict:
        return {
            "schedule": [list(entry) for entry in self.schedule],
            "history": list(self.history),
            "last_changed_epoch": self.last_changed,
        }

    def load_state_dict(self, state: dict):
        self.schedule = tuple((int(epoch), float(value)) for epoch, value in state["schedule"])
        self.history, self.last_changed = list(state["history"]), state["last_changed_epoch"]


def epsilon_in_epoch(epoch: int, epsilon: float, start_epoch: int = 0) -> float:
    """Threshold in force during `epoch`: 0 up to `start_epoch`, then epsilon. The published runs have start_epoch 0."""
    return 0.0 if epoch <= start_epoch else epsilon


def weight_decay(step: int, initial: float = 2e-4, every: int | None = 480_000) -> float:
    """Weight decay at a 0-based step: a fifth after each `every` steps (CIFAR, SVHN); None: constant (ImageNet)."""
    return initial if every is None else initial * 0.2 ** (step // every)


def average_decay(step: int) -> float:
    """Decay d of the moving averages at a 0-based step: v <- v - (v - x) * (1 - d)."""
    return min(0.95, (1 + step) / (10 + step))
