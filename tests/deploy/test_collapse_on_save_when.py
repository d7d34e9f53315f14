"""Beside which checkpoints CollapseOnSave writes, and what becomes of the files."""

from __future__ import annotations

import os
import pickle
import threading
import time

import fsspec
import pytest
from deploy_toys import Extras, Kernels, Toy, data, differing, fit, names, trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.tuner import Tuner

from lightning_sop.callbacks.collapse_on_save import CollapseOnSave
from lightning_sop.deploy import CollapseError, read, store, verify


def test_top_k_keeps_a_deploy_file_for_every_checkpoint_and_no_other(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2, filename="{epoch}-{val_loss:.2f}")
    fit(tmp_path, Kernels(), CollapseOnSave(), checkpoints, max_epochs=4)
    stems = {name.removesuffix(".deploy.ckpt") for name in names(tmp_path) if ".deploy." in name}
    assert len(stems) == 2
    assert stems == {name.removesuffix(".ckpt") for name in names(tmp_path) if ".deploy." not in name}


@pytest.mark.parametrize("io", [None, AsyncCheckpointIO()], ids=["sync", "async"])
@pytest.mark.parametrize("save_last", [True, "link"])
def test_last(tmp_path, save_last, io):
    checkpoints = ModelCheckpoint(tmp_path, save_last=save_last, filename="{step}")
    fit(tmp_path, CollapseOnSave(), checkpoints, max_epochs=3, plugins=[io] if io else None)
    assert names(tmp_path) == ["last.ckpt", "last.deploy.ckpt", "step=9.ckpt", "step=9.deploy.ckpt"]
    assert (tmp_path / "last.deploy.ckpt").is_symlink() == (tmp_path / "last.ckpt").is_symlink() == (save_last == "link")
    assert verify(tmp_path / "last.deploy.ckpt")["global_step"] == 9
    if save_last == "link":
        assert os.readlink(tmp_path / "last.deploy.ckpt") == "step=9.deploy.ckpt"


def test_a_link_whose_target_was_removed_goes_too(tmp_path):
    run, _ = fit(tmp_path, CollapseOnSave(), ModelCheckpoint(tmp_path, save_last="link", filename="x"))
    run.strategy.remove_checkpoint(str(tmp_path / "x.ckpt"))
    run.callbacks[0].sync()
    assert names(tmp_path) == ["last.ckpt"]  # Lightning's own link, to nowhere


def test_resuming_from_last_takes_the_training_file(tmp_path):
    fit(tmp_path, CollapseOnSave(), ModelCheckpoint(tmp_path, save_last=True, filename="x"))
    checkpoints = ModelCheckpoint(tmp_path, save_last=True, filename="x")
    run = trainer(tmp_path, CollapseOnSave(), checkpoints, max_epochs=2)
    run.fit(Toy(), data(), data(), ckpt_path="last")
    assert run.global_step == 6


@pytest.mark.parametrize("io", [None, AsyncCheckpointIO()], ids=["sync", "async"])
def test_only_best(tmp_path, io):
    checkpoints = ModelCheckpoint(
        tmp_path, monitor="val_loss", save_top_k=-1, save_last=True, filename="{epoch}", auto_insert_metric_name=False
    )
    fit(tmp_path, CollapseOnSave(only="best"), checkpoints, max_epochs=4, plugins=[io] if io else None)
    best = os.path.basename(checkpoints.best_model_path).removesuffix(".ckpt")
    assert [name for name in names(tmp_path) if ".deploy." in name] == [f"{best}.deploy.ckpt"]


def test_the_best_of_a_resumed_run_takes_the_place_of_the_one_before(tmp_path):
    model = Toy()
    for epochs in (2, 4, 6):
        checkpoints = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2, save_last=True, filename="{epoch}")
        run = trainer(tmp_path, CollapseOnSave(only="best"), checkpoints, max_epochs=epochs)
        run.fit(model, data(), data(), ckpt_path="last" if epochs > 2 else None)
        best = os.path.basename(checkpoints.best_model_path).removesuffix(".ckpt")
        assert [name for name in names(tmp_path) if ".deploy." in name] == [f"{best}.deploy.ckpt"]
    assert best == "epoch=5"  # it was another one each time


