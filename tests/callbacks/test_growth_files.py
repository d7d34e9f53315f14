"""Files of a run that grows: checkpoints from before and after, deploy files, LightningCLI's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_sop import CollapseOnSave
from lightning_sop.cli import main
from lightning_sop.deploy import verify
from tests.callbacks.growing import Growable, every_epoch, grow, make, network
from tests.callbacks.helpers import fit, same_tensors, seeded, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def test_load_from_a_grown_checkpoint(tmp_path: Path) -> None:
    model = make()
    fit(model, tmp_path, grow(6), every_epoch(tmp_path), max_epochs=3)
    small = Growable.load_from_checkpoint(tmp_path / "epoch=0.ckpt")
    grown = Growable.load_from_checkpoint(tmp_path / "epoch=2.ckpt")
    assert small.hparams["width"] == 8 and grown.hparams["width"] == 16 and grown.net[0].out_features == 16
    assert same_tensors(dict(grown.state_dict()), dict(model.state_dict()))
    assert torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["hyper_parameters"]["width"] == 16


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_checkpoints_from_before_and_after_with_any_module(stage: str, tmp_path: Path) -> None:
    """With the callback, a small module takes a grown checkpoint, and a grown one a small checkpoint."""

    class Model(Growable):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0])

        predict_dataloader = Growable.train_dataloader

    model = seeded(Model)
    run = fit(model, tmp_path, grow(6), grow(10, width=48, copies=3), every_epoch(tmp_path), max_epochs=4)
    results = []
    for width, epoch in ((8, 0), (16, 1), (48, 3)):
        path = tmp_path / f"epoch={epoch}.ckpt"
        plain = getattr(trainer(tmp_path), stage)(Model.load_from_checkpoint(path))
        for subject, executive in (
            (seeded(Model), trainer(tmp_path, grow(6), grow(10, width=48, copies=3))),
            (model, run),
        ):
            found = getattr(executive, stage)(subject, ckpt_path=path, weights_only=True)
            assert str(found) == str(plain)
            assert subject.net[0].weight.shape == (width, 10) and subject.hparams["width"] == width
        results.append(str(plain))
    assert len(set(results)) == 3


def test_the_best_checkpoint_may_be_from_before(tmp_path: Path) -> None:
    class Worse(Growable):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", float(self.current_epoch))

    model = seeded(Worse)
    run = fit(model, tmp_path, grow(6), ModelCheckpoint(tmp_path, monitor="val_loss"), max_epochs=3)
    run.test(model, ckpt_path="best", verbose=False, weights_only=True)
    assert model.net[0].weight.shape == (8, 10)


PLAIN_LOAD = """
import sys
import torch
from lightning.pytorch import LightningModule
assert not any(name.startswith("lightning_sop") for name in sys.modules)
class Growable(LightningModule):
    def __init__(self, width=8, optimizer="", dropout=0.0, scheduler=True):
        super().__init__()
        self.save_hyperparameters()
        layers = torch.nn.Linear(10, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU(), torch.nn.Dropout(dropout)
        layers += torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 5)
        self.net = torch.nn.Sequential(*layers)
for path, width in zip(sys.argv[1:], (8, 16)):
    assert Growable.load_from_checkpoint(path).net[0].out_features == width
