"""Data sets and loaders that every paper uses: in-memory sets on the training device, and ImageNet-style folders."""

from common.data.augment import augment_batch
from common.data.datasets import load_dataset
from common.data.digits import load_digits_set, write_digits_folder
from common.data.image_folder import ImageFolderLoader
from common.data.image_set import DataError, ImageSet
from common.data.tensor_loader import TensorLoader

__all__ = [
    "DataError",
    "ImageFolderLoader",
    "ImageSet",
    "TensorLoader",
    "augment_batch",
    "load_dataset",
    "load_digits_set",
    "write_digits_folder",
]
