"""A run does not notice that it is watched: not its weights, random numbers, buffers or end. In every kind of run."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.demos import Transformer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_sop import DynamicsMonitor
from lightning_sop.dynamics.quantities import find
from tests.callbacks.helpers import (
    Classifier,
    InConfigureModel,
    InSetup,
    Manual,
    fit,
    overparam,
    same_tensors,
    seeded,
    trainer,
)
from tests.callbacks.monitoring import Kept, monitored

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*sync_dist.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*training_step.* returned .None"),
]


def everything(**options: Any) -> DynamicsMonitor:
    """Every row, at every step."""
    return DynamicsMonitor(**{"quantities": ["*"], "every": 1, "slow": 1, "media": False, **options})


class States(Callback):
    """Global random states and buffers at every batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __deepcopy__(self, memo: Any) -> States:
        return self

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
        self.seen.append((torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), buffers))


class HalfSteps(Classifier):
    """Skips some batches, and logs."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return None if batch_idx == 1 else {"loss": loss, "kept": batch_idx}


RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (Classifier, {}),
    "sgd": (lambda: Classifier(optimizer="sgd"), {}),
    "lbfgs": (lambda: Classifier(optimizer="lbfgs", dropout=0.0), {}),
    "accumulation and clipping": (Classifier, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "manual optimization": (Manual, {}),
    "steps without a loss": (HalfSteps, {}),
    "layers in setup": (InSetup, {}),
    "layers in configure_model": (InConfigureModel, {}),
    "bfloat16": (Classifier, {"precision": "bf16-true"}),
    "bfloat16, mixed": (Classifier, {"precision": "bf16-mixed"}),
    "float16, mixed": (Classifier, {"plugins": MixedPrecision("16-mixed", "cpu")}),
    "double": (Classifier, {"precision": "64-true"}),
}


@pytest.mark.parametrize("larger", [True, False], ids=["overparam", "plain"])
@pytest.mark.parametrize("name", RUNS)
def test_the_run_is_the_same_bit_for_bit(name: str, larger: bool, tmp_path: Path) -> None:
    make, options = RUNS[name]
    results = []
    for callbacks in ([], [everything()]):
        model, states = seeded(make), States()
        before = [overparam(3, seed=5)] if larger else []
        random.seed(3)
        np.random.seed(3)
        logger = Kept()
        fit(model, tmp_path, *before, *callbacks, states, logger=logger, **copy.deepcopy(options))
        results.append((model.state_dict(), model.losses, states.seen))
    assert same_tensors(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    for left, right in zip(results[0][2], results[1][2], strict=True):
        assert torch.equal(left[0], right[0]) and left[1:3] == right[1:3] and same_tensors(left[3], right[3])
    rows = logger.ours()
    assert set(rows) == set(range(4 if "accumulate_grad_batches" in options else 8))
    for row in rows.values():
        assert [key for key in row if find(key) is None] == []
        assert "weights/norm" in row and ("kernels/spread" in row) == larger
    assert "gradients/norm" in rows[0] and "updates/norm" in rows[0]
    assert ("loss/gap" in rows[0]) == (larger and name != "manual optimization")


@pytest.mark.parametrize("order", ["first", "last"])
def test_the_order_of_callbacks_does_not_matter(order: str, tmp_path: Path) -> None:
    callbacks: list[Any] = [overparam(3, seed=5), everything()]
    rows = monitored(seeded(Classifier), tmp_path, *(callbacks[::-1] if order == "first" else callbacks))
    again = monitored(seeded(Classifier), tmp_path, *callbacks)
    assert rows == again


def test_averaged_weights_are_no_matter(tmp_path: Path) -> None:
    rows = monitored(seeded(Classifier), tmp_path, EMAWeightAveraging(), overparam(3), everything())
    plain = monitored(seeded(Classifier), tmp_path, overparam(3), everything())
    assert {name: rows[3][name] for name in plain[3]} == plain[3]


# ---------------------------------------------------------------------- steps and optimizers


def test_gradients_are_unscaled_and_not_clipped(tmp_path: Path) -> None:
    quantities = ["gradients/norm", "updates/norm"]
    plain = monitored(seeded(Classifier, "sgd"), tmp_path, everything(quantities=quantities))
    clipped = monitored(seeded(Classifier, "sgd"), tmp_path, everything(quantities=quantities), gradient_clip_val=1e-3)
    assert clipped[0]["gradients/norm"] == plain[0]["gradients/norm"] > 1e-2
    assert clipped[0]["updates/norm"] < 0.1 * plain[0]["updates/norm"]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    half = MixedPrecision("16-mixed", "cpu", scaler)
    scaled = monitored(seeded(Classifier, "sgd", dropout=0.0), tmp_path, everything(quantities=quantities), plugins=half)
    quiet = monitored(seeded(Classifier, "sgd", dropout=0.0), tmp_path, everything(quantities=quantities))
    assert scaled[0]["gradients/norm"] == pytest.approx(quiet[0]["gradients/norm"], rel=0.02)


class Fused(Classifier):
    """Its optimizer unscales the gradients by itself."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)