assert not any(name.startswith("lightning_sop") for name in sys.modules)
"""


def test_deploy_files_from_before_and_after(tmp_path: Path) -> None:
    model = make()
    fit(model, tmp_path, grow(6), CollapseOnSave(), every_epoch(tmp_path), max_epochs=3)
    paths = [tmp_path / f"epoch={epoch}.deploy.ckpt" for epoch in (0, 2)]
    for path in paths:
        assert verify(path)["output_difference"] <= 1e-5
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN_LOAD, *map(str, paths)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    again = Growable.load_from_checkpoint(paths[1])
    inputs = torch.randn(5, 10)
    torch.testing.assert_close(again.eval()(inputs), model.eval()(inputs))


def test_deploy_files_of_two_growth_events_with_donors(tmp_path: Path) -> None:
    first = make()
    fit(first, tmp_path, CollapseOnSave(), ModelCheckpoint(tmp_path, filename="first"), max_epochs=1)
    donors = ["self", str(tmp_path / "first.deploy.ckpt")]
    model = make()
    fit(model, tmp_path, grow(3, donors=donors), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"), max_epochs=2)
    assert Growable.load_from_checkpoint(tmp_path / "x.deploy.ckpt").hparams["width"] == 16


# ------------------------------------------------------------------ LightningCLI


class Body(nn.Module):
    """A part that is configured by class_path and init_args."""

    def __init__(self, width: int = 8, slope: float = 0.1) -> None:
        super().__init__()
        self.layers = network(width)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)


class Nested(pl.LightningModule):
    """Gets its network as an argument."""

    training_step, train_dataloader = Growable.training_step, Growable.train_dataloader

    def __init__(self, body: nn.Module, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = body
        self.losses: list[float] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.body(inputs)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


def configuration(folder: Path, model: dict[str, Any], event: dict[str, Any], **more: Any) -> str:
    content = {
        "seed_everything": 7,
        "model": model,
        "trainer": {
            "max_epochs": 3,
            "logger": False,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "callbacks": [
                {"class_path": "lightning_sop.DeepFusionGrow", "init_args": event},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": str(folder), "filename": "{epoch}", "save_top_k": -1},
                },
            ],
        },
        **more,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


FLAT = {"class_path": "tests.callbacks.growing.Growable", "init_args": {"width": 8}}
SCHEDULE = {"class_path": "lightning_sop.AtStep", "init_args": {"step": 6}}
OPTIMIZER = {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-sop"])
    monkeypatch.chdir(tmp_path)


class Plain(Growable):
    """Leaves its optimizer to the command line."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)

    configure_optimizers = pl.LightningModule.configure_optimizers


@pytest.mark.filterwarnings("ignore:.*will be overridden:UserWarning")
@pytest.mark.filterwarnings("ignore:Attribute 'body' is an instance")
@pytest.mark.parametrize("case", ["flat", "optimizer", "nested"])
def test_a_run_from_the_command_line(case: str, tmp_path: Path) -> None:
    """With YAML only; its checkpoints resume, and hold the grown hyper-parameters."""
    event = {"grown": {"width": 16}, "schedule": SCHEDULE, "verbose": False}
    model, more = FLAT, {}
    if case == "optimizer":
        model, more = {"class_path": f"{__name__}.Plain"}, OPTIMIZER
    if case == "nested":
        model = {"class_path": f"{__name__}.Nested", "init_args": {"body": {"class_path": f"{__name__}.Body"}}}
        event["grown"] = {"body.width": 16}
    config = configuration(tmp_path, model, event, **more)
    assert main(["fit", "--config", config]) == 0
    saved = {n: torch.load(tmp_path / f"epoch={n}.ckpt", weights_only=True) for n in (0, 2)}
    name = "body.layers.0.weight" if case == "nested" else "net.0.weight"
    assert [saved[n]["state_dict"][name].shape[0] for n in saved] == [8, 16]
    for epoch in (0, 1):
        again = tmp_path / f"again{epoch}"
        again.mkdir()
        config = configuration(again, model, event, **more)
        assert main(["fit", "--config", config, "--ckpt_path", str(tmp_path / f"epoch={epoch}.ckpt")]) == 0
        resumed = torch.load(again / "epoch=2.ckpt", weights_only=True)
        assert same_tensors(dict(resumed["state_dict"]), dict(saved[2]["state_dict"]))
        assert same_tensors(resumed["optimizer_states"], saved[2]["optimizer_states"])
    if case == "nested":
        assert saved[2]["hyper_parameters"]["body"]["init_args"]["width"] == 16
        grown = Nested.load_from_checkpoint(tmp_path / "epoch=2.ckpt")
    else:
        grown = (Plain if case == "optimizer" else Growable).load_from_checkpoint(tmp_path / "epoch=2.ckpt")
    assert same_tensors(dict(grown.state_dict()), dict(saved[2]["state_dict"]))


def test_donors_and_target_in_yaml(tmp_path: Path) -> None:
    paths = []
    for number in (1, 2):
        fit(make(), tmp_path / "x", ModelCheckpoint(tmp_path, filename=f"donor{number}"), max_epochs=number)
        paths.append(str(tmp_path / f"donor{number}.ckpt"))
    grown = {"class_path": "tests.callbacks.growing.network", "init_args": {"width": 16}}
    event = {"donors": paths, "grown": grown, "target": "net", "verbose": False, "weights": [0.25, 0.75]}
    assert main(["fit", "--config", configuration(tmp_path, FLAT, event)]) == 0
    assert torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]["net.0.weight"].shape == (16, 10)
