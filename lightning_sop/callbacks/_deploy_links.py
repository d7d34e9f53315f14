"""Which checkpoints of the Trainer's ModelCheckpoints are best or last, and the links among them."""

from __future__ import annotations

import os

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sop.deploy import files


def model_checkpoints(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    """The Trainer's ModelCheckpoints."""
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def known_paths(trainer: pl.Trainer) -> set[str]:
    """Checkpoints that a ModelCheckpoint keeps among the best: in a resumed run, those of the runs before it."""
    return {
        path for callback in model_checkpoints(trainer) for path in (*callback.best_k_models, callback.best_model_path)
    } - {""}


def links_last(callback: ModelCheckpoint) -> bool:
    """Whether its ``last`` is a link, made without any call of a CheckpointIO."""
    return callback.save_last == "link"


def last_link(callback: ModelCheckpoint) -> tuple[str, str] | None:
    """A linked ``last`` and the checkpoint it points at, if that is how it is now."""
    last = callback.last_model_path
    if not links_last(callback) or not last or not os.path.islink(last):
        return None
    return last, os.path.normpath(os.path.join(os.path.dirname(last), os.readlink(last)))


def is_best(trainer: pl.Trainer, path: str) -> bool:
    """Whether a ModelCheckpoint holds the path for its best."""
    return any(path == callback.best_model_path for callback in model_checkpoints(trainer))


def is_last(trainer: pl.Trainer, path: str) -> bool:
    """Whether a ModelCheckpoint holds the path for its last, by name or through a link."""
    for callback in model_checkpoints(trainer):
        link = last_link(callback)
        if path == callback.last_model_path or (link is not None and link[1] == os.path.normpath(path)):
            return True
    return False


def may_become_last(trainer: pl.Trainer, path: str) -> bool:
    """Whether a ModelCheckpoint may link its last to the path once it is saved."""
    folder = os.path.dirname(path)
    return any(links_last(callback) and str(callback.dirpath) == folder for callback in model_checkpoints(trainer))


def mirror(link: str, target: str) -> bool:
    """Point the link at a deploy file, or remove it where that file is not (or no longer) there.

    Returns:
        Whether the link is there.
    """
    if not files.exists(target):
        if os.path.islink(link):
            files.remove(link)
        return False
    if not (os.path.islink(link) and os.path.realpath(link) == os.path.realpath(target)):
        files.link_atomically(target, link)
    return True
