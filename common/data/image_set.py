"""What every loader takes: a whole data set as tensors, and the one error that a user may see."""

import dataclasses

import torch
from torch import Tensor


class DataError(Exception):
    """A data set that cannot be used. The text is one line for the user: what is wrong and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A data set in memory.

    images: uint8 (N, C, H, W). targets: int64 (N,), indices into `classes`, the names. name: of the set, for messages.
    Raises ValueError if shapes or dtypes are others.
    """

    images: Tensor
    targets: Tensor
    classes: list[str]
    name: str

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(f"images must be uint8 (N, C, H, W), not {self.images.dtype} {tuple(self.images.shape)}")
        if self.targets.dtype != torch.int64 or self.targets.shape != self.images.shape[:1]:
            raise ValueError(f"targets must be int64 ({len(self.images)},), not {tuple(self.targets.shape)}")

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, count: int) -> "ImageSet":
        """The first `count` images (`--train-size`), all of them if there are fewer. Raises DataError if count < 1."""
        if count < 1:
            raise DataError(f"{self.name}: cannot train on {count} images; --train-size must be at least 1")
        return dataclasses.replace(self, images=self.images[:count], targets=self.targets[:count])
