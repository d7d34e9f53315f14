"""The study of quality on tasks that are not its own: modules and data of a user, with what they have and what they lack."""

import io
import math

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("sklearn")

from benchmarks.quality import plan as planning
from benchmarks.quality.checks import unusable
from benchmarks.quality.config import DiskError, StudyError, refined
from benchmarks.quality.execute import _Execution
from benchmarks.quality.place import Place, digests
from benchmarks.quality.reading import read_study
from benchmarks.quality.store import Store
from benchmarks.quality.table import render, rows, rows_by_task, write
from benchmarks.quality.train import perform
from benchmarks.quality.why import at_equal_loss
from tests.test_quality import STUDY, fake, random_state, study  # noqa: F401


class Regression(LightningModule):
    """Predicts the sum of its inputs; its score is the mean absolute error."""

    def __init__(self, lr: float = 0.01, shift: float = 0.0, loss_name: str = "loss", test: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, inputs):
        return self.layers(inputs)

    def evaluated(self, batch, part, factor=1.0):
        error = self(batch[0]).squeeze(1) - batch[1]
        loss = error.square().mean() + self.hparams.shift
        self.log_dict({f"{part}_{self.hparams.loss_name}": loss * factor, f"{part}_mae": error.abs().mean()})
        return loss

    def training_step(self, batch, batch_idx):
        return self.evaluated(batch, "train")

    def validation_step(self, batch, batch_idx):
        self.evaluated(batch, "val")

    def test_step(self, batch, batch_idx):
        self.evaluated(batch, "test", self.hparams.test)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class Sums(LightningDataModule):
    """Raw inputs, which are scaled on the device: in every loop, if the Trainer knows the data module."""

    def __init__(self, several: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.several = several

    def loader(self, shuffle=False):
        inputs = 100 * torch.randn(96, 4, generator=torch.Generator().manual_seed(3))
        return DataLoader(TensorDataset(inputs, inputs.sum(1) / 100), 32, shuffle=shuffle)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] / 100, *batch[1:]]

    def train_dataloader(self):
        return self.loader(shuffle=True)

    def val_dataloader(self):
        return self.loader()

    def test_dataloader(self):
        return self.loader()


class Untested(Sums):
    """Has no test set."""

    test_dataloader = LightningDataModule.test_dataloader


SPACE = {
    "title": "sums",
    "score": "mae",
    "options": {
        "rate": {"key": "model.init_args.lr", "log": [0.001, 0.1]},
        "epochs": {"key": "trainer.max_epochs", "choice": [2, 3]},
    },
}


@pytest.fixture
def own(tmp_path):
    """A study of such a task; arguments for the module, and what is added to its three files."""

    def make(model=(), data="Sums", trainer=(), space=(), **changes):
        task = {
            "model": {"class_path": f"{__name__}.Regression", "init_args": {"lr": 0.01, **dict(model)}},
            "data": {"class_path": f"{__name__}.{data}", "init_args": {"seed": 0}},
            "trainer": {"max_epochs": 3, **dict(trainer)},
        }
        for folder, content in (("tasks", task), ("spaces", {**SPACE, **dict(space)})):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "sums.yaml").write_text(yaml.safe_dump(content))
        row = {"name": "plain", "method": "plain"}
        changes = {"stages": [[row]], "trials": 1, "seeds": [0, 1, 2], **changes}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**STUDY, "tasks": ["sums"], **changes}))
        return read_study(str(tmp_path / "mine.yaml"))

    return make


@pytest.fixture
def place(tmp_path):
    return Place(None, str(tmp_path / "networks"), "cpu")


def train(study, place, name="plain"):  # noqa: F811
    """All runs of a row."""
    results = {}
    task, row = next(iter(study.tasks.values())), study.variants[name]
    for run in planning.trials(study, task, row):
        results[run.key] = perform(run, place)
    for run in planning.finals(study, task, row, results).values():
        results[run.key] = perform(run, place)
    return results


def test_what_a_data_module_does_to_batches_is_done_in_all_loops(own, place):
    for result in train(own(), place).values():
        if result["phase"] == "final":  # they have the same data here
            assert result["metrics"]["test_loss"] == pytest.approx(result["metrics"]["val_loss"], rel=1e-4)
            assert result["metrics"]["val_loss"] < 10  # 1e4 times as much without


def test_a_page_says_what_a_score_is_and_which_way_is_better(own, place, tmp_path):
    study = own()  # noqa: F811
    results = train(study, place)
    page = "\n".join(render(study, rows_by_task(study, results), results, "", []))
    assert "test mae" in page
    assert not study.tasks["sums"].higher
    assert write(study, results, tmp_path, "command").exists()


def test_more_of_a_score_is_better_where_its_space_says_so(own):
    study = own(space={"higher": True})  # noqa: F811
    assert study.tasks["sums"].higher


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "Untested"}, "Untested has no test_dataloader"),
        ({"trainer": {"check_val_every_n_epoch": 2}}, "validates at other times than after each epoch"),
        ({"trainer": {"val_check_interval": 0.5}}, "validates at other times than after each epoch"),
        ({"stages": [["wide"]]}, "Regression has no hidden units that can be widened"),
        ({"stages": [["gradient_penalty"]]}, "lr"),
        ({"model": {"lrr": 1.0}}, "lrr"),
    ],
)
def test_rows_that_cannot_be_run_are_told_before_anything_is_trained(own, place, options, message):
    study = own(**options)  # noqa: F811
    ((where, problem),) = unusable(study, {}, place).items()
    assert where == ("sums", next(iter(study.variants)))
    assert message in problem


