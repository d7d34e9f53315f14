"""Growth on two processes of the CPU."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_sop import OnPlateau
from tests.callbacks.growing import Growable, donor, every_epoch, grow, make
from tests.callbacks.helpers import fit, run_script, same_tensors, seeded
from tests.callbacks.test_growth_resume import NeedsTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


class Report(Callback):
    """Leaves what each rank ended with in a file of its own."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = str(folder)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        os.makedirs(self.folder, exist_ok=True)
        event = next((c for c in trainer.callbacks if hasattr(c, "grown_at")), None)
        content = {"weights": pl_module.state_dict(), "losses": pl_module.losses, "event": event and event.state_dict()}
        content["optimizer"] = trainer.optimizers[0].state_dict()
        torch.save(content, os.path.join(self.folder, f"rank{trainer.global_rank}.pt"))


def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def as_rank(rank: int, job: Callable[..., None], port: int, args: Any, options: Any) -> None:
    names = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, (str(rank), "0", "2", "127.0.0.1", str(port)), strict=True))
    job(*args, **options)


def on_two_ranks(job: Callable[..., None], *args: Any, **options: Any) -> None:
    """Run a function in two processes that Lightning takes for started by a launcher of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(as_rank, (job, port, args, options), nprocs=2, start_method="fork")


def ddp(folder: Path, model: pl.LightningModule, *callbacks: Callback, **options: Any) -> None:
    strategy = DDPStrategy(process_group_backend="gloo", **options.pop("ddp", {}))
    fit(model, folder, *callbacks, Report(folder), devices=2, strategy=strategy, **options)


class Unused(Growable):
    """Has parameters that no step uses."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.unused = nn.Linear(width, width)


class NotSynchronized(Growable):
    """Logs a metric that falls on one rank and rises on the other."""

    def __init__(self, width: int = 8, falls_on: int = 0) -> None:
        super().__init__(width)
        self.falls_on = falls_on

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch) * (-1 if self.global_rank == self.falls_on else 1))


def resumed(folder: Path, build: Any, events: Any, options: dict[str, Any]) -> None:
    """The whole run, then again from each of its checkpoints."""
    ddp(folder / "full", build(), *events(), every_epoch(folder), max_epochs=4, **options)
    for epoch in range(3):
        again = [*events(), every_epoch(folder / "again")]
        ddp(folder / f"part{epoch}", build(), *again, ckpt=folder / f"epoch={epoch}.ckpt", max_epochs=4, **options)


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adamw": (make, lambda: [grow(3)], {}),
    "two-events": (lambda: make(optimizer="sgd"), lambda: [grow(3), grow(5, width=32)], {}),
    "accumulation": (make, lambda: [grow(2)], {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "needs-trainer": (lambda: seeded(NeedsTrainer), lambda: [grow(2)], {}),
    "unused": (lambda: seeded(Unused), lambda: [grow(3)], {"ddp": {"find_unused_parameters": True}}),
}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:.*find_unused_parameters.*")
@pytest.mark.parametrize("case", CASES)
def test_resume_is_bitwise_on_two_ranks(case: str, tmp_path: Path) -> None:
    """And the ranks stay equal, but for the batches and the statistics of BatchNorm that each has of its own."""
    on_two_ranks(resumed, tmp_path, *CASES[case])
    full = ranks(tmp_path / "full")
    weights = [{n: t for n, t in rank["weights"].items() if "running" not in n} for rank in full]
    assert same_tensors(*weights) and weights[0]["net.0.weight"].shape[0] == (32 if case == "two-events" else 16)
    assert same_tensors(full[0]["event"], full[1]["event"]) and same_tensors(full[0]["optimizer"], full[1]["optimizer"])
    assert full[0]["losses"] != full[1]["losses"]
    for epoch in range(3):
        for left, right in zip(ranks(tmp_path / f"part{epoch}"), full, strict=True):
            steps = len(right["losses"]) // 4
            assert left["losses"] == right["losses"][(epoch + 1) * steps :]
            assert same_tensors(left["event"], right["event"]) and same_tensors(left["optimizer"], right["optimizer"])


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    """Growth at the first step keeps the function on both, with the same weights."""
    on_two_ranks(ddp, tmp_path / "plain", make())
    on_two_ranks(ddp, tmp_path / "grown", make(), grow(2))
    for plain, grown in zip(ranks(tmp_path / "plain"), ranks(tmp_path / "grown"), strict=True):
        assert grown["losses"][:2] == plain["losses"][:2]
        assert grown["losses"][2] == pytest.approx(plain["losses"][2], rel=1e-4)


def test_donors_from_files_on_two_ranks(tmp_path: Path) -> None:
    paths = [donor(tmp_path, "a", 1), donor(tmp_path, "b", 2, width=12)]
    on_two_ranks(ddp, tmp_path / "x", make(), grow(2, 28, donors=["self", *paths]))
    one, two = ranks(tmp_path / "x")
    assert one["weights"]["net.0.weight"].shape == (28, 10)
    assert same_tensors(one["optimizer"], two["optimizer"])


@pytest.mark.filterwarnings("ignore:.*sync_dist.*")
@pytest.mark.parametrize("falls_on", [0, 1])
def test_all_ranks_decide_alike(falls_on: int, tmp_path: Path) -> None:
    """Where a metric differs between ranks, the first one's counts."""
    event = grow(None, schedule=OnPlateau(patience=1))
    on_two_ranks(ddp, tmp_path, seeded(NotSynchronized, falls_on=falls_on), event, max_steps=5, max_epochs=-1)
    expected = None if falls_on == 0 else 4
    assert [rank["event"]["grown_at"] for rank in ranks(tmp_path)] == [expected, expected]


def compiled(folder: Path, **options: Any) -> None:
    ddp(folder, torch.compile(seeded(Growable), backend="eager"), grow(2), **options)


@pytest.mark.filterwarnings("ignore:.*")
def test_a_compiled_lightning_module_on_two_ranks(tmp_path: Path) -> None:
    on_two_ranks(compiled, tmp_path / "compiled")
    on_two_ranks(ddp, tmp_path / "eager", make(), grow(2))
    for left, right in zip(ranks(tmp_path / "compiled"), ranks(tmp_path / "eager"), strict=True):
        assert left["losses"] == pytest.approx(right["losses"], rel=1e-4)
        assert left["weights"]["net.0.weight"].shape == (16, 10)


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.callbacks.growing import grow, make
from tests.callbacks.test_growth_ddp import ddp
from pathlib import Path
ddp(Path({folder!r}), make(), grow(1), max_epochs=1)
"""


def test_subprocess_launcher(tmp_path: Path) -> None:
    run_script(tmp_path, SCRIPT)
    one, two = ranks(tmp_path)
    assert same_tensors(one["optimizer"], two["optimizer"]) and one["event"]["grown_at"] == 1
