"""Data of the tasks that the zoo has no module for."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_sop.zoo import DataError, IdxImages
from lightning_sop.zoo.images import ImageArrays, ImageData, ImageSet
from lightning_sop.zoo.loading import SplitDataModule
from lightning_sop.zoo.python_source import TokenWindows


class FirstImages(IdxImages):
    """The first training images of an idx set; validation images are drawn from those that follow.

    Args:
        root: folder with the four files.
        train_size: how many of the first images are trained on.
        batch_size: images per batch.
        val_size: images of the rest for validation.
        seed: of that choice.
    """

    def __init__(
        self, root: str | Path, train_size: int = 10_000, batch_size: int = 128, val_size: int = 5000, seed: int = 0
    ) -> None:
        super().__init__(root, batch_size, val_size, seed)
        self.train_size = train_size

    def setup(self, stage: str | None = None) -> None:
        if self._splits:
            return
        arrays = self.read()
        rest = len(arrays.train_images) - self.train_size
        if not 0 < self.val_size <= rest:
            raise DataError(f"train_size={self.train_size} leaves {rest} images, fewer than val_size={self.val_size}")
        order = self.train_size + torch.randperm(rest, generator=torch.Generator().manual_seed(self.seed))
        held_out = order[: self.val_size]
        self._splits = {
            "train": self._image_set(arrays.train_images[: self.train_size], arrays.train_labels[: self.train_size]),
            "val": self._image_set(arrays.train_images[held_out], arrays.train_labels[held_out]),
            "test": self._image_set(arrays.test_images, arrays.test_labels),
        }


class Letters(ImageData):
    """UCI's letter recognition: 16 features as 16 channels of one pixel, 26 classes; the last 4,000 rows are the test.

    Args:
        path: npz file with ``x`` (uint8 (20000, 16)) and ``y`` (uint8 (20000,)).
        batch_size: rows per batch.
        val_size: of the first 16,000 rows, those held out for validation.
        seed: of that split.
    """

    train_rows = 16_000

    def __init__(self, path: str | Path, batch_size: int = 128, val_size: int = 2000, seed: int = 0) -> None:
        super().__init__(batch_size, val_size, seed, 0)
        self.path = Path(path)

    def read(self) -> ImageArrays:
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"].astype(np.int64))
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.path}: no readable npz file with x and y ({error})") from error
        rows, cut = x.view(len(x), -1, 1, 1), self.train_rows
        self._std, self._mean = torch.std_mean(x[:cut].float(), dim=0)
        return ImageArrays(rows[:cut], y[:cut], rows[cut:], y[cut:])

    def _image_set(self, images: Tensor, labels: Tensor) -> ImageSet:
        return ImageSet(images, labels, 1.0, self._mean.tolist(), self._std.tolist())


class Characters(SplitDataModule):
    """Characters of one text: the first ones are trained on, the last tenth is halved into validation and test.

    Tokens are the numbers of the text's distinct characters in their order.

    Args:
        path: text in UTF-8, plain or .gz.
        context: characters per window.
        train_size: characters to train on.
        batch_size: windows per batch.
    """

    def __init__(self, path: str | Path, context: int = 64, train_size: int = 200_000, batch_size: int = 32) -> None:
        super().__init__()
        self.path, self.context, self.train_size = Path(path), context, train_size
        self.batch_size, self.num_workers = batch_size, 0
        self._splits: dict[str, TokenWindows] = {}

    def setup(self, stage: str | None = None) -> None:
        if self._splits:
            return
        try:
            content = self.path.read_bytes()
            text = (gzip.decompress(content) if self.path.suffix == ".gz" else content).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: no readable text ({error})") from error
        numbers = {character: number for number, character in enumerate(sorted(set(text)))}
        tokens = torch.tensor([numbers[character] for character in text], dtype=torch.int16)
        held_out = len(tokens) * 9 // 10
        if not 0 < self.train_size <= held_out:
            raise DataError(
                f"{self.path}: train_size={self.train_size} of {len(tokens)} characters reaches into the last tenth"
            )
        half = held_out + (len(tokens) - held_out) // 2
        parts = {"train": tokens[: self.train_size], "val": tokens[held_out:half], "test": tokens[half:]}
        self._splits = {split: TokenWindows(part, self.context) for split, part in parts.items()}
