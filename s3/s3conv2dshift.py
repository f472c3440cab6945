"""Convolutions whose weights are built from latent tensors: S3 and its successor DenseShift.

Names and order of the state dict are the original's: weight, (bias), weight_sign, weight_val, weight_shift,
weight_shift2. `weight` and `weight_sign` are one tensor, the sign latent, under two names.
"""

import math

import torch
from torch import Tensor, nn

from s3.quantizers import denseshift_shift_count, denseshift_weight, s3_shift_count, s3_weight

LOW_VARIANCE = 1e-3  # standard deviation of DenseShift's initial latents
STARTS = ("default", "dense")


class LatentConv2d(nn.Conv2d):
    """nn.Conv2d with a weight that `discrete_weight` builds in every training step.

    Without gradients it is built once and kept until a latent changes (its version or its storage; a change through
    `.data` is seen at the next .train() or .eval() only). Arguments as nn.Conv2d, and bits: 2 to 4 per weight.
    Loading: `weight_sign` wins over `weight`, either is enough. Raises ValueError for other bits.
    """

    latent_names: tuple[str, ...]  # sign first; shifts outermost first

    def __init__(self, *args, bits: int = 3, **kwargs):
        super().__init__(*args, **kwargs)
        self.bits, self._kept = bits, None
        self.register_parameter("weight_sign", self.weight)

    def _add_latents(self, names):
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.empty_like(self.weight)))
        if not self.weight.is_meta:
            # A generator of its own: the numbers that later layers draw stay those of the original.
            seed = int(self.weight.detach().double().sum().view(torch.int64))
            self.reset_latents(generator=torch.Generator(self.weight.device).manual_seed(seed))

    @property
    def latents(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.latent_names]

    @property
    def he_deviation(self) -> float:
        """Standard deviation of the initial weights: He's, by fan-out."""
        return math.sqrt(2 / (self.kernel_size[0] * self.kernel_size[1] * self.out_channels))

    def reset_latents(self, start: str = "default", generator=None):
        raise NotImplementedError

    def discrete_weight(self) -> Tensor:
        """The weight that the layer multiplies with, 0 or +-2**e, shape and dtype of `weight`."""
        raise NotImplementedError

    def current_weight(self) -> Tensor:
        """discrete_weight, kept while no gradient is wanted and no latent changes."""
        latents = self.latents
        if self.training or torch.compiler.is_compiling() or any(latent.is_inference() for latent in latents):
            return self.discrete_weight()
        if torch.is_grad_enabled() and any(latent.requires_grad for latent in latents):
            return self.discrete_weight()
        state = [(latent.data_ptr(), latent._version, latent.dtype) for latent in latents]
        if self._kept is None or self._kept[0] != state:
            self._kept = state, self.discrete_weight()
        return self._kept[1]

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.current_weight(), self.bias)

    def train(self, mode=True):
        self._kept = None
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        self._kept = None
        self._parameters["weight_sign"] = self._parameters["weight"]  # a new device may have made two of them
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        names = [prefix + name for name in ("weight", "weight_sign")]
        for name, other in (names, reversed(names)):
            if name not in state_dict and other in state_dict:
                state_dict[name] = state_dict[other]
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._kept = None
        self._parameters["weight"] = self._parameters["weight_sign"]

    def __getstate__(self):
        return {**self.__dict__, "_kept": None}

    def extra_repr(self):
        return f"{super().extra_repr()}, bits={self.bits}"


class S3Conv2d(LatentConv2d):
    """Sign-Sparse-Shift convolution (arXiv 2107.03453): weights 0, +-1, +-2, +-4 with 3 bits.

    2 bits (0, +-1) and 4 bits (0, +-1 ... +-64) continue its recursion; the published code has 3 bits only.
    """

    def __init__(self, *args, bits: int = 3, **kwargs):
        count = s3_shift_count(bits)
        super().__init__(*args, bits=bits, **kwargs)
        shifts = [f"weight_shift{'' if index == 1 else index}" for index in range(1, count + 1)]
        self.latent_names = ("weight_sign", "weight_val", *shifts)
        self._add_latents(self.latent_names[1:])

    @torch.no_grad()
    def reset_latents(self, start="default", generator=None):
        """All latents N(0, he_deviation**2): half of the weights are 0. start="dense": all are +-1, none is 0.

        The sign latent is drawn by whoever initialises plain convolutions, and once more here, as in the original
        (not with a generator: then the constructor has drawn it).
        """
        for name in self.latent_names if generator is None else self.latent_names[1:]:
            getattr(self, name).normal_(0, self.he_deviation, generator=generator)
        if start == "dense":  # of the original's first version, before its release
            self.weight_val.abs_()
            for name in self.latent_names[2:]:
                getattr(self, name).abs_().neg_()

    def discrete_weight(self):
        return s3_weight(*self.latents)


class DenseShiftConv2d(LatentConv2d):
    """DenseShift convolution (ICCV 2023): weights +-1 ... +-8 with 3 bits, never zero."""

    def __init__(self, *args, bits: int = 3, **kwargs):
        count = denseshift_shift_count(bits)
        super().__init__(*args, bits=bits, **kwargs)
        shifts = [f"weight_t{index}" for index in range(1, count + 1)]
        self.latent_names = ("weight_sign", *reversed(shifts))  # the last one is the outermost
        self._add_latents(shifts)

    @torch.no_grad()
    def reset_latents(self, start="default", generator=None):
        """All latents N(0, 0.001**2), whatever `start` says."""
        for name in ("weight_sign", *sorted(self.latent_names[1:])) if generator is None else self.latent_names[1:]:
            getattr(self, name).normal_(0, LOW_VARIANCE, generator=generator)

    def discrete_weight(self):
        return denseshift_weight(*self.latents)


def latent_layers(model: nn.Module) -> dict[str, LatentConv2d]:
    """All S3 and DenseShift convolutions by name, in the order of registration."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LatentConv2d)}


def sparse_latents(model: nn.Module) -> list[Tensor]:
    """The sparse latents (weight_val) that the regulariser is about; DenseShift has none."""
    return [layer.weight_val for layer in latent_layers(model).values() if isinstance(layer, S3Conv2d)]
