from __future__ import annotations

import threading

import pytest
import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_sop.plugins import DeployCheckpointIO, install


class Writer:
    """Notes what it is asked for, and whether the training file was there when its job ran."""

    def __init__(self, error=None):
        self.log, self.error = [], error

    def prepare(self, checkpoint, path):
        self.log.append(("prepare", path, threading.current_thread() is threading.main_thread()))
        if self.error:
            raise self.error
        return lambda: self.log.append(("job", path, torch.load(path)["a"]))

    def remove(self, path):
        self.log.append(("remove", path))

    def sync(self):
        self.log.append(("sync",))


class OwnIO(CheckpointIO):
    """A user's own, wrapping nothing."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        torch.save(checkpoint, path)

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return torch.load(path)

    def remove_checkpoint(self, path):
        path.unlink()


class Renaming(_WrappingCheckpointIO):
    """Saves under another name."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)
        self.checkpoint_io.save_checkpoint(checkpoint, f"{path}.copy", storage_options=storage_options)


def chain(io, *writers):
    strategy = SingleDeviceStrategy("cpu", checkpoint_io=io)
    for writer in writers:
        install(strategy, writer)
        install(strategy, writer)
    return strategy.checkpoint_io


@pytest.mark.parametrize(
    "io", [None, TorchCheckpointIO(), OwnIO(), Renaming(), AsyncCheckpointIO(), Renaming(AsyncCheckpointIO(OwnIO()))]
)
def test_jobs_run_once_after_the_file_is_written(tmp_path, io):
    writer = Writer()
    outer = chain(io, writer)
    for value in range(3):
        outer.save_checkpoint({"a": value}, tmp_path / "x")
        if not isinstance(io, (AsyncCheckpointIO, Renaming)):
            assert writer.log[-1] == ("job", str(tmp_path / "x"), value)
    outer.teardown()
    jobs = [entry for entry in writer.log if entry[0] == "job"]
    assert len(jobs) == 3
    assert all(in_main for kind, _, in_main in writer.log[:-1] if kind == "prepare")
    assert writer.log[-1] == ("sync",)
    assert outer.load_checkpoint(tmp_path / "x")["a"] == 2
    outer.remove_checkpoint(tmp_path / "x")
    assert writer.log[-1] == ("remove", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_a_refusal_is_raised_after_the_training_file_is_saved(tmp_path):
    outer = chain(None, Writer(RuntimeError("refused")), other := Writer())
    with pytest.raises(RuntimeError, match="refused"):
        outer.save_checkpoint({"a": 1}, tmp_path / "x")
    assert (tmp_path / "x").exists()
    assert other.log[-1] == ("job", str(tmp_path / "x"), 1)


def test_a_failed_save_takes_its_jobs_along(tmp_path):
    writer, path = Writer(), tmp_path / "none" / "x"
    outer = chain(OwnIO(), writer)
    with pytest.raises((OSError, RuntimeError), match="does not exist"):
        outer.save_checkpoint({"a": 1}, path)
    (tmp_path / "none").mkdir()
    outer.save_checkpoint({"a": 2}, path)
    outer.teardown()
    assert [entry for entry in writer.log if entry[0] == "job"] == [("job", str(path), 2)]


def test_one_wrapper_for_all_writers_and_for_a_plugin_shared_by_trainers(tmp_path):
    shared, first, second = AsyncCheckpointIO(), Writer(), Writer()
    outer, other = chain(shared, first), chain(shared, second)
    assert isinstance(outer, DeployCheckpointIO)
    assert isinstance(outer.checkpoint_io, AsyncCheckpointIO)
    outer.save_checkpoint({"a": 1}, tmp_path / "x")
    outer.teardown()
    other.save_checkpoint({"a": 2}, tmp_path / "x")
    other.teardown()
    assert [kind for kind, *_ in first.log] == [kind for kind, *_ in second.log] == ["prepare", "job", "sync"]
