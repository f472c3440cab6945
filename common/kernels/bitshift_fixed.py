"""arithmetic="fixed" of bitshift (DeepShift, Sec. 3): numbers as int32 integers and back, and those that do not fit."""

import logging
import threading

import torch

from common.kernels.bitshift_reference import wide

_log = logging.getLogger("effnets")


def overflow_count(reset=False):
    """Integers of the fixed-point path, since the start or the last reset, that did not fit into int32.

    Counts inputs beyond the range, which are cut off there (NaN becomes 0), and outputs, which wrap as in the
    original. Waits for CUDA devices that computed in fixed point.
    """
    with _overflows.lock:
        total = sum(int(count) for count in _overflows.counts.values())
        if reset:
            for count in _overflows.counts.values():
                count.zero_()
            _overflows.reported = False
    return total


class _Overflows:
    """Per device a tensor that counts, so that a GPU need not be waited for."""

    def __init__(self):
        self.lock, self.counts, self.reported = threading.Lock(), {}, False

    def add(self, count):
        with self.lock, torch.no_grad():
            if count.device not in self.counts:
                self.counts[count.device] = torch.zeros((), dtype=torch.int64, device=count.device)
            self.counts[count.device] += count
            if count.device.type == "cpu" and not self.reported and count:
                self.reported = True
                _log.warning(
                    "bitshift: %d integers of a fixed-point layer exceed int32; results wrap. More fraction bits than "
                    "the values leave room for? Further ones are counted in silence: overflow_count()",
                    int(count),
                )


_overflows = _Overflows()


def to_fixed(x, fraction):
    """int32 integers of x * 2**fraction, truncated toward zero; (integers, number of x outside of int32).

    Those outside are cut off at the ends, NaN becomes 0.
    """
    scaled = (x.double() * 2.0**fraction).trunc()
    limits = torch.iinfo(torch.int32)
    outside = ((scaled < limits.min) | (scaled > limits.max) | scaled.isnan()).sum()
    return scaled.nan_to_num(0.0, limits.max, limits.min).clamp(limits.min, limits.max).int(), outside


def fixed_layer(x, bias, fraction, exact_sums, channel):
    """Fixed-point layer around exact_sums(int32 x) -> int64 sums without bias, outputs along dimension `channel`."""
    integers, outside = to_fixed(x, fraction) if x.is_floating_point() else (x, None)
    sums = exact_sums(integers)
    if bias is not None:
        added, outside_bias = to_fixed(bias, fraction) if x.is_floating_point() else (bias, 0)
        outside = None if outside is None else outside + outside_bias
        sums = sums + added.long().view([-1 if d == channel % sums.dim() else 1 for d in range(sums.dim())])
    y = sums.int()
    _overflows.add((y != sums).sum() + (0 if outside is None else outside))
    return (y.to(wide(x.dtype)) / 2.0**fraction).to(x.dtype) if x.is_floating_point() else y
