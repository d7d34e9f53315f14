"""Images of CIFAR-10 (JPEG) for larger tasks: shifted and mirrored, or of some classes only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sop.zoo import CifarJpeg, DataError
from lightning_sop.zoo.images import ImageArrays, ImageSet


class ShiftedImages(ImageSet):
    """Each image mirrored or not, and shifted by up to some pixels, by random numbers of its own generator."""

    shift = 4
    generator: torch.Generator

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, labels = super().__getitems__(indices)
        return shifted(images, self.shift, self.generator), labels


def shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Half of the images mirrored, all of them cut out at random of a frame of zeros around them."""
    count, _, height, width = images.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    framed = F.pad(images, [shift] * 4)
    down, right = torch.randint(2 * shift + 1, (2, count), generator=generator)
    rows, columns = down[:, None] + torch.arange(height), right[:, None] + torch.arange(width)
    return framed[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2).contiguous()


class CifarImages(CifarJpeg):
    """CIFAR-10 with augmentation, and of some classes if wanted, which are numbered anew.

    Args:
        path: see ``CifarJpeg``.
        classes: to take; default all.
        first: how many of the training images that are not held out; default all.
        augment: shift and mirror the training images.
        batch_size: images per batch.
        val_size: training images held out.
        seed: of that split and of the augmentation.
    """

    def __init__(
        self,
        path: str | Path,
        classes: Sequence[int] | None = None,
        first: int | None = None,
        augment: bool = True,
        batch_size: int = 128,
        val_size: int = 5000,
        seed: int = 0,
    ) -> None:
        super().__init__(path, batch_size, val_size, seed=seed)
        self.classes, self.first, self.augment = classes, first, augment

    def read(self) -> ImageArrays:
        arrays = super().read()
        if self.classes is None:
            return arrays
        wanted = torch.tensor(list(self.classes))

        def part(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            kept = torch.isin(labels, wanted)
            return images[kept], torch.stack([(wanted == label).nonzero()[0, 0] for label in labels[kept]])

        train, test = part(arrays.train_images, arrays.train_labels), part(arrays.test_images, arrays.test_labels)
        return ImageArrays(*train, *test)

    def setup(self, stage: str | None = None) -> None:
        if self._splits:
            return
        super().setup(stage)
        train = self._splits["train"]
        kept = len(train) if self.first is None else self.first
        if not 0 < kept <= len(train):
            raise DataError(f"first={kept}: there are {len(train)} training images besides those held out")
        images, labels, colours = train.images[:kept], train.labels[:kept], (self.scale, self.mean, self.std)
        self._splits["train"] = (ShiftedImages if self.augment else ImageSet)(images, labels, *colours)
        self._splits["train"].generator = torch.Generator().manual_seed(self.seed)  # type: ignore[attr-defined]