@pytest.mark.parametrize("save_last", [True, "link"])
def test_only_last(tmp_path, save_last):
    checkpoints = ModelCheckpoint(tmp_path, save_last=save_last, save_top_k=-1, filename="{step}")
    fit(tmp_path, CollapseOnSave(only="last"), checkpoints, max_epochs=3)
    expected = ["last.deploy.ckpt"] if save_last is True else ["last.deploy.ckpt", "step=9.deploy.ckpt"]
    assert [name for name in names(tmp_path) if ".deploy." in name] == expected


def test_weights_only_and_every_n_steps(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, save_weights_only=True, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    fit(tmp_path, Kernels(), CollapseOnSave(), checkpoints, model=Extras(), max_epochs=2)
    assert [name for name in names(tmp_path) if ".deploy." in name] == [f"step={n}.deploy.ckpt" for n in (2, 4, 6)]
    assert read(tmp_path / "step=6.deploy.ckpt").extras["vocabulary"] == ["a", "b"]


def test_the_training_file_can_be_dropped_but_never_with_a_refusal(tmp_path):
    kernels = Kernels()
    run, _ = fit(tmp_path, kernels, CollapseOnSave(keep_training_file=False), ModelCheckpoint(tmp_path, filename="x"))
    assert names(tmp_path) == ["x.deploy.ckpt"]
    kernels.error = 0.25
    with pytest.raises(CollapseError):
        run.save_checkpoint(tmp_path / "y.ckpt")
    assert names(tmp_path) == ["x.deploy.ckpt", "y.ckpt"]


def test_manual_saves_with_any_suffix_and_after_fit(tmp_path):
    run, model = fit(tmp_path, CollapseOnSave(), enable_checkpointing=False)
    for name in ("a.pth", "b", "c=0.25"):
        run.save_checkpoint(tmp_path / name)
    assert names(tmp_path) == ["a.deploy.ckpt", "a.pth", "b", "b.deploy.ckpt", "c=0.25", "c=0.25.deploy.ckpt"]
    assert not differing(model, Toy.load_from_checkpoint(tmp_path / "c=0.25.deploy.ckpt"))
    assert verify(tmp_path / "b.deploy.ckpt")["output_difference"] == 0
    with pytest.warns(UserWarning, match=r"b\.deploy\.ckpt is that of .*b\.best from now on, no longer that of .*b\."):
        run.save_checkpoint(tmp_path / "b.best")
    assert verify(tmp_path / "b.deploy.ckpt")["training_file"] == "b.best"


def test_remote_folder(tmp_path):
    run, _ = fit(tmp_path, CollapseOnSave(), enable_checkpointing=False)
    run.save_checkpoint("memory://collapse-on-save/x.ckpt")
    assert verify("memory://collapse-on-save/x.deploy.ckpt")["training_file"] == "x.ckpt"
    run.strategy.remove_checkpoint("memory://collapse-on-save/x.ckpt")
    assert fsspec.filesystem("memory").ls("/collapse-on-save") == []


class OwnIO(TorchCheckpointIO):
    pass


def test_a_users_own_checkpoint_io(tmp_path):
    fit(tmp_path, CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"), plugins=[OwnIO()])
    assert names(tmp_path) == ["x.ckpt", "x.deploy.ckpt"]


def test_none_for_the_tuners_files(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(os, "replace", lambda a, b: written.append(b))
    run = trainer(tmp_path, CollapseOnSave(), enable_checkpointing=False)
    model = Toy()
    model.lr = 0.1
    Tuner(run).lr_find(model, data(), num_training=3, update_attr=False)
    assert written == []


def test_another_trainer_leaves_the_files_of_the_first_alone(tmp_path):
    collapse = CollapseOnSave(only="best")
    for name in "ab":
        fit(tmp_path / name, collapse, ModelCheckpoint(tmp_path / name, filename="x"))
    assert names(tmp_path / "a") == names(tmp_path / "b") == ["x.ckpt", "x.deploy.ckpt"]


def test_several_fits_validate_and_test(tmp_path):
    collapse = CollapseOnSave()
    run, model = fit(tmp_path, Kernels(), collapse, ModelCheckpoint(tmp_path, filename="x"))
    outer = run.strategy.checkpoint_io
    run.validate(model, data(), verbose=False)
    run.fit_loop.max_epochs = 2
    run.fit(model, data(), data())
    run.test(model, data(), verbose=False)
    assert run.strategy.checkpoint_io is outer
    assert [writer.callback for writer in outer.writers] == [collapse]
    assert {name for name in names(tmp_path) if "v1" not in name} == {"x.ckpt", "x.deploy.ckpt"}
    assert not any(module._forward_pre_hooks for module in model.modules())
    pickle.loads(pickle.dumps(collapse))


class Breaks(Toy):
    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            raise RuntimeError("broken")


def test_a_checkpoint_saved_on_an_exception_has_one_too(tmp_path):
    saves = ModelCheckpoint(tmp_path, filename="{step}", save_on_exception=True, save_last="link")
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, CollapseOnSave(), saves, model=Breaks())
    assert names(tmp_path) == ["last.ckpt", "last.deploy.ckpt", "step=2.ckpt", "step=2.deploy.ckpt"]


def test_a_file_that_is_removed_while_it_is_written(tmp_path, monkeypatch):
    """With asynchronous saving it may stop being the best one between being written and being dated."""
    real = store.write

    def write(path, *args):
        real(path, *args)
        os.unlink(path)

    monkeypatch.setattr(store, "write", write)
    fit(tmp_path, CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"), max_epochs=1)
    assert names(tmp_path) == ["x.ckpt"]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("slow", ["training file", "before", "after"])
def test_a_file_of_a_checkpoint_that_was_removed_before_another_thread_wrote_it(tmp_path, monkeypatch, slow, keep):
    """The Trainer does not wait for that thread before it removes what is the best no longer."""
    real, removed, written = store.write, threading.Event(), []

    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, *args, **kwargs):
            if slow == "training file":
                assert removed.wait(60)
            super().save_checkpoint(*args, **kwargs)

    def write(path, *args):
        written.append(os.path.basename(path))
        if slow == "after":
            real(path, *args)
        assert removed.wait(60)
        if slow != "after":
            real(path, *args)

    class Tells(ModelCheckpoint):
        def _remove_checkpoint(self, trainer, filepath):
            deadline = time.monotonic() + 60
            while slow != "training file" and not written and time.monotonic() < deadline:
                time.sleep(0.01)
            super()._remove_checkpoint(trainer, filepath)
            removed.set()

    monkeypatch.setattr(store, "write", write)
    collapse = CollapseOnSave(keep_training_file=keep)
    fit(tmp_path, collapse, Tells(tmp_path, filename="{epoch}"), max_epochs=2, plugins=[AsyncCheckpointIO(Slow())])
    assert removed.is_set()
    assert [name for name in names(tmp_path) if ".deploy." in name] == ["epoch=1.deploy.ckpt"]
    if slow == "training file":
        assert written == ["epoch=1.deploy.ckpt"]
    assert keep or not [name for name in names(tmp_path) if ".deploy." not in name]


@pytest.mark.filterwarnings("ignore:.*differ")
def test_a_save_that_is_not_proven_leaves_no_earlier_file_to_be_written(tmp_path, monkeypatch):
    """Of the same name, and still to be written by another thread when the next save fails."""
    from lightning_sop.callbacks import collapse_on_save as module

    real, proven, failed, saves = store.write, module.proven_content, threading.Event(), []

    def prove(*args):
        saves.append(1)
        if len(saves) > 1:
            raise CollapseError("they differ")
        return proven(*args)

    def write(path, *args):
        assert failed.wait(60)
        real(path, *args)

    class Tells(CollapseOnSave):
        def prepare(self, checkpoint, path):
            job = super().prepare(checkpoint, path)
            if len(saves) > 1:
                failed.set()
            return job

    monkeypatch.setattr(module, "proven_content", prove)
    monkeypatch.setattr(store, "write", write)
    checkpoints = ModelCheckpoint(tmp_path, filename="x", enable_version_counter=False)
    fit(tmp_path, Tells(on_mismatch="warn"), checkpoints, max_epochs=2, plugins=[AsyncCheckpointIO()])
    assert len(saves) > 1
    assert not [name for name in names(tmp_path) if ".deploy." in name]
