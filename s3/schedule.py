"""Learning rates by epoch: functions of the epoch's number, so that a resumed run needs no scheduler's state."""

import math

SCHEDULES = ("original", "fixed")


def cosine_rate(lr: float, epoch: int, epochs: int, schedule: str = "original") -> float:
    """Rate of a 0-based epoch. "original": the scheduler steps before each epoch, so that the rate never is `lr` itself
    and the last epoch's is 0; "fixed": it steps after each.
    """
    position = epoch + 1 if schedule == "original" else epoch
    return lr * (1 + math.cos(math.pi * position / epochs)) / 2


def step_rate(lr: float, epoch: int) -> float:
    """main_eval.py's: a tenth every 30 epochs."""
    return lr * 0.1 ** (epoch // 30)
