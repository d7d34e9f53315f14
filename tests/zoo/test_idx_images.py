"""idx files: read back exactly, and every way of being broken named."""

import gzip
import struct

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lightning_sop.zoo import DataError, IdxImages
from lightning_sop.zoo.idx_images import read_idx

PIXELS, CLASSES = load_digits(return_X_y=True)
SIZES = {"train": 100, "t10k": 40}


def idx_bytes(array, code=8):
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """The first 140 digits in the four files of the format."""
    start = 0
    for prefix, size in SIZES.items():
        images = PIXELS[start : start + size].astype(np.uint8).reshape(-1, 8, 8)
        labels = CLASSES[start : start + size].astype(np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
        start += size
    return tmp_path


def test_images_and_labels_come_back(folder):
    arrays = IdxImages(folder).read()
    assert arrays.train_images.shape == (100, 1, 8, 8)
    assert arrays.test_images.flatten(1).tolist() == PIXELS[100:140].tolist()
    assert arrays.train_labels.tolist() == CLASSES[:100].tolist()
    assert arrays.train_labels.dtype == torch.int64


def test_splits_and_normalization(folder):
    data = IdxImages(folder, batch_size=64, val_size=30)
    data.setup("fit")
    assert [len(getattr(data, f"{split}_dataloader")().dataset) for split in ("train", "val", "test")] == [70, 30, 40]
    images, _ = next(iter(data.test_dataloader()))
    expected = (PIXELS[100:140] / 255 - 0.2860) / 0.3530
    np.testing.assert_allclose(images.flatten(1), expected, rtol=1e-5)


def spoil(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip file at all", "corrupt or truncated"),
        (gzip.compress(bytes(5000))[:-12], "corrupt or truncated"),
        (gzip.compress(b""), "not an idx file of unsigned bytes in 3"),
        (gzip.compress(idx_bytes(np.zeros((2, 3, 3), np.float32), code=0x0D)), "not an idx file of unsigned bytes in 3"),
        (gzip.compress(idx_bytes(np.zeros(9, np.uint8))), "not an idx file of unsigned bytes in 3"),
        (gzip.compress(idx_bytes(np.zeros((2, 3, 3), np.uint8))[:-1]), "17 bytes of data where its header announces 18"),
    ],
    ids=["not gzip", "cut gzip", "empty", "other type", "labels", "cut data"],
)
def test_broken_files_are_named(content, message, tmp_path):
    path = spoil(tmp_path / "train-images-idx3-ubyte.gz", content)
    with pytest.raises(DataError, match=f"train-images-idx3-ubyte.gz: {message}"):
        read_idx(path, dimensions=3)


def test_a_missing_file_is_named(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz: no such file; put the data set's four"):
        IdxImages(folder).setup()


def test_labels_of_another_set_are_noticed(folder):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(DataError, match="40 labels for 100 images"):
        IdxImages(folder).setup()
