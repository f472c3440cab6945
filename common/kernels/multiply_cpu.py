"""CPU kernels of multiply, compiled by numba: plain loops, one output after the other. Imported on first use."""

from llvmlite import ir
from numba import carray, config, float32, njit, types
from numba.extending import intrinsic

from common.kernels import threads
from common.kernels.bitshift_cuda import conv2d_sizes
from common.kernels.vectors import fetch_add


@intrinsic
def _floats(typing, address):
    """The address as a pointer to floats"""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


@njit
def _linear(counters, grain, outputs, weight, x, y, rows, inputs):
    while True:
        first = fetch_add(counters, grain)
        for output in range(first, min(first + grain, outputs)):
            for row in range(rows):
                total = float32(0)
                for i in range(inputs):
                    total += weight[output * inputs + i] * x[row * inputs + i]
                y[row * outputs + output] = total
        if first + grain >= outputs:
            return


@njit
def _conv2d(counters, grain, planes, weight, x, y, sizes):
    inputs, height, width, outputs, y_height, y_width = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
    kernel_h, kernel_w, stride_h, stride_w, padding_h = sizes[6], sizes[7], sizes[8], sizes[9], sizes[10]
    padding_w, dilation_h, dilation_w, groups = sizes[11], sizes[12], sizes[13], sizes[14]
    while True:
        first = fetch_add(counters, grain)
        for plane in range(first, min(first + grain, planes)):
            output, image = plane % outputs, plane // outputs
            source = (image * groups + output // (outputs // groups)) * inputs
            for row in range(y_height):
                for column in range(y_width):
                    total, index = float32(0), output * inputs * kernel_h * kernel_w
                    for c in range(inputs):
                        for i in range(kernel_h):
                            h = row * stride_h - padding_h + i * dilation_h
                            for j in range(kernel_w):
                                w = column * stride_w - padding_w + j * dilation_w
                                if 0 <= h < height and 0 <= w < width:
                                    total += weight[index] * x[((source + c) * height + h) * width + w]
                                index += 1
                    y[(plane * y_height + row) * y_width + column] = total
        if first + grain >= planes:
            return


def _linear_entry(arguments):
    a = carray(arguments, 10)
    outputs, rows, inputs = a[4], a[8], a[9]
    weight, x, y = _floats(a[5]), _floats(a[6]), _floats(a[7])
    sizes = outputs * inputs, rows * inputs, rows * outputs
    _linear(a[0], a[3], outputs, carray(weight, sizes[0]), carray(x, sizes[1]), carray(y, sizes[2]), rows, inputs)


def _conv2d_entry(arguments):
    a = carray(arguments, 26)
    weight, x, y = _floats(a[5]), _floats(a[6]), _floats(a[7])
    _conv2d(a[0], a[3], a[4], carray(weight, a[8]), carray(x, a[9]), carray(y, a[10]), a[11:26])


def load():
    """Raises ImportError where numba is switched off."""
    if config.DISABLE_JIT:
        raise ImportError("numba is switched off (NUMBA_DISABLE_JIT)")


def linear(x, weight, y):
    """Write x (rows, in) @ weight.T into y (rows, out): float32, contiguous, on the CPU, not empty."""
    arguments = weight.data_ptr(), x.data_ptr(), y.data_ptr(), *x.shape
    threads.run(threads.compiled(_linear_entry), arguments, len(weight), x.numel() * 4)


def conv2d(x, weight, y, stride, padding, dilation, groups):
    """Write the convolution of x (N, in, H, W) into y (N, out, H', W'): float32, contiguous, on the CPU, not empty."""
    batch, *sizes = conv2d_sizes(x.shape, weight.shape, y.shape, stride, padding, dilation, groups)
    counts = weight.numel(), x.numel(), y.numel()
    arguments = weight.data_ptr(), x.data_ptr(), y.data_ptr(), *counts, *sizes
    plane_bytes = y.shape[2] * y.shape[3] * weight[0].numel() * 4
    threads.run(threads.compiled(_conv2d_entry), arguments, batch * len(weight), max(1, plane_bytes))