class Exploding(Classifier):
    """Its second loss is too large for float16."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (1e30 if batch_idx == 1 else 1)


def test_gradients_that_the_optimizer_unscales(tmp_path: Path) -> None:
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    monitor = everything(quantities=["gradients/norm"])
    scaled = monitored(seeded(Fused, dropout=0.0), tmp_path, monitor, plugins=half)
    plain = monitored(seeded(Fused, dropout=0.0), tmp_path, monitor)
    assert scaled[0]["gradients/norm"] == pytest.approx(plain[0]["gradients/norm"], rel=0.02)


def test_infinite_gradients_are_logged_as_such_and_a_skipped_step_has_no_update(tmp_path: Path) -> None:
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    rows = monitored(seeded(Exploding), tmp_path, overparam(2), everything(), plugins=half, max_epochs=1)
    assert not np.isfinite(rows[1]["gradients/norm"]) and not np.isfinite(rows[1]["gradients/igr"])
    assert "updates/norm" not in rows[1]
    assert np.isfinite(rows[2]["gradients/norm"]) and "updates/norm" in rows[2]


class Diverging(Classifier):
    """Becomes NaN."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if self.global_step == 2 else 1)


def test_nan_is_logged_as_nan_and_the_run_goes_on(tmp_path: Path) -> None:
    rows = monitored(seeded(Diverging), tmp_path, overparam(2), everything())
    assert set(rows) == set(range(8))
    for name in ("weights/norm", "weights/effective_rank", "kernels/spread", "gradients/norm", "updates/norm", "loss/gap"):
        assert np.isfinite(rows[1][name]) and np.isnan(rows[5][name]), name


def test_each_optimizers_parameters_are_measured_at_its_own_step(tmp_path: Path) -> None:
    """One wrapped by Lightning, one raw; the critic's gradient in the file is that of its own loss."""

    class Watching(Manual):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.norms = getattr(self, "norms", [])
            own = torch.cat([p.grad.flatten() for p in self.critic.parameters()])  # of its loss, which came last
            self.norms.append(float(own.norm()))

    model = seeded(Watching)
    rows = monitored(model, tmp_path, everything(quantities=["gradients/norm", "updates/norm"], layers=["critic"]))
    assert set(rows) == set(range(8))
    for step, norm in enumerate(model.norms):
        weight_only = rows[step]["gradients/norm/critic"]
        assert 0 < weight_only <= norm * (1 + 1e-6)
        assert rows[step]["updates/norm/critic"] > 0
        assert rows[step]["gradients/norm"] > weight_only  # of all parameters of both


