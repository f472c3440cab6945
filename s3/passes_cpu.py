"""Weights from latents, and their gradients, in one pass over the latents on the CPU, compiled by numba.

The results are those of PyTorch's operations in `quantizers`, to the bit. A pass goes over blocks that stay in the
first-level cache, one latent after the other; its inner loops begin at 0, so that they become vector instructions.
"""

import functools
import logging
import math

import numpy as np
import torch

from common.data.threads import run_chunks

LN2 = math.log(2)
ELEMENTS_PER_THREAD = 1 << 16
BLOCK = 1024
_log = logging.getLogger(__name__)


def weights(method: str, *latents):
    """The weight tensor of latents (sign first), or None where PyTorch's operations make it. method: s3, denseshift."""
    kernels = _kernels_for(method, latents)
    return None if kernels is None else _run(kernels[0], latents, 1)[0]


def gradients(method: str, grad, *latents):
    """Gradients of all latents for that of the weight, or None where PyTorch's operations make them."""
    kernels = _kernels_for(method, latents) if grad.dtype == torch.float32 else None
    if kernels is None:
        return None
    grad = grad if grad.stride() == latents[0].stride() else torch.empty_like(latents[0]).copy_(grad)
    return _run(kernels[1], (grad, *latents), len(latents))


def _kernels_for(method, latents):
    """The compiled passes, forward and backward, for these tensors, None where PyTorch's operations do it."""
    first = latents[0]
    if first.device.type != "cpu" or torch.compiler.is_compiling() or not _is_dense(first):
        return None
    if any(x.dtype != torch.float32 or x.shape != first.shape or x.stride() != first.stride() for x in latents):
        return None
    compiled = _compiled()
    return compiled and compiled[method]


def _is_dense(x):
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _run(kernel, inputs, count):
    """Run a pass over tensors of one layout in the order of storage; returns `count` new tensors."""
    results = tuple(torch.empty_like(inputs[-1]) for _ in range(count))  # keeps the memory layout
    flat = [
        tuple(torch.as_strided(x.detach(), (x.numel(),), (1,)).numpy() for x in group) for group in (inputs, results)
    ]
    run_chunks(lambda start, stop: kernel(*flat, start, stop), inputs[0].numel(), ELEMENTS_PER_THREAD)
    return results


def _s3_weight(latents, results, start, stop):
    for low in range(start, stop, BLOCK):
        high = min(low + BLOCK, stop)
        sign, val, weight = latents[0][low:high], latents[1][low:high], results[0][low:high]
        weight[:] = 1
        for t in range(len(latents) - 1, 1, -1):
            shift = latents[t][low:high]
            for i in range(high - low):
                doubled = np.float32(2) * weight[i]
                weight[i] = doubled if shift[i] > 0 else np.float32(1)
        for i in range(high - low):
            signed = np.float32(1) if sign[i] >= 0 else np.float32(-1)
            used = np.float32(1) if val[i] > 0 else np.float32(0)
            weight[i] *= signed * used


def _s3_gradients(latents, results, start, stop):
    """latents: the weight's gradient, sign, val, shifts; results: the gradients of these but the first."""
    bases, exponents, powers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for low in range(start, stop, BLOCK):
        high = min(low + BLOCK, stop)
        base, exponent, power = bases[: high - low], exponents[: high - low], powers[: high - low]
        grad, sign, val = latents[0][low:high], latents[1][low:high], latents[2][low:high]
        grad_sign, grad_val = results[0][low:high], results[1][low:high]
        exponent[:], power[:] = 0, 1
        for t in range(len(results) - 1, 1, -1):
            shift, slope = latents[t + 1][low:high], results[t][low:high]
            for i in range(high - low):
                raised, doubled = exponent[i] + np.float32(1), np.float32(2) * power[i]
                slope[i] = raised
                exponent[i] = raised if shift[i] > 0 else np.float32(0)
                power[i] = doubled if shift[i] > 0 else np.float32(1)
        for i in range(high - low):
            scaled = grad[i] * power[i]
            signed = scaled * (np.float32(1) if sign[i] >= 0 else np.float32(-1))
            used = np.float32(1) if val[i] > 0 else np.float32(0)
            grad_sign[i] = scaled * used
            grad_val[i] = signed
            base[i] = signed * used * np.float32(LN2)
        for t in range(2, len(results)):
            shift, slope = latents[t + 1][low:high], results[t][low:high]
            for i in range(high - low):
                slope[i] *= base[i]
                base[i] *= np.float32(1) if shift[i] > 0 else np.float32(0)


def _denseshift_weight(latents, results, start, stop):
    for low in range(start, stop, BLOCK):
        high = min(low + BLOCK, stop)
        sign, weight = latents[0][low:high], results[0][low:high]
        weight[:] = 1
        for t in range(len(latents) - 1, 0, -1):
            shift = latents[t][low:high]
            for i in range(high - low):
                doubled = np.float32(2) * weight[i]
                weight[i] = doubled if shift[i] > 0 else np.float32(1)
        for i in range(high - low):
            weight[i] *= np.float32(1) if sign[i] >= 0 else np.float32(-1)


def _denseshift_gradients(latents, results, start, stop):
    """latents: the weight's gradient, sign, shifts; results: the gradients of these but the first."""
    bases, exponents = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for low in range(start, stop, BLOCK):
        high = min(low + BLOCK, stop)
        base, exponent = bases[: high - low], exponents[: high - low]
        grad, sign, grad_sign = latents[0][low:high], latents[1][low:high], results[0][low:high]
        exponent[:] = 0
        for t in range(len(results) - 1, 0, -1):
            shift, slope = latents[t + 1][low:high], results[t][low:high]
            for i in range(high - low):
                raised = exponent[i] + np.float32(1)
                slope[i] = raised
                exponent[i] = raised if shift[i] > 0 else np.float32(0)
        for i in range(high - low):
            root = np.sqrt(exponent[i] + np.float32(1))
            signed = grad[i] * (np.float32(1) if sign[i] >= 0 else np.float32(-1))
            grad_sign[i] = grad[i] * root
            base[i] = signed / (np.float32(2) * root)
        for t in range(1, len(results)):
            shift, slope = latents[t + 1][low:high], results[t][low:high]
            for i in range(high - low):
                slope[i] *= base[i]
                base[i] *= np.float32(1) if shift[i] > 0 else np.float32(0)


PASSES = {
    "s3": (_s3_weight, _s3_gradients),
    "denseshift": (_denseshift_weight, _denseshift_gradients),
}


@functools.cache
def _compiled():
    """All passes compiled by numba at their first call, or None, said once, where it is not there or switched off."""
    try:
        import numba

        if numba.config.DISABLE_JIT:
            raise ImportError("NUMBA_DISABLE_JIT is set")
    except ImportError as error:
        _log.warning("without numba (%s) the weights are built by PyTorch, which is slower", error)
        return None
    try:
        return _decorated(numba.njit(cache=True, nogil=True))
    except RuntimeError:  # no folder that numba may write its cache to
        return _decorated(numba.njit(nogil=True))


def _decorated(decorator):
    return {name: tuple(decorator(each) for each in passes) for name, passes in PASSES.items()}
