"""The packed JPEG images: decoded as Pillow decodes them one by one, and every way of being broken named."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from lightning_sop.zoo import CifarJpeg, DataError

COUNT = 12


def photographs():
    """Tiles of 32x32 pixels of a photograph that comes with scikit-learn."""
    photograph = load_sample_image("china.jpg")
    return [photograph[row : row + 32, column : column + 32] for row in (0, 200, 350) for column in (0, 150, 300, 500)]


def jpeg(tile):
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


@pytest.fixture
def arrays():
    """The four arrays of the format, of twelve tiles whose label is their number."""
    files = [jpeg(tile) for tile in photographs()]
    start = files[0].index(b"\xff\xda")  # the scan follows the header that all files of one quality and size share
    start += 2 + int.from_bytes(files[0][start + 2 : start + 4], "big")
    assert all(file[:start] == files[0][:start] for file in files)
    scans = [file[start:] for file in files]
    return {
        "header": np.frombuffer(files[0][:start], np.uint8),
        "scan": np.frombuffer(b"".join(scans), np.uint8),
        "offset": np.cumsum([0, *map(len, scans)]).astype(np.int32),
        "label": np.arange(COUNT).astype(np.uint8),
    }


@pytest.fixture
def path(arrays, tmp_path):
    np.savez(tmp_path / "cifar.npz", **arrays)
    return tmp_path / "cifar.npz"


def test_images_are_those_of_pillow(path):
    decoded = CifarJpeg(path, train_size=8).read()
    images = torch.cat([decoded.train_images, decoded.test_images])
    assert images.shape == (COUNT, 3, 32, 32)
    for index, tile in enumerate(photographs()):
        expected = np.asarray(Image.open(io.BytesIO(jpeg(tile))))
        assert (images[index].permute(1, 2, 0).numpy() == expected).all()
    assert decoded.train_labels.tolist() == list(range(8))
    assert decoded.test_labels.tolist() == list(range(8, COUNT))


def test_splits_and_normalization(path):
    data = CifarJpeg(path, train_size=8, val_size=3)
    data.setup("fit")
    assert [len(getattr(data, f"{split}_dataloader")().dataset) for split in ("train", "val", "test")] == [5, 3, 4]
    image, label = data.test_dataloader().dataset[0]
    pixels = np.asarray(Image.open(io.BytesIO(jpeg(photographs()[8])))) / 255
    expected = (pixels - [0.4913, 0.4821, 0.4465]) / [0.2452, 0.2428, 0.2606]
    np.testing.assert_allclose(image.permute(1, 2, 0), expected, rtol=1e-4, atol=1e-6)
    assert label == 8


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.npz: no such file"):
        CifarJpeg(tmp_path / "none.npz").setup()


@pytest.mark.parametrize("size", [0, 10, 400, -30])
def test_truncated_file(path, size):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"cifar\.npz: corrupt or truncated"):
        CifarJpeg(path).setup()


def test_another_kind_of_file(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match=r"cifar\.npz: corrupt or truncated"):
        CifarJpeg(path).setup()


def test_missing_arrays(arrays, path):
    np.savez(path, scan=arrays["scan"], offset=arrays["offset"])
    with pytest.raises(DataError, match=r"cifar\.npz: no array header, label; it must hold"):
        CifarJpeg(path).setup()


@pytest.mark.parametrize("name", ["scan", "offset", "label"])
def test_arrays_that_do_not_fit(arrays, path, name):
    np.savez(path, **{**arrays, name: arrays[name][:-1]})
    with pytest.raises(DataError, match="offset, label and scan do not fit"):
        CifarJpeg(path).setup()


def test_an_image_that_cannot_be_decoded(arrays, path):
    offset = arrays["offset"].copy()
    offset[3] = offset[2] + 4
    np.savez(path, **{**arrays, "offset": offset})
    with pytest.raises(DataError, match=r"cifar\.npz: image 2 cannot be decoded"):
        CifarJpeg(path).setup()


def test_a_split_without_test_images(path):
    with pytest.raises(DataError, match="train_size=50000 of 12 images leaves no test set"):
        CifarJpeg(path).setup()


def test_without_pillow_the_way_out_is_told(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match="pip install pillow"):
        CifarJpeg(path).setup()
