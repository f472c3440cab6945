"""Weights from latents, and their gradients, in one pass over the latents on a CUDA device, which PyTorch compiles.

The forward pass also writes what the gradients need of the latents, one bit of each, as a number from 0 to 255: bit 0
is sign >= 0, bit k is latent k > 0. So the backward pass reads two tensors; PyTorch's jiterator takes at most eight.
"""

import functools
import logging

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_refused = set()

PLAIN_LATENTS = {"s3": 2, "denseshift": 1}  # those before the shifts
SIGN, NONZERO = "T s = bits & 1 ? T(1) : T(-1);", "T z = bits & 2 ? T(1) : T(0);"
VALUES = {"s3": f"{SIGN} {NONZERO} weight = s * z * T(1 << e);", "denseshift": f"{SIGN} weight = s * T(1 << e);"}
# Gradients of the latents before the shifts, and what those of the shifts have in common.
GRADIENTS = {
    "s3": f"{SIGN} {NONZERO} T scaled = grad * T(1 << e); g0 = scaled * z; g1 = scaled * s;",
    "denseshift": f"{SIGN} T root = sqrt(T(e + 1)); g0 = grad * root;",
}
COMMON = {"s3": "g1 * z * T(0.6931471805599453)", "denseshift": "grad * s / (T(2) * root)"}


def weight_source(method: str, latents: int) -> str:
    """CUDA source for `latents` latents: (sign, …, shifts) -> weight, code."""
    names = [f"x{k}" for k in range(latents)]
    code = " | ".join(["int(x0 >= T(0))", *(f"int({name} > T(0)) << {k}" for k, name in enumerate(names) if k)])
    exponent = [f"e = bits >> {k} & 1 ? e + 1 : 0;" for k in _innermost_first(method, latents)]
    lines = [f"int bits = {code};", "int e = 0;", *exponent, VALUES[method], "code = T(bits);"]
    parameters = ", ".join([*(f"T {name}" for name in names), "T& weight, T& code"])
    return _function(f"{method}_weight_{latents}", parameters, lines)


def gradients_source(method: str, latents: int) -> str:
    """CUDA source: (code, gradient of the weight) -> gradients of the latents."""
    shifts, lines = _innermost_first(method, latents), ["int bits = int(code);", "int e = 0;"]
    for k in shifts:
        lines += [f"int slope{k} = e + 1;", f"e = bits >> {k} & 1 ? slope{k} : 0;"]
    lines.append(GRADIENTS[method])
    if shifts:
        lines.append(f"T base = {COMMON[method]};")
    for k in reversed(shifts):  # base becomes zero below the first shift that is off
        lines += [f"g{k} = base * T(slope{k});", f"base = base * (bits >> {k} & 1 ? T(1) : T(0));"]
    parameters = ", ".join(["T code, T grad", *(f"T& g{k}" for k in range(latents))])
    return _function(f"{method}_gradients_{latents}", parameters, lines)


def _innermost_first(method, latents):
    """Numbers of the shift latents."""
    return range(latents - 1, PLAIN_LATENTS[method] - 1, -1)


def _function(name, parameters, lines):
    body = "".join(f"  {line}\n" for line in lines)
    return f"\ntemplate <typename T> void {name}({parameters}) {{\n{body}}}\n"


def weight_and_code(method: str, *latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """The weight of latents (sign first) and the code for `gradients`; None where PyTorch's operations make it."""
    return _run(f"{method}_weight_{len(latents)}", weight_source, method, len(latents), 2, latents)


def gradients(method: str, latents: int, code: Tensor, grad: Tensor) -> tuple[Tensor, ...] | None:
    """Gradients of the latents, of which there were `latents`, for that of the weight; None as above."""
    return _run(f"{method}_gradients_{latents}", gradients_source, method, latents, latents, (code, grad))


def decoded(code: Tensor, latents: int) -> list[Tensor]:
    """Latents of +-1 that have this code."""
    bits = code.int()
    return [2 * ((bits >> k) & 1).to(code.dtype) - 1 for k in range(latents)]


@functools.cache
def _kernel(source, method, latents, outputs):
    from torch.cuda import jiterator

    return jiterator._create_multi_output_jit_fn(source(method, latents), outputs)


def _run(name, source, method, latents, outputs, tensors):
    if not all(tensor.is_cuda and tensor.dtype == torch.float32 for tensor in tensors) or name in _refused:
        return None
    if torch.compiler.is_compiling():
        return None
    try:
        with torch.no_grad():
            return _kernel(source, method, latents, outputs)(*(tensor.detach() for tensor in tensors))
    except Exception as error:  # not a stable interface: whatever is wrong, PyTorch's own operations do it too
        _refused.add(name)
        _log.warning("%s takes several passes on this GPU: %s", name, str(error).splitlines()[0])
        return None