class Tensorial(Classifier):
    """Its learning rate is a tensor."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=torch.tensor(1e-2), foreach=False)


def test_a_rate_may_be_a_tensor(tmp_path: Path) -> None:
    class Numeric(Tensorial):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2, foreach=False)

    monitor = everything(quantities=["gradients/igr"])
    rows = [monitored(seeded(make, dropout=0.0), tmp_path, monitor) for make in (Tensorial, Numeric)]
    assert rows[0][0]["gradients/igr"] == pytest.approx(rows[1][0]["gradients/igr"], rel=1e-6)


def test_groups_have_their_own_rates(tmp_path: Path) -> None:
    class Grouped(Classifier):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[0].parameters()}, {"params": self.net[1:].parameters(), "lr": 0.5}]
            return torch.optim.SGD(groups, lr=0.1)

    (row, *_) = monitored(seeded(Grouped), tmp_path, everything(quantities=["gradients/*"])).values()
    for layer, rate in (("net.0", 0.1), ("net.4", 0.5)):
        assert row[f"gradients/igr/{layer}"] == pytest.approx(rate / 4 * row[f"gradients/norm/{layer}"] ** 2, rel=1e-6)


def test_layers_that_are_unfrozen_come_in(tmp_path: Path) -> None:
    class Thaw(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.net[4].requires_grad_(trainer.current_epoch > 0)

    model = seeded(Classifier)
    model.net[4].requires_grad_(False)
    rows = monitored(model, tmp_path, Thaw(), overparam(2), everything())
    assert "kernels/spread/net.4" not in rows[0] and "gradients/norm/net.4" not in rows[0]
    assert "kernels/spread/net.4" in rows[7] and "gradients/norm/net.4" in rows[7]


# ---------------------------------------------------------------------- resume


def test_a_resumed_run_logs_what_the_uninterrupted_one_would_have(tmp_path: Path) -> None:
    """A measurement right after an epoch of four steps: mixes that were drawn before, and when the last one was, count."""

    def run(ckpt: Any = None) -> Any:
        saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        monitor = DynamicsMonitor(["*"], every=4, slow=1)
        options = {"max_epochs": 3, "ckpt": ckpt}
        return monitored(seeded(Classifier, shuffle=False, dropout=0.0), tmp_path, overparam(3), monitor, saved, **options)

    whole = run()
    second = run(tmp_path / "epoch=0.ckpt")
    assert set(whole) == {0, 4, 8}
    assert second == {step: whole[step] for step in (4, 8)}


def test_its_state_is_plain_data_and_one_of_another_format_is_left_aside(tmp_path: Path) -> None:
    monitor = DynamicsMonitor(every=3)
    run = fit(seeded(Classifier), tmp_path, overparam(2), monitor, logger=Kept())
    (used,) = [callback for callback in run.callbacks if isinstance(callback, DynamicsMonitor)]
    file = tmp_path / "state.pt"
    torch.save(used.state_dict(), file)
    state = torch.load(file, weights_only=True)
    assert state["latest"] == 6
    assert set(state["draws"]) == {"net.0", "net.4"} and state["draws"]["net.0"][0] == 1
    monitor.load_state_dict(state)
    with pytest.warns(UserWarning, match="format 9"):
        monitor.load_state_dict({**state, "format": 9})


def test_two_monitors_in_one_run_have_names(tmp_path: Path) -> None:
    monitors = [DynamicsMonitor(["weights/norm"], every=1), DynamicsMonitor(["updates/norm"], every=4, name="slow")]
    rows = monitored(seeded(Classifier), tmp_path, *monitors, ModelCheckpoint(tmp_path))
    assert [step for step, row in rows.items() if "updates/norm" in row] == [0, 4]
    assert all("weights/norm" in row for row in rows.values())


def test_one_object_in_two_fits_begins_anew(tmp_path: Path) -> None:
    monitor, rows = DynamicsMonitor(["weights/norm", "kernels/entropy"], every=3), []
    for _ in range(2):
        logger = Kept()
        run = trainer(tmp_path, overparam(2, seed=0), monitor, logger=logger)
        torch.manual_seed(11)
        run.fit(seeded(Classifier))
        rows.append(logger.ours())
        assert not run.optimizers[0]._optimizer_step_post_hooks
    assert rows[0] == rows[1] and set(rows[0]) == {0, 3, 6}
    assert copy.deepcopy(monitor).rows == monitor.rows


def test_nothing_is_left_after_an_exception(tmp_path: Path) -> None:
    class Failing(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    monitor = everything(quantities=["weights/*", "updates/*", "gradients/*"])
    run = trainer(tmp_path, overparam(2), monitor, logger=Kept())
    with pytest.raises(RuntimeError, match="out of luck"):
        run.fit(seeded(Failing))
    assert not run.optimizers[0]._optimizer_step_post_hooks
    assert monitor._measurement is None and monitor._module is None


# ---------------------------------------------------------------------- several processes


class LeaveRows(Callback):
    """Writes down what each rank has logged, and its weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.batch = [tensor.clone() for tensor in batch]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        content = {"batch": self.batch, "rows": trainer.logger.ours(), "weights": pl_module.state_dict()}
        torch.save(content, self.folder / f"rank{trainer.global_rank}.pt")


def ranks(folder: Path, model: pl.LightningModule, *callbacks: Callback, **options: Any) -> list[dict[str, Any]]:
    folder.mkdir()
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    fit(model, folder, *callbacks, LeaveRows(folder), devices=2, strategy=strategy, logger=Kept(), max_epochs=1, **options)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


