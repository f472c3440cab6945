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

# `bits` is the code, FIRST the bit of the outermost shift, SHIFTS their number; e, the exponent, is the number of
# leading ones of the shifts' bits, found from the innermost on.
EXPONENT = "for (int t = SHIFTS - 1; t >= 0; --t) e = (bits >> (FIRST + t)) & 1 ? e + 1 : 0;"
SIGN = "T s = bits & 1 ? T(1) : T(-1);"
VALUES = {
    "s3": f"{SIGN} T z = bits & 2 ? T(1) : T(0); weight = s * z * T(1 << e);",
    "denseshift": f"{SIGN} weight = s * T(1 << e);",
}
SLOPES = {
    "s3": f"""{SIGN} T z = bits & 2 ? T(1) : T(0);
  T scaled = grad * T(1 << e);
  g0 = scaled * z;
  g1 = scaled * s;
  T base = g1 * z * T(0.6931471805599453);""",
    "denseshift": f"""{SIGN}
  T root = sqrt(T(e + 1));
  g0 = grad * root;
  T base = grad * s / (T(2) * root);""",
}
PLAIN_LATENTS = {"s3": 2, "denseshift": 1}  # those before the shifts


def weight_source(method: str, latents: int) -> str:
    """CUDA source for `latents` latents: (sign, …, shifts) -> weight, code."""
    first = PLAIN_LATENTS[method]
    names = [f"x{k}" for k in range(latents)]
    code = " | ".join(["int(x0 >= T(0))", *(f"int({name} > T(0)) << {k}" for k, name in enumerate(names) if k)])
    exponent = EXPONENT.replace("SHIFTS", str(latents - first)).replace("FIRST", str(first))
    return f"""
template <typename T> void {method}_weight_{latents}({", ".join(f"T {name}" for name in names)}, T& weight, T& code) {{
  int bits = {code};
  int e = 0;
  {exponent}
  {VALUES[method]}
  code = T(bits);
}}
"""


def gradients_source(method: str, latents: int) -> str:
    """CUDA source: (code, gradient of the weight) -> gradients of the latents."""
    first, lines = PLAIN_LATENTS[method], []
    for k in reversed(range(first, latents)):  # the innermost first
        lines.append(f"int slope{k} = e + 1;")
        lines.append(f"e = (bits >> {k}) & 1 ? slope{k} : 0;")
    lines.append(SLOPES[method])
    for k in range(first, latents):
        lines.append(f"g{k} = base * T(slope{k});")
        lines.append(f"base = base * ((bits >> {k}) & 1 ? T(1) : T(0));")
    body = "\n  ".join(lines)
    results = ", ".join(f"T& g{k}" for k in range(latents))
    return f"""
template <typename T> void {method}_gradients_{latents}(T code, T grad, {results}) {{
  int bits = int(code);
  int e = 0;
  {body}
}}
"""


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
