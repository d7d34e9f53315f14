"""Loggers of all kinds: that take pictures, that take none, that fail, that are not there."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_sop import CollapseOnSave, DynamicsMonitor
from tests.callbacks.helpers import Classifier, fit, overparam, same_tensors, seeded
from tests.callbacks.monitoring import Kept, csv_run, monitored, ours_of

ROOT = Path(__file__).parents[2]
QUICK = {"max_epochs": 1}


def told(caught: pytest.WarningsRecorder) -> list[str]:
    """The warnings of the callback under test."""
    return [str(warning.message) for warning in caught if "DynamicsMonitor" in str(warning.message)]


def everything(**options: Any) -> DynamicsMonitor:
    return DynamicsMonitor(**{"quantities": ["*"], "every": 2, "slow": 1, **options})


class Writer:
    """Like a SummaryWriter of TensorBoard."""

    def __init__(self) -> None:
        self.histograms: dict[str, dict[int, np.ndarray]] = {}
        self.images: dict[str, dict[int, np.ndarray]] = {}
        self.texts: dict[str, dict[int, str]] = {}

    def add_histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        assert np.isfinite(values).all()
        self.histograms.setdefault(tag, {})[step] = values

    def add_image(self, tag: str, image: np.ndarray, step: int, dataformats: str) -> None:
        assert dataformats == "HWC" and image.dtype == np.uint8 and image.ndim == 3
        self.images.setdefault(tag, {})[step] = image

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.setdefault(tag, {})[step] = text


class TensorBoardLogger(Kept):
    """Known by its name; TensorBoard itself need not be installed."""

    def __init__(self) -> None:
        super().__init__()
        self.writer: Any = Writer()

    @property
    def experiment(self) -> Any:
        return self.writer


def test_histograms_and_pictures_for_a_logger_that_takes_them(tmp_path: Path) -> None:
    pictures, plain = TensorBoardLogger(), Kept()
    fit(seeded(Classifier), tmp_path, overparam(3), everything(), logger=[plain, pictures])
    assert plain.ours() == pictures.ours() and plain.ours()
    written = pictures.writer
    assert set(written.histograms) == {
        f"{of}/spectrum/{layer}" for of in ("weights", "updates") for layer in ("net.0", "net.4")
    }
    assert set(written.images) == {"kernels/cosines", "kernels/cosines/net.0", "kernels/cosines/net.4"} | {
        "weights/ranks",
        "updates/ranks",
    }
    spectrum = written.histograms["weights/spectrum/net.4"][4]
    assert spectrum.shape == (5,) and (np.diff(spectrum) <= 0).all()
    shares = spectrum / spectrum.sum()
    rank = plain.rows[4]["weights/effective_rank/net.4"]
    assert rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    # a column for each measurement, a row for each layer
    widths = [
        written.images["weights/ranks"][step].shape[1] // written.images["weights/ranks"][step].shape[0] for step in (2, 6)
    ]
    assert widths == [1, 2]
    cosines = written.images["kernels/cosines/net.0"][0]
    side = cosines.shape[0] // 3
    assert cosines.shape == (3 * side, 3 * side, 3)
    for kernel in range(3):  # each with itself: the last colour
        assert cosines[kernel * side, kernel * side].tolist() == [178, 24, 43]
    assert not any("spectrum" in name or "cosines" in name for row in plain.rows.values() for name in row)


def test_pictures_can_be_switched_off(tmp_path: Path) -> None:
    logger = TensorBoardLogger()
    fit(seeded(Classifier), tmp_path, overparam(2), everything(media=False), logger=logger, **QUICK)
    assert logger.ours() and not logger.writer.images and not logger.writer.histograms


def test_pictures_that_were_asked_for_and_nobody_takes_are_told_of_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="histograms and pictures are left out, because Kept takes none") as caught:
        rows = monitored(seeded(Classifier), tmp_path, overparam(2), everything(media=True))
    assert len(told(caught)) == 1 and set(rows) == {0, 2, 4, 6}


def test_a_history_of_many_measurements_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_sop.callbacks import _monitor_names

    monkeypatch.setattr(_monitor_names, "_MOST_COLUMNS", 4)
    logger = TensorBoardLogger()
    run = fit(seeded(Classifier), tmp_path, overparam(2), everything(every=1), logger=logger)
    (monitor,) = [callback for callback in run.callbacks if isinstance(callback, DynamicsMonitor)]
    history = monitor.state_dict()["history"]["weights/ranks"]
    assert history["steps"] == [0, 4, 6, 7]
    assert {len(row) for row in history["layers"].values()} == {4}


def test_nan_has_no_histogram_and_no_colour(tmp_path: Path) -> None:
    class Diverging(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * float("nan")

    logger = TensorBoardLogger()
    fit(seeded(Diverging), tmp_path, overparam(2), everything(), logger=logger, **QUICK)
    assert list(logger.writer.histograms["weights/spectrum/net.0"]) == [0]  # before the first step
    assert (logger.writer.images["kernels/cosines"][2] == 128).all()
    assert math.isnan(logger.rows[2]["kernels/cosine"])


# ---------------------------------------------------------------------- none


def test_without_a_logger_there_is_one_warning_and_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DynamicsMonitor, "_begin", lambda *_: pytest.fail("something was measured"))
    model = seeded(Classifier)
    with pytest.warns(UserWarning, match="the Trainer has no logger, so nothing is measured") as caught:
        fit(model, tmp_path, overparam(2), everything())
    assert len(told(caught)) == 1 and len(model.losses) == 8


def test_a_fast_run_for_debugging_logs_nowhere(tmp_path: Path) -> None:
    model = seeded(Classifier)
    fit(model, tmp_path, overparam(2), everything(), logger=Kept(), fast_dev_run=2)
    assert len(model.losses) == 2


# ---------------------------------------------------------------------- failing


class Failing(Kept):
    """Fails from its third call on."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if ours_of(metrics):
            super().log_metrics(metrics, step)
            if self.calls >= 3:
                raise self.error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("the server has gone")])
