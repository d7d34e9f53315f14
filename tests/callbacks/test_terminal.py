"""What callbacks print, and where they keep quiet."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import rich
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from rich.console import Console
from rich.errors import LiveError
from rich.progress import Progress
from torch import nn
from torch.utils.data import DataLoader

from lightning_sop import CollapseOnSave, SimulatedOverparam, TrainingCost
from lightning_sop.callbacks import _terminal
from lightning_sop.callbacks._deploy_table import deploy_table
from lightning_sop.callbacks._terminal import LateBar, show

FIRST: Any = SimpleNamespace(is_global_zero=True)
SECOND: Any = SimpleNamespace(is_global_zero=False)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal, and nothing is too short to be shown on it."""
    text = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=text, force_terminal=True, width=140))
    monkeypatch.setattr(_terminal, "_LONG", 0.0)
    return text


class Normed(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))  # type: ignore[assignment]


def train(folder: Path, **options: Any) -> None:
    callbacks = [
        SimulatedOverparam(reestimate_batchnorm=3, **options),
        CollapseOnSave(**options),
        TrainingCost(**options),
        ModelCheckpoint(folder, save_top_k=-1),
    ]
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=2, limit_val_batches=0, callbacks=callbacks, **quiet)
    trainer.fit(Normed(), DataLoader(RandomDataset(32, 24), 8))


def test_a_run_says_what_it_rewrites_deploys_and_costs(tmp_path: Path, screen: io.StringIO) -> None:
    train(tmp_path)
    text = screen.getvalue()
    tables = ("Simulated over-parametrization", "Deployed in", "Cost of training")
    assert all(text.count(title) == 1 for title in tables), text
    assert text.index(tables[0]) < text.index(tables[1])
    assert "BatchNorm statistics of the collapsed weights: batches" in text
    for path in tmp_path.glob("*.deploy.ckpt"):
        assert path.name in text
    assert sorted(path.name for path in tmp_path.glob("*.deploy.ckpt"))


def test_nothing_is_printed_where_nobody_watches(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path)
    out = capfd.readouterr().out
    assert "over-parametrization" not in out and "Deployed" not in out and "Cost" not in out
    train(tmp_path / "asked", verbose=True)
    out = capfd.readouterr().out
    assert "over-parametrization" in out and "Deployed" in out and "Cost" in out


def test_nothing_is_printed_where_it_is_not_wanted(tmp_path: Path, screen: io.StringIO) -> None:
    train(tmp_path, verbose=False)
    assert "Deployed" not in screen.getvalue() and "Cost" not in screen.getvalue()


def test_other_ranks_are_quiet(screen: io.StringIO) -> None:
    show(SECOND, True, "a table")
    with LateBar(SECOND, "long work", at_once=True) as bar:
        bar.show("part", 1, 2)
    assert not screen.getvalue()
    show(FIRST, None, "a table", "and another")
    assert "a table\nand another" in screen.getvalue()


def test_short_work_shows_nothing(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_terminal, "_LONG", 60.0)
    with LateBar(FIRST, "short work") as bar:
        bar.show("part", 1, 2)
    assert not screen.getvalue()
    with LateBar(FIRST, "one long step", at_once=True):
        pass
    assert "one long step" in screen.getvalue()


@pytest.mark.parametrize("nested", [True, False])
def test_beside_another_bar(nested: bool, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of rich have one at a time."""

    def refuse(self: Progress) -> None:
        raise LiveError("Only one live display may be active at once")

    with Progress(console=rich.get_console()):
        if not nested:
            monkeypatch.setattr(Progress, "start", refuse)
        with LateBar(FIRST, "long work") as bar:
            bar.show("part", 1, 2)
            bar.show("part", 2, 2)
    assert ("long work" in screen.getvalue()) or not nested


def test_a_bar_is_gone_after_an_error(screen: io.StringIO) -> None:
    def fail() -> None:
        with LateBar(FIRST, "long work") as bar:
            bar.show("part", 1, 2)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    length = len(screen.getvalue())
    rich.print("next")
    assert screen.getvalue()[length:] == "next\n"


def test_of_many_files_the_last_are_shown(screen: io.StringIO) -> None:
    receipt = {"global_step": 3, "values": 10, "bytes": 40, "output_difference_relative": None}
    rich.print(deploy_table({f"/runs/{number}.deploy.ckpt": receipt for number in range(13)}))
    text = screen.getvalue()
    assert "3 earlier ones" in text and "12.deploy.ckpt" in text and "/2.deploy.ckpt" not in text
    assert "not compared" in text