class Given(Classifier):
    """With the weights of :func:`make`, and one batch."""

    def __init__(self, batch: list[Tensor]) -> None:
        torch.manual_seed(7)
        super().__init__(shuffle=False, dropout=0.0)
        self.batch = batch

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([self.batch], batch_size=None)


def make() -> Classifier:
    return seeded(Classifier, shuffle=False, dropout=0.0)


def test_two_ranks(tmp_path: Path) -> None:
    plain, _ = ranks(tmp_path / "plain", make(), overparam(3, seed=5))
    one, two = ranks(tmp_path / "watched", make(), overparam(3, seed=5), everything())
    assert same_tensors(plain["weights"], one["weights"])
    assert two["rows"] == {} and set(one["rows"]) == {0, 1}
    halves = [monitored(Given(rank["batch"]), tmp_path, overparam(3, seed=5), everything())[0] for rank in (one, two)]
    for name in ("loss/mixed", "loss/collapsed", "loss/gap"):
        assert one["rows"][0][name] == pytest.approx((halves[0][name] + halves[1][name]) / 2, abs=1e-6)
    for name in ("weights/norm", "kernels/spread", "kernels/amplification"):
        assert one["rows"][0][name] == halves[0][name]


class FailsOnOneRank(Classifier):
    """Its step needs the Trainer on the second rank."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if torch.distributed.get_rank() == 1:
            assert self._trainer is not None
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:DynamicsMonitor")
def test_a_rank_that_fails_stops_nobody(tmp_path: Path) -> None:
    one, _ = ranks(tmp_path / "a", seeded(FailsOnOneRank, shuffle=False, dropout=0.0), overparam(3), everything())
    assert set(one["rows"]) == {0, 1} and "loss/gap" not in one["rows"][0] and "weights/norm" in one["rows"][1]


# ---------------------------------------------------------------------- networks that nobody here wrote


class Demo(pl.LightningModule):
    """Lightning's own transformer, with the training step of its demo."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer(vocab_size=33, ninp=16, nhead=2, nhid=24, nlayers=2, dropout=0.1)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:  # without a number
        tokens, target = batch
        return F.nll_loss(self.model(tokens, target), target.view(-1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        tokens = torch.randint(33, (8, 12), generator=torch.Generator().manual_seed(0))
        return DataLoader([(row[:-1], row[1:]) for row in tokens], batch_size=4)


class Gpt(Demo):
    """GPT-2 of transformers with random weights: Conv1D, tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=33, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        self.model = GPT2LMHeadModel(config)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.model(batch[0], labels=batch[1]).loss


@pytest.mark.parametrize("larger", [True, False], ids=["overparam", "plain"])
@pytest.mark.parametrize("make_model", [Demo, Gpt, BoringModel])
def test_networks_of_others(make_model: Any, larger: bool, tmp_path: Path) -> None:
    callbacks = [overparam(2)] if larger else []
    model = seeded(make_model)
    rows = monitored(model, tmp_path, *callbacks, everything(), max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    assert set(rows) == {0, 1}
    assert all(np.isfinite(value) for row in rows.values() for value in row.values())
    assert ("loss/gap" in rows[0]) == ("kernels/spread" in rows[0]) == larger
    if make_model is Gpt:
        weight = model.model.transformer.h[0].attn.c_attn.weight  # a Conv1D, its output units on axis 1
        values = np.linalg.svd(weight.detach().double().numpy(), compute_uv=False)
        again = monitored(model, tmp_path, everything(), max_epochs=1, limit_train_batches=1)[0]
        found = again["weights/stable_rank/model.transformer.h.0.attn.c_attn"]
        assert found == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-5)


def test_a_compiled_network_is_watched_under_its_own_names(tmp_path: Path) -> None:
    class Compiled(Classifier):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.net = torch.compile(self.net, backend="eager")

    rows = monitored(seeded(Compiled), tmp_path, overparam(2, seed=0), everything(), max_epochs=1)
    plain = monitored(seeded(Classifier, dropout=0.0), tmp_path, overparam(2, seed=0), everything(), max_epochs=1)
    assert rows[0].keys() == plain[0].keys()
    for name, value in plain[0].items():
        assert rows[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


# ---------------------------------------------------------------------- no waiting


def test_between_measurements_nothing_is_asked_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = DynamicsMonitor(["*"], every=100)
    seen: list[int] = []
    for hook in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"):
        own = getattr(DynamicsMonitor, hook)

        def guarded(self: Any, run: pl.Trainer, module: Any, *args: Any, _own: Any = own) -> None:
            if run.global_step < 1 or self._measurement is not None:
                return _own(self, run, module, *args)
            with WithoutValues():
                seen.append(run.global_step)
                return _own(self, run, module, *args)

        monkeypatch.setattr(DynamicsMonitor, hook, guarded)
    rows = monitored(seeded(Classifier), tmp_path, overparam(3), monitor)
    assert set(rows) == {0} and len(seen) >= 14


def test_a_measurement_asks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All numbers of a measurement come over together, whatever is measured; losses on copies come by themselves."""
    from lightning_sop.callbacks._monitor_measure import Fetched, Measurement

    fetches: list[int] = []
    own = Fetched.fetch

    def fetch(self: Fetched) -> None:
        fetches.append(len(self._tensors))
        own(self)

    monkeypatch.setattr(Fetched, "fetch", fetch)
    for name in ("start", "gradients", "stepped", "remembered"):
        method = getattr(Measurement, name)

        def guarded(self: Any, *args: Any, _own: Any = method) -> None:
            with WithoutValues():
                return _own(self, *args)

        monkeypatch.setattr(Measurement, name, guarded)
    monitored(seeded(Classifier), tmp_path, overparam(3), DynamicsMonitor(["*"], every=4, slow=1))
    assert len(fetches) == 2 and min(fetches) > 20


class WithoutValues(torch.utils._python_dispatch.TorchDispatchMode):
    """Asking a tensor for its value fails."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the device is waited for"
        return func(*args, **(kwargs or {}))


def test_strategies_that_shard_are_left_alone(tmp_path: Path) -> None:
    class FSDPStrategy(pl.strategies.SingleDeviceStrategy):
        pass

    with pytest.warns(UserWarning, match="DynamicsMonitor does not work with FSDPStrategy"):
        rows = monitored(
            seeded(Classifier), tmp_path, everything(), strategy=FSDPStrategy(torch.device("cpu")), accelerator="auto"
        )
    assert rows == {}


@pytest.mark.parametrize("kind", ["manual", "plain"])
def test_what_was_asked_for_and_is_not_there_is_said(kind: str, tmp_path: Path) -> None:
    callbacks = [overparam(2)] if kind == "manual" else []
    model = seeded(Manual if kind == "manual" else Classifier)
    with pytest.warns(UserWarning, match=r"there is no loss/gap in this run"):
        rows = monitored(model, tmp_path, *callbacks, DynamicsMonitor(["loss/gap", "weights/norm"]))
    assert set(rows[0]) == {"weights/norm", "weights/norm/net.0", "weights/norm/net.4"} | (
        {"weights/norm/critic"} if kind == "manual" else set()
    )


class NeedsTrainer(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert self.trainer.max_epochs
        return super().training_step(batch, batch_idx)


def test_a_step_that_needs_its_trainer_is_told_of_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"losses on copies .* are left out, because its training_step") as caught:
        rows = monitored(seeded(NeedsTrainer), tmp_path, overparam(2), everything())
    assert len([w for w in caught if "losses on copies" in str(w.message)]) == 1
    assert set(rows) == set(range(8)) and "loss/gap" not in rows[0] and "kernels/spread" in rows[7]


def test_a_failure_to_measure_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_sop.dynamics import quantity

    def fail(*_: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(quantity, "singular_values", fail)
    model = seeded(Classifier)
    with pytest.warns(UserWarning, match="measuring failed ._?LinAlgError: did not converge") as caught:
        rows = monitored(model, tmp_path, overparam(2), everything())
    assert rows == {} and len(model.losses) == 8
    assert len([w for w in caught if "DynamicsMonitor" in str(w.message)]) == 1


def test_large_matrices_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Large(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(10, 2100), nn.Linear(2100, 2100), nn.Linear(2100, 5))

    monitor = DynamicsMonitor(["weights/*"], media=False)
    rows = monitored(seeded(Large), tmp_path, monitor, limit_train_batches=1, max_epochs=1)
    assert "no spectra of net.1: their smaller side is above 2048" in caplog.text
    assert "weights/norm/net.1" in rows[0] and "weights/effective_rank/net.1" not in rows[0]
    assert "weights/effective_rank/net.0" in rows[0]
