"""The part that all image DataModules share: splits held as bytes, normalized batch by batch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_sop.zoo.loading import DataError, SplitDataModule


@dataclass(frozen=True)
class ImageArrays:
    """A training and a test set as read: uint8 images (n, channels, height, width) and int64 labels (n,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """Images kept as uint8 and handed out as float32 ``(pixel / scale - mean) / std`` with their labels.

    Args:
        images: uint8 (n, channels, height, width).
        labels: int64 (n,).
        scale: largest pixel value.
        mean: mean of pixel / scale, per channel.
        std: standard deviation of pixel / scale, per channel.
    """

    def __init__(self, images: Tensor, labels: Tensor, scale: float, mean: Sequence[float], std: Sequence[float]) -> None:
        self.images = images
        self.labels = labels
        self.scale = scale
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch: float32 images (len(indices), channels, height, width) and int64 labels (len(indices),)."""
        images = (self.images[indices].float() / self.scale - self.mean) / self.std
        return images, self.labels[indices]


class ImageData(SplitDataModule, ABC):
    """Base of the image DataModules: a seeded validation split, and loaders.

    Args:
        batch_size: images per batch and process.
        val_size: images held out of the training set for validation.
        seed: seed of the split; the split depends on nothing else.
        num_workers: reading processes per loader.
    """

    scale: ClassVar[float] = 255.0
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def __init__(self, batch_size: int, val_size: int, seed: int, num_workers: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.val_size = val_size
        self.seed = seed
        self.num_workers = num_workers
        self._splits: dict[str, ImageSet] = {}

    @abstractmethod
    def read(self) -> ImageArrays:
        """Read training and test images.

        Raises:
            DataError: the data are missing or unusable.
        """

    def setup(self, stage: str | None = None) -> None:
        if self._splits:
            return
        arrays = self.read()
        available = len(arrays.train_images)
        if not 0 < self.val_size < available:
            raise DataError(f"val_size={self.val_size} must leave some of the {available} training images: lower it")
        order = torch.randperm(available, generator=torch.Generator().manual_seed(self.seed))
        held_out, kept = order[: self.val_size], order[self.val_size :]
        self._splits = {
            "train": self._image_set(arrays.train_images[kept], arrays.train_labels[kept]),
            "val": self._image_set(arrays.train_images[held_out], arrays.train_labels[held_out]),
            "test": self._image_set(arrays.test_images, arrays.test_labels),
        }

    def _image_set(self, images: Tensor, labels: Tensor) -> ImageSet:
        return ImageSet(images, labels, self.scale, self.mean, self.std)