def test_a_logger_that_fails_is_told_of_once_and_left_alone(error: Exception, tmp_path: Path) -> None:
    good, bad = Kept(), Failing(error)
    with pytest.warns(UserWarning, match=f"Failing failed .*{error.args[-1]}.* the run goes on") as caught:
        run = fit(seeded(Classifier), tmp_path, overparam(2), everything(every=1), logger=[bad, good])
    assert len(told(caught)) == 1
    assert bad.calls == 3 and set(good.ours()) == set(range(8))
    assert run.global_step == 8


def test_when_the_last_one_has_failed_nothing_is_measured_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_sop.callbacks import _monitor_measure

    started: list[int] = []
    own = _monitor_measure.Measurement.start
    monkeypatch.setattr(_monitor_measure.Measurement, "start", lambda self: (started.append(self.step), own(self)))
    with pytest.warns(UserWarning, match="Failing failed"):
        run = fit(seeded(Classifier), tmp_path, overparam(2), everything(every=1), logger=Failing(OSError("full")))
    assert started == [0, 1, 2] and run.global_step == 8


class WithoutUserLogs(Classifier):
    """Logs nothing by itself, so that Lightning has nothing to write either."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_a_full_disk_under_a_csv_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows that wait to be written are taken back: Lightning would try again, and stop."""
    logger = CSVLogger(str(tmp_path))
    writer = logger.experiment
    calls: list[int] = []
    own = writer.save

    def save() -> None:
        calls.append(len(writer.metrics))
        if len(calls) > 2 and writer.metrics:
            raise OSError(28, "No space left on device")
        own()

    monkeypatch.setattr(writer, "save", save)
    with pytest.warns(UserWarning, match=r"CSVLogger \(.*\) failed \(OSError: .*No space left on device\)") as caught:
        run = fit(seeded(WithoutUserLogs), tmp_path, overparam(2), everything(every=1), logger=logger, log_every_n_steps=1)
    assert len(told(caught)) == 1 and run.global_step == 8 and writer.metrics == []


class LoseFolder(Callback):
    """Another file is where the logs were."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            folder = Path(trainer.logger.log_dir)
            shutil.rmtree(folder)
            folder.write_text("")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    callbacks = [LoseFolder(), overparam(2), everything(every=1)]
    with pytest.warns(UserWarning, match=r"CSVLogger .* failed \(NotADirectoryError: .*metrics.csv") as caught:
        run = fit(seeded(WithoutUserLogs), tmp_path, *callbacks, logger=CSVLogger(str(tmp_path)), log_every_n_steps=1)
    assert len(told(caught)) == 1 and run.global_step == 8


class NoPictures(Writer):
    def add_image(self, *args: Any, **options: Any) -> None:
        raise ImportError("add_image needs pillow")


def test_pictures_that_fail_leave_the_numbers(tmp_path: Path) -> None:
    logger = TensorBoardLogger()
    logger.writer = NoPictures()
    with pytest.warns(
        UserWarning, match="could not take a histogram or picture .ImportError: add_image needs pillow"
    ) as caught:
        fit(seeded(Classifier), tmp_path, overparam(2), everything(), logger=logger)
    assert len(told(caught)) == 1 and set(logger.ours()) == {0, 2, 4, 6}


# ---------------------------------------------------------------------- W&B


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A WandbLogger that writes to disk only."""
    wandb = pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    yield lambda **options: pl.loggers.WandbLogger(project="test", save_dir=str(tmp_path), **options)
    wandb.finish()
    wandb.teardown()