def test_an_ensemble_needs_to_know_what_its_members_are(own, place):
    study = own(stages=[["plain", "k_ensemble"]], seeds=[0])  # noqa: F811
    results = train(study, place)
    for slot in planning.plan(study, results):
        if slot.run and slot.phase == "teacher":
            results[slot.run.key] = fake(slot.run, 0.5)
    assert "Regression has no net" in unusable(study, results, place)["sums", "k_ensemble"]


def test_a_module_that_logs_no_loss_is_told(own, place):
    study = own(model={"loss_name": "mse"})  # noqa: F811
    with pytest.raises(StudyError, match="Regression logs no val_loss in validation_step; it logs .*val_mse"):
        train(study, place)


def test_rows_are_given_up_after_the_same_error_twice(own, place, tmp_path):
    study = own(trials=4)  # noqa: F811
    said = io.StringIO()
    execution = _Execution(study, Store(tmp_path / "results"), place, 1, None, Console(file=said, width=200))
    for number, slot in enumerate([slot for slot in planning.plan(study, {}) if slot.run][:2]):
        assert len(execution._open()) == 4 - number
        execution._finish(slot, {"key": slot.run.key, "error": "Traceback\n  here\nValueError: no"})
    assert execution._open() == []
    assert "sums plain: the same error for the second time; its other runs are left out" in said.getvalue()


def test_a_network_that_cannot_be_written_ends_the_study(own, place, tmp_path):
    study = own()  # noqa: F811
    (tmp_path / "networks").write_text("no folder")
    with pytest.raises(DiskError, match="safetensors cannot be written"):
        train(study, place)
    slot = planning.plan(study, {})[0]
    execution = _Execution(study, Store(tmp_path / "results"), place, 1, None, Console(file=io.StringIO()))
    with pytest.raises(StudyError, match="disk full"):
        execution._finish(slot, {"key": slot.run.key, "error": "disk full", "fatal": True})


def test_runs_that_stop_at_different_epochs_have_a_curve_together(own, place, tmp_path):
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss", "patience": 1, "min_delta": 9.0}}
    study = own(trainer={"callbacks": [stopping]})  # noqa: F811
    results = train(study, place)
    assert {result["metrics"]["epochs"] for result in results.values()} == {2}  # of 3
    first = next(result for result in results.values() if result["phase"] == "final")
    first["metrics"]["curve"]["val_loss"].append(0.5)
    assert write(study, results, tmp_path, "command").exists()


def test_losses_may_be_negative(own, place, tmp_path):
    study = own(model={"shift": -5.0})  # noqa: F811
    assert write(study, train(study, place), tmp_path, "command").exists()
    first = [{"epoch": epoch, "loss": -0.1 * epoch, "batch_gradient": 2.0} for epoch in range(9)]
    assert at_equal_loss([{**row, "batch_gradient": 3.0} for row in first], first) == pytest.approx(1.5)


def test_a_test_loss_that_is_no_number_is_in_no_mean(own, place, tmp_path):
    study = own(model={"test": math.inf})  # noqa: F811
    results = train(study, place)
    row = rows(study, study.tasks["sums"], results)["plain"]
    assert (len(row.done), row.diverged) == (0, [0, 1, 2])
    assert "3 diverged" in write(study, results, tmp_path, "command").read_text()


def test_where_no_rate_is_searched_further_trials_are_drawn(own):
    study = own(trials=2, refinements=2)  # noqa: F811
    task, row, results = study.tasks["sums"], study.variants["plain"], {}
    for _ in range(3):
        found = planning.trials(study, task, row, results)
        results = {run.key: fake(run, 0.5) for run in found}
    assert len(results) == len(found) == study.all_trials == 6
    assert refined([({"lr": 0.1}, 0.5)], {"lr": 0.1}) == []


def test_a_run_is_begun_by_one_process_only(study, tmp_path):  # noqa: F811
    mine, others = Store(tmp_path), Store(tmp_path)
    assert mine.claim("a")
    assert not others.claim("a")
    assert others.claim("b")
    mine.release("a")
    assert others.claim("a")
    assert not mine.claim("a")
    for key in ("a", "b"):
        others.release(key)
    assert list((tmp_path / ".running").iterdir()) == []


def test_data_outside_the_folder_are_found(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere.npz").write_bytes(b"1")
    assert list(digests(tmp_path / "data", str(tmp_path / "elsewhere.npz"))) == ["../elsewhere.npz"]


def test_numbers_that_yaml_reads_as_text_are_told(own):
    options = {**SPACE["options"], "rate": {"key": "model.init_args.lr", "choice": ["1e-3", "1e-2"]}}
    with pytest.raises(StudyError, match=r"option rate: YAML reads 1e-3 as text"):
        own(space={"options": options})


def test_bases_are_sought_beside_a_study(own, tmp_path):
    own(title="Base")
    (tmp_path / "base.yaml").write_text((tmp_path / "mine.yaml").read_text())
    rows = [{"name": "plain", "method": "plain", "tuned": "base/plain"}]
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({**STUDY, "tasks": ["sums"], "bases": ["base"], "stages": [rows], "seeds": [0]})
    )
    assert read_study(str(tmp_path / "mine.yaml")).bases["base"].title == "Base"
