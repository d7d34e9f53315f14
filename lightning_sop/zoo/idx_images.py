"""Images in the idx format of MNIST, Fashion-MNIST and their kin."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_sop.zoo.images import ImageArrays, ImageData
from lightning_sop.zoo.loading import DataError

UNSIGNED_BYTE = 0x08
"""The idx code of the only element type these data sets use."""


class IdxImages(ImageData):
    """Fashion-MNIST, MNIST or another set of four gzipped idx files: 28x28 pixels, 1 channel, 10 classes.

    The folder holds ``train-images-idx3-ubyte.gz``, ``train-labels-idx1-ubyte.gz`` and the two ``t10k-…`` files.
    Pixels are normalized with the mean and deviation of Fashion-MNIST's training set.

    Args:
        root: folder with the four files.
        batch_size: images per batch and process.
        val_size: training images held out for validation.
        seed: seed of the split.
        num_workers: reading processes per loader.

    Raises:
        DataError: in ``setup``, when a file is missing, corrupt, truncated or does not fit its sibling.
    """

    mean = (0.2860,)
    std = (0.3530,)

    def __init__(
        self, root: str | Path, batch_size: int = 128, val_size: int = 5000, seed: int = 0, num_workers: int = 0
    ) -> None:
        super().__init__(batch_size, val_size, seed, num_workers)
        self.root = Path(root)

    def read(self) -> ImageArrays:
        train_images, train_labels = self._read_split("train")
        test_images, test_labels = self._read_split("t10k")
        return ImageArrays(train_images, train_labels, test_images, test_labels)

    def _read_split(self, prefix: str) -> tuple[Tensor, Tensor]:
        images_path = self.root / f"{prefix}-images-idx3-ubyte.gz"
        labels_path = self.root / f"{prefix}-labels-idx1-ubyte.gz"
        images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
        if len(images) != len(labels):
            raise DataError(
                f"{labels_path}: {len(labels)} labels for {len(images)} images in {images_path.name}; "
                "take both files from the same data set"
            )
        return images.unsqueeze(1), labels.to(torch.int64)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read one gzipped idx file of unsigned bytes.

    Args:
        path: file name.
        dimensions: number of dimensions the array must have.

    Returns:
        uint8 tensor of the shape that the file's header gives.

    Raises:
        DataError: the file is missing, corrupt, truncated, or holds another kind of array.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; put the data set's four .gz files into that folder") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: corrupt or truncated ({error}); download it again") from error
    header_size = 4 + 4 * dimensions
    if len(content) < header_size or content[:4] != bytes([0, 0, UNSIGNED_BYTE, dimensions]):
        raise DataError(f"{path}: not an idx file of unsigned bytes in {dimensions} dimension(s); check its name")
    shape = struct.unpack(f">{dimensions}I", content[4:header_size])
    if len(content) - header_size != math.prod(shape):
        raise DataError(
            f"{path}: {len(content) - header_size} bytes of data where its header announces {math.prod(shape)}; "
            "download it again"
        )
    values = np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)
    return torch.from_numpy(values.copy())
