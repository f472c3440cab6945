"""Power-of-two weights of every scheme, and what they should compute, independently of common.kernels."""

import torch

CODES = [(scheme, bits) for scheme in ("PS", "Q", "S3") for bits in range(2, 7)]


def exponents(scheme, bits):
    """(lowest, highest) exponent of a scheme, from the papers' ranges."""
    return {"PS": (2 - 2 ** (bits - 1), 0), "Q": (1 - 2 ** (bits - 1), 0), "S3": (0, 2 ** (bits - 1) - 2)}[scheme]


def random_parts(shape, scheme, bits, seed=0, most=None):
    """(shift, sign), int64, of random weights that use every exponent (up to `most`); Q has no zeros."""
    generator = torch.Generator().manual_seed(seed)
    low, high = exponents(scheme, bits)
    high = high if most is None else min(high, most)
    shift = torch.randint(low, high + 1, shape, generator=generator)
    sign = torch.randint(-1, 2, shape, generator=generator)
    return shift, torch.where(sign == 0, 1, sign) if scheme == "Q" else sign


def random_weights(shape, scheme, bits, seed=0, most=None):
    shift, sign = random_parts(shape, scheme, bits, seed, most)
    return sign * 2.0**shift


def shifted_terms(x, shift, sign):
    """Fixed-point products, int64, broadcast: x * 2**shift rounded down, with the sign; 0 for sign 0."""
    return torch.div(x.long() << shift.clamp(min=0), 2 ** (-shift).clamp(min=0), rounding_mode="floor") * sign


def fixed_linear(x, shift, sign):
    """int64 (rows, out), exact: term by term."""
    return shifted_terms(x[:, None], shift, sign).sum(-1)


def fixed_conv2d(x, shift, sign, stride, padding, dilation, groups):
    """int64 (N, out, H', W'), exact: loops over groups and kernel positions."""
    outputs, inputs, kernel_h, kernel_w = shift.shape
    x = torch.nn.functional.pad(x.long(), (padding[1], padding[1], padding[0], padding[0]))
    height = (x.shape[2] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    width = (x.shape[3] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    y = torch.zeros(len(x), outputs, height, width, dtype=torch.int64)
    for output in range(outputs):
        group = output // (outputs // groups)
        for c in range(inputs):
            for i in range(kernel_h):
                for j in range(kernel_w):
                    rows = slice(i * dilation[0], i * dilation[0] + (height - 1) * stride[0] + 1, stride[0])
                    columns = slice(j * dilation[1], j * dilation[1] + (width - 1) * stride[1] + 1, stride[1])
                    part = x[:, group * inputs + c, rows, columns]
                    y[:, output] += shifted_terms(part, shift[output, c, i, j], sign[output, c, i, j])
    return y
