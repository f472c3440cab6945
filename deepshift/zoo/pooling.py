"""Adaptive average pooling whose gradient PyTorch can also sum in a fixed order on a GPU, for --deterministic."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OrderedAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """nn.AdaptiveAvgPool2d to the bit; its gradient, which PyTorch sums on CUDA in any order, by matrix products.

    Where the windows do not overlap (the output's size divides the input's) the gradient has PyTorch's bits too.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _Pool.apply(x, self.output_size)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, output_size):
        ctx.input_size = x.shape[-2:]
        return F.adaptive_avg_pool2d(x, output_size)

    @staticmethod
    def backward(ctx, grad):
        rows, columns = (_windows(*sizes, grad) for sizes in zip(ctx.input_size, grad.shape[-2:], strict=True))
        share = grad.to(rows.dtype) / rows.sum(1)[:, None] / columns.sum(1)
        return (rows.T @ share @ columns).to(grad.dtype), None


def _windows(inputs: int, outputs: int, like: Tensor) -> Tensor:
    """(outputs, inputs), 1 where an output averages an input; in float32 at least."""
    position, output = (torch.arange(size, device=like.device) for size in (inputs, outputs))
    start, stop = output * inputs // outputs, ((output + 1) * inputs + outputs - 1) // outputs
    inside = (position >= start[:, None]) & (position < stop[:, None])
    return inside.to(torch.promote_types(like.dtype, torch.float32))


def order_pool_gradients(model: nn.Module) -> nn.Module:
    """Put OrderedAdaptiveAvgPool2d in the place of all of nn.AdaptiveAvgPool2d; returns the network.

    A 1x1 output stays as it is: PyTorch makes it by a mean, whose gradient needs no sum.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.AdaptiveAvgPool2d and child.output_size not in (1, (1, 1)):
                setattr(parent, name, OrderedAdaptiveAvgPool2d(child.output_size))
    return model
