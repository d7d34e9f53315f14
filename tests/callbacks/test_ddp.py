"""Two processes on the CPU, with every launcher."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from tests.callbacks.helpers import Classifier, fit, overparam, run_script, same_tensors, seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*sync_dist.*"),
]


def make(**options: Any) -> Classifier:
    return seeded(Classifier, shuffle=False, dropout=0.0, **options)


class Report(Callback):
    """Leaves what each rank ended with in a file of its own."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = str(folder)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ours = next((c for c in trainer.callbacks if hasattr(c, "engine")), None)
        state = None if ours is None else ours.state_dict()
        content = {"weights": pl_module.state_dict(), "losses": pl_module.losses, "ours": state}
        content["optimizer"] = trainer.optimizers[0].state_dict()
        torch.save(content, os.path.join(self.folder, f"rank{trainer.global_rank}.pt"))


def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def ddp(folder: Path, model: pl.LightningModule, *callbacks: Callback, start: str = "fork", **options: Any) -> list[Any]:
    folder.mkdir(exist_ok=True)
    strategy = options.pop("strategy", None) or DDPStrategy(start_method=start, process_group_backend="gloo")
    fit(model, folder, *callbacks, Report(folder), devices=2, strategy=strategy, **options)
    return ranks(folder)


class PerRankStart(Classifier):
    """Different initial weights on each rank, as without a seed: DDP makes the weights agree, we the kernels."""

    def setup(self, stage: str) -> None:
        torch.manual_seed(self.trainer.global_rank)
        self.net[0].reset_parameters()
        torch.manual_seed(0)


@pytest.mark.parametrize("case", ["seeded", "unseeded", "accumulation"])
def test_ranks_stay_equal(case: str, tmp_path: Path) -> None:
    model = PerRankStart(shuffle=False, dropout=0.0) if case == "unseeded" else make()
    one, two = ddp(tmp_path, model, overparam(3), accumulate_grad_batches=2 if case == "accumulation" else 1)
    weights = {name: value for name, value in one["weights"].items() if "running" not in name and "tracked" not in name}
    assert same_tensors(weights, {name: two["weights"][name] for name in weights})
    assert same_tensors(one["ours"], two["ours"])
    assert one["losses"] != two["losses"]  # each rank has its own data


def test_factor_one_is_plain_ddp(tmp_path: Path) -> None:
    plain = ddp(tmp_path / "plain", make())
    ours = ddp(tmp_path / "ours", make(), overparam(1))
    for left, right in zip(ours, plain, strict=True):
        assert left["losses"] == right["losses"]
        assert same_tensors(left["weights"], right["weights"])
        assert same_tensors(left["optimizer"], right["optimizer"])


def test_resume_is_bitwise_on_two_ranks(tmp_path: Path) -> None:
    callbacks = [overparam(3), ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1)]
    full = ddp(tmp_path / "full", make(), *callbacks, max_epochs=4)
    file = tmp_path / "saved" / "epoch=1.ckpt"
    # BatchNorm statistics are each rank's own and rank 0's are saved: they do not enter a training loss
    part = ddp(tmp_path / "part", make(), *callbacks, max_epochs=4, ckpt=file)
    for left, right in zip(part, full, strict=True):
        assert left["losses"] == right["losses"][len(right["losses"]) // 2 :]
        assert same_tensors(left["ours"], right["ours"])
        assert same_tensors(left["optimizer"], right["optimizer"])


class Counting(Callback):
    """Counts the bytes that DDP reduces, by a communication hook."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = str(folder)
        self.bytes = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(self, reduce_and_count)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            Path(self.folder, "bytes").write_text(str(self.bytes))


def reduce_and_count(counter, bucket):  # no annotations: DDP checks them, and here they would be strings
    buffer = bucket.buffer()
    counter.bytes += buffer.numel() * buffer.element_size()
    work = dist.all_reduce(buffer.div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def test_the_plain_gradient_is_what_is_reduced(tmp_path: Path) -> None:
    counted = []
    for name, callbacks in (("plain", []), ("ours", [overparam(4)])):
        folder = tmp_path / name
        folder.mkdir()
        ddp(folder, make(), *callbacks, Counting(folder), max_epochs=1)
        counted.append(int((folder / "bytes").read_text()))
    assert counted[0] == counted[1] > 0


def test_spawn(tmp_path: Path) -> None:
    one, two = ddp(tmp_path, make(), overparam(3), start="spawn", max_epochs=1)
    assert same_tensors(one["ours"], two["ours"])


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from lightning.pytorch.strategies import DDPStrategy
from tests.callbacks.helpers import overparam
from tests.callbacks.test_ddp import Report, fit, make
fit(make(), {folder!r}, overparam(3), Report({folder!r}), devices=2, max_epochs=1,
    strategy=DDPStrategy(process_group_backend="gloo"))
"""


def test_subprocess_launcher(tmp_path: Path) -> None:
    run_script(tmp_path, SCRIPT)
    one, two = ranks(tmp_path)
    assert same_tensors(one["ours"], two["ours"]) and one["losses"] != two["losses"]


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAStrategy"])
def test_sharding_strategies_are_refused_by_name(name: str, tmp_path: Path) -> None:
    class Pretend(pl.strategies.SingleDeviceStrategy):
        pass

    Pretend.__name__ = name
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=name):
        fit(make(), tmp_path, overparam(3), strategy=Pretend(torch.device("cpu")), accelerator="auto")
