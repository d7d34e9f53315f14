"""The digits: every image once, split by the seed alone."""

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_sop.zoo import DataError, Digits

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def read(data):
    """All batches of each split, concatenated: three pairs of images and labels."""
    data.setup("fit")
    parts = []
    for loader in LOADERS:
        images, labels = zip(*getattr(data, loader)(), strict=True)
        parts.append((torch.cat(images), torch.cat(labels)))
    return parts


def multiset(images, labels):
    return sorted([*row.tolist(), label.item()] for row, label in zip(images, labels, strict=True))


def test_every_digit_is_in_exactly_one_split():
    parts = read(Digits(batch_size=100))
    assert [len(labels) for _, labels in parts] == [1077, 360, 360]
    images = torch.cat([images for images, _ in parts])
    labels = torch.cat([labels for _, labels in parts])
    pixels = ((images * 0.376 + 0.305) * 16).round().int().flatten(1)
    reference, classes = load_digits(return_X_y=True)
    assert multiset(pixels, labels) == multiset(torch.tensor(reference).int(), torch.tensor(classes))


def test_images_are_normalized():
    images = torch.cat([images for images, _ in read(Digits())])
    assert images.dtype == torch.float32
    assert images.shape[1:] == (1, 8, 8)
    assert images.mean().item() == pytest.approx(0, abs=0.01)
    assert images.std().item() == pytest.approx(1, abs=0.01)


def test_splits_follow_the_seed_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first, again, other = Digits(seed=3), Digits(seed=3), Digits(seed=4)
    for data in (first, again, other):
        data.setup()
    assert torch.equal(torch.get_rng_state(), state)
    for loader in LOADERS:
        labels = [getattr(data, loader)().dataset.labels for data in (first, again, other)]
        assert torch.equal(labels[0], labels[1])
        assert not torch.equal(labels[0], labels[2])


def test_one_sample_is_a_batch_of_one():
    data = Digits()
    data.setup()
    dataset = data.test_dataloader().dataset
    image, label = dataset[5]
    images, labels = dataset.__getitems__([5])
    assert torch.equal(image, images[0])
    assert torch.equal(label, labels[0])


def test_workers_read_the_same_batches():
    here, elsewhere = Digits(batch_size=200), Digits(batch_size=200, num_workers=1)
    for data in (here, elsewhere):
        data.setup()
    for one, other in zip(here.val_dataloader(), elsewhere.val_dataloader(), strict=True):
        assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("sizes", [{"test_size": 0}, {"test_size": 1797}, {"val_size": 0}, {"val_size": 1437}])
def test_sizes_that_leave_nothing_are_refused(sizes):
    (name,) = sizes
    with pytest.raises(DataError, match=f"{name}=.*lower it"):
        Digits(**sizes).setup()
