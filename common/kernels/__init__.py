"""Operations that PyTorch lacks, as torch operators: plain PyTorch reference, numba on the CPU, CUDA through CuPy."""

from common.kernels.shift2d import shift2d, shift2d_reference

__all__ = ["shift2d", "shift2d_reference"]
