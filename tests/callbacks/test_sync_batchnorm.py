"""torch's own SyncBatchNorm, in two processes on the CPU: it is put in after the training forms, and they stay.

DDP refuses such layers on the CPU, and so do they in training mode, whatever is trained. What can run once DDP's check is
lifted are layers that are kept in evaluation mode, as in fine-tuning. Statistics over all processes have a stand-in:
``Together`` in test_batchnorm.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

from lightning_sop import CollapseOnSave, MajorityKernels, collapse_, expand_
from lightning_sop.reparam import forms_in
from tests.callbacks.helpers import Classifier, fit, network, overparam, same_tensors, seeded
from tests.callbacks.test_ddp import ddp

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*sync_dist.*"),
]


class Frozen(Classifier):
    """Its BatchNorm layers are in evaluation mode while it is trained, with statistics of their own."""

    def __init__(self) -> None:
        super().__init__(shuffle=False, dropout=0.0)
        self.net[1].running_mean.fill_(0.3)
        self.net[1].running_var.fill_(2.0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[1].eval()


class Watch(Callback):
    """Leaves a file of what the layers are while they are trained, and afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.write(trainer, pl_module, "during")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.write(trainer, pl_module, "after")

    def write(self, trainer: pl.Trainer, pl_module: Any, when: str) -> None:
        forms = [name for name, form in forms_in(pl_module).items() if form.mixed]
        norms = [type(layer).__name__ for layer in pl_module.modules() if "BatchNorm" in type(layer).__name__]
        torch.save((forms, norms), Path(self.folder, f"{when}{trainer.global_rank}.pt"))


def lift_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP's, which looks at nothing but the device; forked processes inherit it."""
    monkeypatch.setattr(DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda self, module: None)


@pytest.mark.parametrize(
    ("lifted", "message"),
    [(False, "SyncBatchNorm layers only work with GPU modules"), (True, "SyncBatchNorm expected input tensor to be on GPU")],
    ids=["DDP", "layer"],
)
@pytest.mark.parametrize("callbacks", [[], [overparam(3)]], ids=["plain", "overparam"])
def test_torch_refuses_the_cpu(
    callbacks: list[Callback], lifted: bool, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without the callback: once torch does not, what is skipped here can be tested."""
    if lifted:
        lift_the_check(monkeypatch)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    model = seeded(Classifier, dropout=0.0)
    with pytest.raises(ProcessRaisedException, match=message):
        fit(model, tmp_path, *callbacks, devices=2, strategy=strategy, sync_batchnorm=True)


def test_training_forms_outlive_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is that without conversion bit for bit, with validation and a deploy file of the plain model."""
    lift_the_check(monkeypatch)
    results = []
    for name, sync in (("sync", True), ("plain", False)):
        folder = tmp_path / name
        folder.mkdir()
        callbacks = [overparam(3), CollapseOnSave(), ModelCheckpoint(folder, filename="run"), Watch(folder)]
        results.append(ddp(folder, seeded(Frozen), *callbacks, sync_batchnorm=sync))
        for rank in (0, 1):
            forms, (norm,) = torch.load(folder / f"during{rank}.pt")
            assert forms == ["net.0.weight", "net.4.weight"]
            assert norm == ("SyncBatchNorm" if sync else "BatchNorm1d")
            assert torch.load(folder / f"after{rank}.pt")[0] == []
        deployed = Frozen.load_from_checkpoint(folder / "run.deploy.ckpt")  # strict
        assert type(deployed.net[1]) is nn.BatchNorm1d
        assert same_tensors(deployed.state_dict(), results[-1][0]["weights"])
    assert same_tensors(*results)


def test_converted_layers_evaluate_and_collapse() -> None:
    """Without Lightning: the order is expand_, convert; eval() and collapse_() are those of the layers that were there."""
    plain = seeded(network)
    model = seeded(network)
    engine = expand_(model, torch.optim.SGD(model.parameters(), lr=0.1), MajorityKernels(3), seed=0)
    forms = dict(engine.forms)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is nn.SyncBatchNorm
    assert [id(form) for form in forms_in(model).values()] == [id(form) for form in forms.values()]
    inputs = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.eval()(inputs), plain.eval()(inputs))
    model.train()
    assert not any(torch.equal(form.parameter, form.collapsed()) for form in forms.values())
    collapse_(model)
    assert not forms_in(model)
    torch.testing.assert_close(model.eval()(inputs), plain(inputs))
    plain.load_state_dict(model.state_dict())
