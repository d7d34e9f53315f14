"""The handwritten digits that come with scikit-learn."""

import torch

from lightning_sop.zoo.images import ImageArrays, ImageData
from lightning_sop.zoo.loading import DataError


class Digits(ImageData):
    """1797 digits of 8x8 pixels (1 channel, 10 classes), from scikit-learn; nothing is downloaded.

    Args:
        batch_size: images per batch and process.
        val_size: images held out of training for validation.
        test_size: images held out for the test.
        seed: seed of both splits.
        num_workers: reading processes per loader.

    Raises:
        DataError: in ``setup``, when scikit-learn is not installed or the sizes leave nothing to train on.
    """

    scale = 16.0
    mean = (0.305,)
    std = (0.376,)

    def __init__(
        self, batch_size: int = 64, val_size: int = 360, test_size: int = 360, seed: int = 0, num_workers: int = 0
    ) -> None:
        super().__init__(batch_size, val_size, seed, num_workers)
        self.test_size = test_size

    def read(self) -> ImageArrays:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError("Digits needs scikit-learn: pip install 'lightning_sop[demo]'") from error
        pixels, classes = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8)
        labels = torch.from_numpy(classes).to(torch.int64)
        if not 0 < self.test_size < len(images):
            raise DataError(f"test_size={self.test_size} must leave some of the {len(images)} digits: lower it")
        # another stream than that of the validation split, which the base class draws with `seed` itself
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed + 1_000_003))
        test, train = order[: self.test_size], order[self.test_size :]
        return ImageArrays(images[train], labels[train], images[test], labels[test])
