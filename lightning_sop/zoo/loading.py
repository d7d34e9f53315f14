"""What the zoo's DataModules share: the error for unusable data, and the DataLoader."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset


class DataError(ValueError):
    """A data file or folder is missing or unusable; the message names it and the way out."""


def take_batch(batch: Any) -> Any:
    """Collate function for datasets whose ``__getitems__`` returns a whole batch already."""
    return batch


def make_loader(dataset: Dataset[Any], batch_size: int, num_workers: int, *, shuffle: bool) -> DataLoader[Any]:
    """DataLoader over a dataset with ``__getitems__``.

    Args:
        dataset: returns a whole batch for a list of indices, which saves collating sample by sample.
        batch_size: samples per batch; the last batch may be smaller.
        num_workers: processes that read ahead; 0 reads in the training process.
        shuffle: whether each epoch has an order of its own, drawn from torch's global generator.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=take_batch,
    )


class SplitDataModule(LightningDataModule):
    """A DataModule whose ``setup`` fills ``_splits`` with the datasets ``train``, ``val`` and ``test``."""

    batch_size: int
    num_workers: int
    _splits: dict[str, Any]

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def _loader(self, split: str, *, shuffle: bool = False) -> DataLoader[Any]:
        return make_loader(self._splits[split], self.batch_size, self.num_workers, shuffle=shuffle)
