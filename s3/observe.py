"""What training does to the discrete weights, the subject of the paper: zeros, and signs that change."""

import torch
from torch import nn

from s3.s3conv2dshift import LatentConv2d


def block_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Convolutions inside of the blocks and in the shortcuts: those that S3 quantises, of float networks too."""
    return {name: layer for name, layer in model.named_modules()
            if isinstance(layer, nn.Conv2d) and name.startswith("layer")}  # fmt: skip


class WeightWatch:
    """Compares the weights of block_convolutions at two moments, such as the start and the end of an epoch."""

    def __init__(self, model: nn.Module):
        self.layers = block_convolutions(model)
        self.is_latent = any(isinstance(layer, LatentConv2d) for layer in self.layers.values())

    @torch.no_grad()
    def look(self) -> dict[str, tuple]:
        """Per layer (sign latent or float weight >= 0, discrete weight as int16 or None)."""
        return {name: (layer.weight >= 0, layer.discrete_weight().to(torch.int16) if self.is_latent else None)
                for name, layer in self.layers.items()}  # fmt: skip

    def compare(self, before: dict[str, tuple]) -> dict[str, float]:
        """Shares of all watched weights, 0 to 1.

        sign_changes: of signs (of float weights: theirs) that are others than `before`. Of latent networks also
        weight_changes: of discrete weights that are others; zeros: that are 0 now. Without such layers: {}.
        """
        if not self.layers:
            return {}
        now, sums = self.look(), torch.zeros(3, dtype=torch.float64)
        total = sum(layer.weight.numel() for layer in self.layers.values())
        for name, (sign, weight) in now.items():
            old_sign, old_weight = before[name]
            sums[0] += (sign != old_sign).sum().item()
            if self.is_latent:
                sums[1] += (weight != old_weight).sum().item()
                sums[2] += (weight == 0).sum().item()
        shares = (sums / total).tolist()
        names = ("sign_changes", "weight_changes", "zeros") if self.is_latent else ("sign_changes",)
        return dict(zip(names, shares, strict=False))
