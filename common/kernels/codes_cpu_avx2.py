"""Products of small weights (codes_cpu.py) with inputs, in assembly for processors with AVX2 and FMA.

For the same instructions LLVM runs out of registers and moves sums and constants to the stack and back: 3 bits take a
tenth longer.
"""

from llvmlite import ir
from numba.core import cgutils

from common.kernels.bitshift_pack import low_bits
from common.kernels.vectors import FLOATS, I8, I32, processor_has

SUMS = 8  # vectors: two for each 8 of the 32 outputs, as an addition takes longer than the next weight


def available():
    return processor_has("avx2", "fma")


def _constants(bits, zero):
    """Words of eight each, by place of a code in a byte: factors, fields, and what turns fields into small weights."""
    width = low_bits(bits)
    magnitudes, offset = 2 ** (bits - 1) - 1, 0 if zero else 2 ** (bits - 1)
    words = []
    for place in range(0, 8, width):
        fields = 0x10001 * (1 << 8 | magnitudes) << place
        words += [1 << (7 - place) << 16, fields & 0xFFFFFFFF, 0x10001 * offset << place]
    return [word for word in words for _ in range(8)]


def _pairs(bits, plane):
    """ymm8, ymm9: the bytes of a plane of codes, each below a byte with its signs."""
    width = low_bits(bits)
    if bits == width:
        signs = [f"vpsrlw $${width - 1}, %ymm8, %ymm10"]
    else:
        signs = [f"vmovdqu {32 * width}($8), %ymm10"]
        if plane:
            signs.append(f"vpsrlw $${plane}, %ymm10, %ymm10")
    interleave = ["vpunpckhbw %ymm10, %ymm8, %ymm9", "vpunpcklbw %ymm10, %ymm8, %ymm8"]
    return [f"vmovdqu {32 * plane}($8), %ymm8", *signs, *interleave]


def _products(place, zero, pairs, total):
    """ymm`total` and the next += the lower and the upper codes of the words of ymm`pairs`, times ymm10."""
    return [
        f"vpand %ymm14, %ymm{pairs}, %ymm11",
        *([] if zero else ["vpor %ymm15, %ymm11, %ymm11"]),
        "vpmullw %ymm13, %ymm11, %ymm12",
        f"vpslld $${23 - place}, %ymm11, %ymm11",
        f"vfmadd231ps %ymm11, %ymm10, %ymm{total}",
        f"vfmadd231ps %ymm12, %ymm10, %ymm{total + 1}",
    ]


def _block(bits, zero):
    """A block of eight inputs: $8 its codes, $9 the inputs, $10 the constants; ymm0 to ymm7 the sums."""
    lines, group = [], 0
    for plane in range(low_bits(bits)):
        lines += _pairs(bits, plane)
        for index, place in enumerate(range(0, 8, low_bits(bits))):
            lines.append(f"vbroadcastss {4 * group}($9), %ymm10")
            lines += [f"vmovdqu {96 * index + 32 * i}($10), %ymm{13 + i}" for i in range(2 if zero else 3)]
            for half in (0, 1):
                lines += _products(place, zero, 8 + half, 4 * (group % 2) + 2 * half)
            group += 1
    return lines


def add_products(builder, bits, zero, codes, x, sums):
    """sums, pointers to `SUMS` vectors, += the small weights of the block at `codes` times the eight inputs at x.

    Sum i is of outputs 8 * (i % 4) to 8 * (i % 4) + 7.
    """
    words = _constants(bits, zero)
    kind = ir.ArrayType(I32, len(words))
    constants = cgutils.global_constant(builder.module, f"small_weights_{bits}_{zero}", ir.Constant(kind, words))
    constants.align = 64
    pointer = I8.as_pointer()
    addresses = [builder.inttoptr(codes, pointer), builder.inttoptr(x, pointer), builder.bitcast(constants, pointer)]
    result = ir.LiteralStructType([FLOATS] * SUMS)
    function = ir.FunctionType(result, [pointer] * 3 + [FLOATS] * SUMS)
    outputs = [f"={{ymm{i}}}" for i in range(SUMS)]
    used = [f"~{{ymm{i}}}" for i in range(SUMS, 16)]
    operands = ",".join([*outputs, "r", "r", "r", *map(str, range(SUMS)), *used, "~{memory}"])
    text = "\\0A".join(_block(bits, zero))
    totals = builder.asm(function, text, operands, [*addresses, *map(builder.load, sums)], True)
    for i, total in enumerate(sums):
        builder.store(builder.extract_value(totals, i), total)