def history_of(folder: Path) -> list[dict[str, Any]]:
    """The rows in an offline run's file, which is a log as LevelDB writes it."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = Path(folder).rglob("*.wandb")
    data, place, parts, rows = file.read_bytes(), 7, b"", []
    while place < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_wandb_offline_with_watch_and_log_model(offline: Any, tmp_path: Path) -> None:
    model, plain = seeded(Classifier), seeded(Classifier)
    logger = offline(log_model="all")
    logger.watch(model, log="all", log_freq=2)
    saved = ModelCheckpoint(tmp_path / "saved", save_top_k=-1)
    fit(model, tmp_path, overparam(3, seed=0), CollapseOnSave(), everything(), saved, logger=logger, log_every_n_steps=1)
    logger.experiment.finish()
    fit(plain, tmp_path, overparam(3, seed=0))
    assert same_tensors(model.state_dict(), plain.state_dict())

    rows = history_of(tmp_path)
    mine = {row["trainer/global_step"]: row for row in rows if "weights/norm" in row}
    assert sorted(mine) == [0, 2, 4, 6]
    reference = monitored(seeded(Classifier), tmp_path / "beside", overparam(3, seed=0), everything())
    for step, row in mine.items():
        numbers = {name: value for name, value in ours_of(row).items() if isinstance(value, (int, float))}
        expected = reference[step]
        assert {name: numbers[name] for name in expected} == pytest.approx(expected)
        assert row["weights/spectrum/net.0._type"] == "histogram"
        assert row["kernels/cosines._type"] == row["updates/ranks._type"] == "image-file"
    assert any("parameters/net.0.weight._type" in row for row in rows)  # what W&B watches by itself


def test_what_watches_the_module_does_not_see_our_copies() -> None:
    from lightning_sop.callbacks._monitor_losses import subject_of

    model, seen = seeded(Classifier), []

    def watching(*_: Any) -> None:
        seen.append("W&B")

    def own(*_: Any) -> None:
        seen.append("own")

    watching.__module__ = "wandb.integration.torch.wandb_torch"
    model.net.register_forward_pre_hook(watching)
    model.net.register_forward_hook(watching)
    model.net.register_forward_hook(own)
    copied = subject_of(model)
    copied.net(torch.zeros(4, 10))
    assert seen == ["own"]
    model.net(torch.zeros(4, 10))
    assert seen == ["own", "W&B", "W&B", "own"]


WITHOUT_WANDB = """
import sys
for name in ("wandb", "tensorboard", "tensorboardX"): sys.modules[name] = None
import warnings; warnings.simplefilter("ignore")
from tests.callbacks.helpers import Classifier, fit, overparam, seeded
from tests.callbacks.monitoring import csv_run
from lightning_sop import DynamicsMonitor
rows = csv_run(seeded(Classifier), {folder!r}, overparam(2), DynamicsMonitor(["*"], every=2))
assert len([row for row in rows if "weights/effective_rank" in row]) == 1 and len(rows) > 3
"""


def test_a_run_where_wandb_is_not_installed(tmp_path: Path) -> None:
    code = WITHOUT_WANDB.format(folder=str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_file_of_a_csv_logger(tmp_path: Path) -> None:
    rows = csv_run(seeded(Classifier), tmp_path, overparam(2), everything())
    mine = [row for row in rows if "weights/norm" in row]
    assert [row["step"] for row in mine] == ["0", "2", "4", "6"]
    assert all(math.isfinite(float(cell)) for row in mine for cell in row.values())


def test_every_logger_that_lightning_offers_is_a_logger(tmp_path: Path) -> None:
    """A logger of the user's own needs nothing but Lightning's interface."""

    class Mine(Logger):
        name = version = "mine"

        def __init__(self) -> None:
            super().__init__()
            self.steps: list[Any] = []

        def log_hyperparams(self, *args: Any, **options: Any) -> None:
            pass

        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            assert all(isinstance(value, float) for value in ours_of(metrics).values())
            self.steps.append(step)

    logger = Mine()
    fit(seeded(Classifier), tmp_path, overparam(2), everything(), logger=logger, **QUICK)
    assert {0, 2} <= set(logger.steps)
