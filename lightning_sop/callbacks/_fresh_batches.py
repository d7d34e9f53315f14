"""Training batches drawn at random beside a run, which does not notice."""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Iterable, Sized
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_sop.deploy.replay import isolated_random_state


class UnreadableAgainError(Exception):
    """The training data cannot be read a second time; the message says why."""


def fresh_batches(trainer: Trainer, number: int, apart: int) -> tuple[list[Any], list[Any]]:
    """Batches as a training step gets them, drawn from the training data by the run's own samplers, collation and hooks.

    The samplers are copies, the loaders iterate apart from the run's, and the random state is put back. What is drawn
    depends on the run's seed, the optimizer step and the rank alone. Only a dataset whose items depend on how often it was
    read (a random generator of its own, say) can notice, and only where the run reads it without worker processes.

    Args:
        trainer: of the run.
        number: of batches that are drawn independently, each from all of an epoch: the mean over draws is the mean over an
            epoch. With few batches in an epoch some are drawn twice.
        apart: of further batches, other than those as far as the epoch has others.

    Returns:
        The batches, and the further ones, on the device.

    Raises:
        UnreadableAgainError: the data are an iterable, or one of the run's own parts does not do it a second time.
    """
    try:
        with isolated_random_state():
            batches = _drawn(trainer, number, apart)
    except UnreadableAgainError:
        raise
    except Exception as error:  # the user's samplers, datasets and hooks may fail in any way
        raise UnreadableAgainError(f"{type(error).__name__}: {error}") from error
    return batches[:number], batches[number:]


def _drawn(trainer: Trainer, number: int, apart: int) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    assert combined is not None  # between two steps of a fit
    seed = _seed(trainer)
    torch.manual_seed(seed)
    limits = combined.limits or [math.inf] * len(combined.flattened)
    twin = CombinedLoader(combined.iterables, combined._mode)
    twin.flattened = [_drawing(*each, number, apart, seed) for each in zip(combined.flattened, limits, strict=True)]
    return [_as_trained_on(trainer, batch) for batch, *_ in twin]


def _drawing(loader: Any, limit: float, number: int, apart: int, seed: int) -> DataLoader[Any]:
    """The loader, but with batches of our own choice; of its class, which may do more than torch's."""
    if not isinstance(loader, DataLoader):
        raise UnreadableAgainError(f"the training data are a {type(loader).__name__}, not a torch DataLoader")
    if isinstance(loader.dataset, IterableDataset):
        raise UnreadableAgainError(f"{type(loader.dataset).__name__} is an iterable, which can be read once only")
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    # The dataset, which samplers hold, is not copied.
    sampler = copy.deepcopy(getattr(loader, name), {id(loader.dataset): loader.dataset})
    chosen = _chosen(sampler, limit, number, apart)
    twin = copy.copy(loader)
    # Not by setattr: a DataLoader lets nobody exchange its sampler.
    vars(twin).update({name: chosen, "generator": torch.Generator().manual_seed(seed), "persistent_workers": False})
    vars(twin).update({"num_workers": min(loader.num_workers, len(chosen)), "_iterator": None})
    return twin


def _chosen(sampler: Iterable[Any], limit: float, number: int, apart: int) -> list[Any]:
    """What a sampler gives at random places of a pass."""
    length = min(float(len(sampler)) if isinstance(sampler, Sized) else math.inf, limit)
    if math.isinf(length):
        return list(islice(sampler, number + apart))
    end = int(length)
    places = torch.randint(end, (number,)).tolist()
    taken = set(places)
    others = [place for place in torch.randperm(end).tolist() if place not in taken][:apart]
    others += torch.randint(end, (apart - len(others),)).tolist()
    wanted = {*places, *others}
    found = {place: item for place, item in enumerate(islice(sampler, max(wanted) + 1)) if place in wanted}
    return [found[place] for place in (*places, *others)]


def _as_trained_on(trainer: Trainer, batch: Any) -> Any:
    """What Lightning makes of a loader's batch."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _seed(trainer: Trainer) -> int:
    text = f"{os.environ.get('PL_GLOBAL_SEED', '')}/{trainer.global_step}/{trainer.global_rank}"
    return random.Random(text).getrandbits(62)
