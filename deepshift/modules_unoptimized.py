"""Float layers on naive multiplying kernels: the baseline that the shift kernels' latency is compared with."""

from torch import nn

from deepshift.geometry import ConvGeometry


class UnoptimizedLinear(nn.Module):
    """An nn.Linear whose product is multiply_linear. Inference only; same weight and bias."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        from common.kernels import multiply_linear

        return multiply_linear(x, self.weight, self.bias)


class UnoptimizedConv2d(nn.Module):
    """An nn.Conv2d whose convolution is multiply_conv2d. Inference only; same weight and bias."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.geometry = ConvGeometry.of(layer)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        from common.kernels import multiply_conv2d

        g = self.geometry
        x, padding = g.padded(x)
        return multiply_conv2d(x, self.weight, self.bias, g.stride, padding, g.dilation, g.groups)
