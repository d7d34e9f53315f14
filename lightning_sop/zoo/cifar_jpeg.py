"""CIFAR-10 packed as JPEG files that share one header."""

import io
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_sop.zoo.images import ImageArrays, ImageData
from lightning_sop.zoo.loading import DataError

ARRAYS = ("header", "scan", "offset", "label")
IMAGE_SHAPE = (32, 32, 3)


class CifarJpeg(ImageData):
    """CIFAR-10 (3x32x32, 10 classes) from one npz file of JPEG images; decoding needs Pillow.

    The file holds four arrays: ``header`` (uint8, the bytes all images begin with), ``scan`` (uint8, the rest of every
    image in turn), ``offset`` (int, n + 1 limits in ``scan``) and ``label`` (uint8, n). JPEG loses detail, so
    accuracies compare with each other but not with those published for the lossless images.

    Args:
        path: the npz file.
        batch_size: images per batch and process.
        val_size: training images held out for validation.
        train_size: number of images that are the training set; those that follow are the test set.
        seed: seed of the validation split.
        num_workers: reading processes per loader.

    Raises:
        DataError: in ``setup``, when Pillow or the file is missing, or the file is corrupt or truncated.
    """

    mean = (0.4913, 0.4821, 0.4465)
    std = (0.2452, 0.2428, 0.2606)

    def __init__(
        self,
        path: str | Path,
        batch_size: int = 128,
        val_size: int = 5000,
        train_size: int = 50_000,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, val_size, seed, num_workers)
        self.path = Path(path)
        self.train_size = train_size

    def read(self) -> ImageArrays:
        arrays = read_arrays(self.path)
        images = decode(self.path, arrays)
        labels = torch.from_numpy(arrays["label"].astype(np.int64))
        split = self.train_size
        if not 0 < split < len(images):
            raise DataError(f"{self.path}: train_size={split} of {len(images)} images leaves no test set: lower it")
        return ImageArrays(images[:split], labels[:split], images[split:], labels[split:])


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read the four arrays and check that they fit each other.

    Args:
        path: the npz file.

    Raises:
        DataError: the file is missing, corrupt, truncated, or lacks an array.
    """
    try:
        # opened here, because numpy leaves the file open when it turns out to be no archive
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            missing = [name for name in ARRAYS if f"{name}.npy" not in archive.namelist()]
            if missing:
                raise DataError(f"{path}: no array {', '.join(missing)}; it must hold {', '.join(ARRAYS)}")
            arrays = {name: _read_array(archive, name) for name in ARRAYS}
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; give the path of the packed CIFAR-10") from error
    except DataError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise DataError(f"{path}: corrupt or truncated ({error}); get the file again") from error
    offset = arrays["offset"]
    ordered = offset.ndim == 1 and len(offset) > 1 and bool((np.diff(offset) >= 0).all())
    if not ordered or len(offset) != len(arrays["label"]) + 1 or offset[0] != 0 or offset[-1] != len(arrays["scan"]):
        raise DataError(f"{path}: offset, label and scan do not fit each other; get the file again")
    return arrays


def _read_array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    with archive.open(f"{name}.npy") as member:
        array: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
    return array


def decode(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> Tensor:
    """Decode every image.

    Args:
        path: where the arrays came from, for the messages.
        arrays: what ``read_arrays`` returned.

    Returns:
        uint8 images (n, 3, 32, 32).

    Raises:
        DataError: Pillow is not installed, or an image cannot be decoded.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("CifarJpeg needs Pillow: pip install pillow") from error
    header, scan, limits = arrays["header"].tobytes(), arrays["scan"].tobytes(), arrays["offset"].tolist()
    images = np.empty((len(limits) - 1, *IMAGE_SHAPE), np.uint8)
    for index, (start, stop) in enumerate(pairwise(limits)):
        try:
            with Image.open(io.BytesIO(header + scan[start:stop])) as image:
                images[index] = np.asarray(image)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: image {index} cannot be decoded ({error}); get the file again") from error
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
