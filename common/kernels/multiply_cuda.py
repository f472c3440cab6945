"""CUDA kernels of multiply: multiply.cu, a thread per output. CuPy is imported on first use."""

import numpy as np
import torch

from common.kernels import launch
from common.kernels.bitshift_cuda import conv2d_sizes, plan_outputs


def load():
    """Raises ImportError, or what CuPy raises, where kernels cannot be compiled and launched here."""
    launch.load("multiply", "multiply_linear", torch.cuda.current_device())


def linear(x, weight, y):
    """Write x (rows, in) @ weight.T into y (rows, out): float32, contiguous, on one device, not empty."""
    sizes = map(np.int32, (*x.shape, len(weight)))
    launch.launch("multiply", "multiply_linear", *plan_outputs(y.numel()), weight, x, y, *sizes)


def conv2d(x, weight, y, stride, padding, dilation, groups):
    """Write the convolution of x (N, in, H, W) into y (N, out, H', W'): float32, contiguous, one device, not empty."""
    sizes = conv2d_sizes(x.shape, weight.shape, y.shape, stride, padding, dilation, groups)
    launch.launch("multiply", "multiply_conv2d", *plan_outputs(y.numel()), weight, x, y, *map(np.int32, sizes))
