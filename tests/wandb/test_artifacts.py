"""Deploy files as artifacts of W&B, beside the checkpoints that WandbLogger logs; and what else is used with W&B."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins import AsyncCheckpointIO

from lightning_sop import CollapseOnSave, DynamicsMonitor, MajorityKernels, SimulatedOverparam, TrainingCost, deploy
from lightning_sop.dynamics.quantities import find
from tests.callbacks.growing import Growable
from tests.callbacks.helpers import fit as fit_unlogged
from tests.wandb.reading import Written
from tests.wandb.runs import Run, fit


def checkpoints(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "saved", filename="{epoch}", monitor="val_loss", **options)


def trained(folder: Path, *callbacks: Any, log_model: bool | str = False, **options: Any) -> Run:
    """Three epochs."""
    logger = WandbLogger(project="digits", save_dir=folder, log_model=log_model)  # type: ignore[arg-type]
    method = SimulatedOverparam(MajorityKernels(2), verbose=False)
    return fit(folder, [method, *callbacks], logger=logger, max_epochs=3, enable_checkpointing=True, **options)


def artifacts(written: Written, start: str) -> list[Any]:
    return [artifact for artifact in written.artifacts if artifact.name.startswith(start)]


def contents(artifact: Any) -> list[tuple[str, str]]:
    """Names and digests."""
    return [(entry.path, entry.digest) for entry in artifact.manifest.contents]


def digest(path: Path) -> str:
    return base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()


@pytest.mark.parametrize("format", ["ckpt", "safetensors"])
def test_what_is_there_at_the_end(format: str, tmp_path: Path) -> None:
    """The best and the last, each with its receipt; the training checkpoints go their own way."""
    run = trained(tmp_path, CollapseOnSave(format, log_artifact=True), checkpoints(tmp_path, save_last=True), log_model=True)  # type: ignore[arg-type]
    files = sorted((tmp_path / "saved").glob(f"*.deploy.{format}"))
    found = artifacts(run.written, "deploy-")
    assert len(found) == len(files) == 2
    by_name = {json.loads(artifact.metadata)["original_filename"]: artifact for artifact in found}
    best = Path(run.trainer.checkpoint_callback.best_model_path).stem  # type: ignore[union-attr]
    for path in files:
        artifact = by_name[path.name]
        assert artifact.type == "model" and artifact.name.endswith("safetensors") == (format == "safetensors")
        assert contents(artifact) == [(f"deploy.{format}", digest(path))]
        receipt = {name: value for name, value in json.loads(artifact.metadata).items() if name != "original_filename"}
        assert receipt == json.loads(json.dumps(deploy.verify(path))) and receipt["source"] == "kernels"
        assert sorted(artifact.aliases) == (["best", "latest"] if path.name.startswith(f"{best}.") else ["latest"])
    logged = {path for artifact in artifacts(run.written, "model-") for path in contents(artifact)}
    kept = [path for path in (tmp_path / "saved").glob("*.ckpt") if ".deploy." not in path.name]
    assert logged == {("model.ckpt", digest(path)) for path in kept} and len(kept) == 2


@pytest.mark.parametrize("written_by", ["this thread", "another thread"])
def test_each_as_it_is_written(written_by: str, tmp_path: Path) -> None:
    """Also those that are removed again, unless that was before another thread came to write them."""
    plugins = {"plugins": [AsyncCheckpointIO()]} if written_by == "another thread" else {}
    run = trained(tmp_path, CollapseOnSave(log_artifact="all"), checkpoints(tmp_path, save_top_k=1, mode="min"), **plugins)
    found = artifacts(run.written, "deploy-")
    steps = [json.loads(artifact.metadata)["global_step"] for artifact in found]
    assert steps == sorted(set(steps)) and (1 if plugins else 2) <= len(steps) <= 3
    assert len(list((tmp_path / "saved").glob("*.deploy.ckpt"))) == 1
    assert all("best" in artifact.aliases for artifact in found) and not artifacts(run.written, "model-")


def test_nothing_is_logged_unless_asked_for(tmp_path: Path) -> None:
    run = trained(tmp_path, CollapseOnSave(), checkpoints(tmp_path))
    assert not run.written.artifacts and list((tmp_path / "saved").glob("*.deploy.ckpt"))


def test_only_the_best(tmp_path: Path) -> None:
    run = trained(tmp_path, CollapseOnSave(only="best", log_artifact=True), checkpoints(tmp_path, save_top_k=-1))
    (artifact,) = artifacts(run.written, "deploy-")
    assert sorted(artifact.aliases) == ["best", "latest"]


def test_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="log_artifact='some' is unknown; choose True, False or 'all'"):
        CollapseOnSave(log_artifact="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"CollapseOnSave\(log_artifact=True\) needs a WandbLogger"):
        fit_unlogged(Growable(), tmp_path, CollapseOnSave(log_artifact=True))


def test_a_file_that_wandb_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training goes on, and the file is there."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(wandb.Artifact, "add_file", refuse)
    with pytest.warns(UserWarning, match=r"is no artifact of W&B \(OSError: the disk is full\). The file is there"):
        run = trained(tmp_path, CollapseOnSave(log_artifact="all"), checkpoints(tmp_path))
    assert run.trainer.global_step == 12 and list((tmp_path / "saved").glob("*.deploy.ckpt"))


# ---------------------------------------------------------------------- watch


class Tick(Callback):
    """Logs at each step; W&B writes what watch() has gathered together with the next numbers."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.loggers[0].log_metrics({"tick": 1.0}, step=trainer.global_step - 1)


def watched(folder: Path, callbacks: list[Any], *, watch: bool) -> Run:
    torch.manual_seed(0)
    model, logger = Growable(), WandbLogger(project="digits", save_dir=folder)
    if watch:
        logger.watch(model, log="all", log_freq=2, log_graph=False)
    return fit(folder, [*callbacks, Tick()], model, logger=logger)


def ours() -> list[Any]:
    method = SimulatedOverparam(MajorityKernels(2), verbose=False)
    return [method, DynamicsMonitor(["*"], every=2, slow=2), TrainingCost(verbose=False)]


def test_with_watch(tmp_path: Path) -> None:
    """Both log what they log alone, and the run is the same, bit for bit."""
    both, monitored, alone = (
        watched(tmp_path / name, callbacks, watch=watch)
        for name, callbacks, watch in (("both", ours(), True), ("monitored", ours(), False), ("alone", [], True))
    )
    for left, right in zip(both.model.parameters(), monitored.model.parameters(), strict=True):
        assert torch.equal(left, right)
    names = monitored.written.names()
    assert {"kernels/spread", "loss/gap", "weights/spectrum/net.0"} <= names
    for name in names - {"cost/seconds"}:
        if not any(isinstance(value, dict) for _, value in monitored.written.values(name)):
            assert both.written.values(name) == monitored.written.values(name), name
    theirs, kept = watched_rows(alone.written), watched_rows(both.written)
    assert len(theirs) == 2 * len(list(both.model.parameters())) and theirs == kept
    assert not any(find(name) for name in theirs)


def watched_rows(written: Written) -> Counter[str]:
    """In how many rows each histogram of watch() is; it gives every model that it sees another number."""
    names = [
        name for row in written.rows for name in row if name.startswith(("parameters/", "gradients/")) and not find(name)
    ]
    return Counter(re.sub(r"graph_\d+", "", name) for name in names)
