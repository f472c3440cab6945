"""Power-of-two weights in 2 to 6 bits each: the packed form that the bitshift kernels compute with.

A code is a sign bit and a magnitude m of bits - 1 bits: the weight is +-2**(base + m), or 0 for m = 0 where the scheme
has a zero. Codes come in blocks of 256, eight groups of 32, in 32 * bits bytes: first a plane with the low 2 or 4 bits
of every code, then planes of one bit each. The order inside is chosen so that a processor with 32-byte vectors takes a
group apart without moving anything across its halves, and finds its weights in order (`BYTE_OF`).
"""

import dataclasses
import math

import torch
from torch import Tensor

BLOCK, GROUP = 256, 32
SCHEMES = ("PS", "Q", "S3")
VERSION = 3
# Byte of a group that holds its i-th weight. Interleaving two bytes per weight (the upper half of a float) within each
# 16-byte half, then spreading even and odd pairs, yields four vectors of eight floats: weights 0-7, 8-15, 16-23, 24-31.
BYTE_OF = [i % 8 // 4 * 16 + i // 16 * 8 + i % 4 * 2 + i // 8 % 2 for i in range(GROUP)]


@dataclasses.dataclass(frozen=True, eq=False)
class PackedShiftWeights:
    """Weights 0 and +-2**p of a linear layer, shape (out, in), or a convolution, shape (out, in / groups, kh, kw).

    codes: 1-D uint8. A linear layer's weights are in panels of 32 outputs (rows), each with the weights of one input
    after the other, inputs filled up to a multiple of 8; a convolution's are in channels-last order (out, kh, kw, in).
    bits: of one code, 2 to 6. scheme: "PS", "Q" or "S3". base: exponent of magnitude 0. zero: whether m = 0 means 0.
    """

    codes: Tensor
    bits: int
    scheme: str
    base: int
    zero: bool
    shape: tuple[int, ...]

    @property
    def nbytes(self):
        """Size of the codes in bytes."""
        return self.codes.numel()

    @property
    def device(self):
        """Device of the codes."""
        return self.codes.device

    def to(self, device):
        """The same weights on another device."""
        return dataclasses.replace(self, codes=self.codes.to(device))

    def unpack(self):
        """The weights, exactly: float32, shape `shape`, on the codes' device."""
        return unpack_codes(self.codes, self.shape, self.bits, self.base, self.zero).contiguous()

    def state(self):
        """Tensors and plain values only, for torch.save and torch.load(weights_only=True); undone by `from_state`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "shape": list(self.shape), "version": VERSION}

    @classmethod
    def from_state(cls, state):
        """What `state` returned. Raises ValueError where it is incomplete, inconsistent or of a newer version."""
        try:
            values = {field.name: state[field.name] for field in dataclasses.fields(cls)}
            version = state["version"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"packed weights: not a state of PackedShiftWeights: {error} is missing") from None
        if version != VERSION:
            known = f"version {VERSION}: pack the network's checkpoint again"
            raise ValueError(f"packed weights: version {version} is unknown here, which is {known}")
        packed = cls(**{**values, "shape": tuple(values["shape"])})
        _check_state(packed)
        return packed


def _check_state(packed):
    shape, bits = packed.shape, packed.bits
    whole = all(isinstance(n, int) and n >= 0 for n in shape) and isinstance(packed.base, int)
    if not whole or len(shape) not in (2, 4) or bits not in range(2, 7) or packed.scheme not in SCHEMES:
        raise ValueError(f"packed weights: shape {shape}, {bits} bits, scheme {packed.scheme}, base {packed.base}")
    if not -127 <= packed.base <= 127 - 2 ** (bits - 1) + 1:
        raise ValueError(f"packed weights: base {packed.base} goes beyond float32's exponents")
    codes = packed.codes
    expected = code_bytes(shape, bits)
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8 or codes.dim() != 1 or codes.numel() != expected:
        found = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else type(codes).__name__
        raise ValueError(f"packed weights: codes must be {expected} bytes (uint8) for shape {shape}, not {found}")


def code_bytes(shape, bits):
    """Bytes of the codes of weights of this shape, filled up to whole blocks."""
    return -(-_slots(shape) // BLOCK) * GROUP * bits


def _slots(shape):
    if len(shape) == 2:
        return -(-shape[0] // GROUP) * GROUP * (-(-shape[1] // 8) * 8)
    return math.prod(shape)


def pack_shift_weights(weight, bits, scheme):
    """Pack weights that are 0 or +-2**p into codes of `bits` bits; `unpack` of the result returns them exactly.

    weight: floating tensor (out, in) or (out, in / groups, kh, kw), already rounded; or a pair (shift, sign) of such
    tensors, integral, sign in {-1, 0, 1} (an exponent with sign 0 does not matter).
    bits: 2 to 6. scheme: "PS" (DeepShift-PS: exponents -(2**(bits-1) - 2) to 0, and zero), "Q" (DeepShift-Q: exponents
    -(2**(bits-1) - 1) to 0) or "S3" (Sign-Sparse-Shift: exponents 0 to 2**(bits-1) - 2, and zero).

    Exponents outside of these are packed by moving the base, as long as they span no more of them. Zeros in Q weights
    take the code of the smallest magnitude if that is free, else one bit more per weight (`bits` of the result).
    Raises TypeError for a wrong type; ValueError for bits, schemes and shapes other than these, for NaN and infinity,
    for values that are not 0 or +-2**p, and exponents that span more than the code has. (DeepShift and S3, Sec. 3)
    """
    sign, exponent = _sign_and_exponent(weight)
    scheme = str(scheme).upper()
    if scheme not in SCHEMES:
        raise ValueError(f"pack_shift_weights: scheme must be one of {', '.join(SCHEMES)}, not {scheme}")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 6:
        raise ValueError(f"pack_shift_weights: bits must be an integer from 2 to 6, not {bits}")
    if sign.dim() not in (2, 4):
        shape = tuple(sign.shape)
        raise ValueError(f"pack_shift_weights: shape must be (out, in) or (out, in / groups, kh, kw), not {shape}")
    bits, base, zero = _choose_code(sign, exponent, bits, scheme)
    magnitude = torch.where(sign == 0, 0, exponent - base)
    codes = _interleave(_arrange((sign < 0).long() << (bits - 1) | magnitude), bits)
    return PackedShiftWeights(codes, bits, scheme, base, zero, tuple(sign.shape))


def _sign_and_exponent(weight):
    """(sign, exponent), int32, of weights or of a pair of shifts and signs."""
    if isinstance(weight, (tuple, list)) and len(weight) == 2 and all(isinstance(part, Tensor) for part in weight):
        shift, sign = (part.detach().double() for part in weight)
        if shift.shape != sign.shape:
            shapes = f"{tuple(shift.shape)} and {tuple(sign.shape)}"
            raise ValueError(f"pack_shift_weights: shift and sign must have one shape, not {shapes}")
        shift = torch.where(sign == 0, 0, shift)
        if not (sign.abs().le(1) & (sign == sign.round()) & (shift == shift.round()) & shift.isfinite()).all():
            raise ValueError("pack_shift_weights: shift must be integers and sign -1, 0 or 1: round them first")
        if shift.abs().gt(126).any():
            raise ValueError("pack_shift_weights: a shift is beyond float32's exponents, -126 to 126")
        return sign.int(), shift.int()
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"pack_shift_weights: weight must be a floating tensor or a pair (shift, sign), not {kind}")
    weight = weight.detach().double()
    if not weight.isfinite().all():
        raise ValueError("pack_shift_weights: the weights contain NaN or infinity")
    fraction, exponent = torch.frexp(weight)
    wrong = (fraction.abs() != 0.5) & (weight != 0)
    if wrong.any():
        value = weight[wrong][0].item()
        raise ValueError(f"pack_shift_weights: {value:g} is neither 0 nor a power of two: round the weights first")
    return torch.sign(weight).int(), torch.where(weight == 0, 0, exponent - 1).int()


def _choose_code(sign, exponent, bits, scheme):
    """(bits, base, zero) of the code that holds these exponents."""
    used = exponent[sign != 0]
    has_zero = used.numel() < sign.numel()
    low, high = (int(used.min()), int(used.max())) if used.numel() else (0, 0)
    zero, top = scheme != "Q", 2 ** (bits - 1) - 1
    base = -1 if scheme == "S3" else -top
    if has_zero and not zero:
        zero = True
        if low < min(base + 1, high - top + 1):  # every magnitude is taken
            if bits == 6:
                raise ValueError("pack_shift_weights: Q weights of 6 bits use every magnitude and zero as well")
            bits, top = bits + 1, 2**bits - 1
            base = -top
    levels = top if zero else top + 1
    if high - low >= levels:
        raise ValueError(
            f"pack_shift_weights: exponents from {low} to {high} do not fit {bits}-bit {scheme} codes, which hold "
            f"{levels} magnitudes: clamp the weights to the range of their bits first"
        )
    first = base + zero
    first += min(0, low - first) + max(0, high - (first + levels - 1))
    if not -126 <= first <= 128 - levels:
        raise ValueError(f"pack_shift_weights: exponents from {low} to {high} are too near the ends of float32")
    return bits, first - zero, zero


def _arrange(code):
    """Codes of all weights in the order of storage, (blocks, 8 groups, 32), those without a weight 0."""
    if code.dim() == 2:
        rows, columns = code.shape
        panels, columns_filled = -(-rows // GROUP), -(-columns // 8) * 8
        code = torch.nn.functional.pad(code, (0, columns_filled - columns, 0, panels * GROUP - rows))
        return code.view(panels, GROUP, columns_filled // 8, 8).permute(0, 2, 3, 1).reshape(-1, 8, GROUP)
    flat = code.permute(0, 2, 3, 1).flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, 8, GROUP)


def _restore(code, shape):
    """Undoes `_arrange`."""
    if len(shape) == 2:
        panels, blocks = -(-shape[0] // GROUP), -(-shape[1] // 8)
        rows = code.view(panels, blocks, 8, GROUP).permute(0, 3, 1, 2).reshape(panels * GROUP, blocks * 8)
        return rows[: shape[0], : shape[1]]
    return in_order(code.flatten(), shape)


def in_order(flat, shape):
    """View of shape (out, in, kh, kw) on a convolution's weights as they are stored, and possibly more behind them."""
    outputs, inputs, *kernel = shape
    return flat[: _slots(shape)].view(outputs, *kernel, inputs).permute(0, 3, 1, 2)


def low_bits(bits):
    """Width of the first plane: 4 where a code has as many bits, else 2."""
    return 4 if bits >= 4 else 2


def _plane_bits(bits):
    # Position in the code of each one-bit plane: the sign, then what the first plane leaves of the magnitude.
    return [bits - 1, *range(low_bits(bits), bits - 1)] if bits != low_bits(bits) else []


def plane_order(bits):
    """Bit of a one-bit plane's bytes that each of the eight groups has.

    Moved right by the number of the group's vector of the first plane, it is where the group's low bits are in that
    vector: with both bytes in one word, the plane's bit is eight places above the low bits, as a float's sign is above
    the lower bits of its exponent.
    """
    width = low_bits(bits)
    per_byte = 8 // width
    return [width * (group % per_byte) + group // per_byte for group in range(8)]


def _plane_order(bits, device):
    return torch.tensor(plane_order(bits), device=device)[:, None]


def _interleave(code, bits):
    """(blocks, 8, 32) int codes -> 1-D uint8."""
    device, width = code.device, low_bits(bits)
    byte_of = torch.tensor(BYTE_OF, device=device)
    code = torch.empty_like(code).index_copy_(2, byte_of, code.contiguous())
    per_byte = 8 // width
    low = (code & (2**width - 1)).view(-1, 8 // per_byte, per_byte, GROUP)
    low = (low << (width * torch.arange(per_byte, device=device))[:, None]).sum(2)
    order = _plane_order(bits, device)
    planes = [((code >> bit & 1) << order).sum(1, keepdim=True) for bit in _plane_bits(bits)]
    return torch.cat([low, *planes], dim=1).to(torch.uint8).flatten()


def _deinterleave(codes, bits):
    """Undoes `_interleave`: 1-D uint8 -> (blocks, 8, 32) int32."""
    device, width = codes.device, low_bits(bits)
    vectors = codes.view(-1, bits, GROUP).int()
    shifts = (width * torch.arange(8 // width, device=device))[:, None]
    code = (vectors[:, :width, None] >> shifts & (2**width - 1)).reshape(-1, 8, GROUP)
    order = _plane_order(bits, device)
    for plane, bit in enumerate(_plane_bits(bits), start=width):
        code = code | (vectors[:, plane : plane + 1] >> order & 1) << bit
    return code[:, :, torch.tensor(BYTE_OF, device=device)]


def code_values(bits, base, zero):
    """Weights that the 2**bits codes stand for, as a list of floats; code = sign << (bits - 1) | magnitude."""
    positive = [2.0 ** (base + m) for m in range(2 ** (bits - 1))]
    if zero:
        positive[0] = 0.0
    return positive + [-value for value in positive]


def unpack_codes(codes, shape, bits, base, zero):
    """Weights of the codes, float32, in plain PyTorch: the definition of the packed form."""
    values = torch.tensor(code_values(bits, base, zero), dtype=torch.float32, device=codes.device)
    return values[_restore(_deinterleave(codes, bits), shape)]


def unpack_integers(codes, shape, bits):
    """(sign, magnitude) of the codes, int32, in plain PyTorch: sign is 0 or 1 (negative)."""
    code = _restore(_deinterleave(codes, bits), shape)
    return code >> (bits - 1), code & (2 ** (bits - 1) - 1)


def output_size(x_shape, weight_shape, stride, padding, dilation):
    """(N, out, H', W') of a convolution. Raises ValueError where the kernel exceeds the padded image."""
    images, _, height, width = x_shape
    outputs, _, kernel_h, kernel_w = weight_shape
    reach = dilation[0] * (kernel_h - 1) + 1, dilation[1] * (kernel_w - 1) + 1
    padded = height + 2 * padding[0], width + 2 * padding[1]
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise ValueError(f"convolution: the kernel spans {reach}, more than the padded image, {padded}")
    return images, outputs, (padded[0] - reach[0]) // stride[0] + 1, (padded[1] - reach[1]) // stride[1] + 1
