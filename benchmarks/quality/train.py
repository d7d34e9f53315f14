"""Perform one run: train with early stopping, and test once if it is a final run."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import time
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_sop
from benchmarks.quality.baselines.overcomplete import collapsed_state
from benchmarks.quality.build import bare, build
from benchmarks.quality.config import DiskError, StudyError
from benchmarks.quality.costs import COSTS, spent, total
from benchmarks.quality.derive import begin, evaluate, untrained
from benchmarks.quality.place import Place
from benchmarks.quality.plan import FINAL, KEEP, LAST, PROTOCOL, TUNE, UNTRAINED, Run
from lightning_sop import TrainingCost


class DivergedError(Exception):
    """The validation loss is not finite."""


class Best(Callback):
    """Keeps the weights that were validated, of the epoch with the lowest validation loss.

    It stands before callbacks that put averages in place for the validation only.

    Args:
        last: keep the last epoch instead.

    Attributes:
        curve: metrics of each epoch.
        epoch: the kept one, from 1; 0 for the weights that the run began with.
        metrics: of that epoch.
        state: its weights.
    """

    def __init__(self, last: bool = False) -> None:
        self.last = last
        self.curve: list[dict[str, float]] = []
        self.epoch = 0
        self.metrics: dict[str, float] = {}
        self.state: dict[str, Tensor] = {}
        self._validated: dict[str, Tensor] = {}

    def first(self, metrics: dict[str, float] | None, module: pl.LightningModule) -> None:
        """Weights that may be kept before any training."""
        if metrics is not None and math.isfinite(metrics["val_loss"]):
            self.metrics, self.state = metrics, collapsed_state(module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = collapsed_state(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        if "val_loss" not in metrics:
            logged = ", ".join(trainer.callback_metrics) or "nothing"
            raise StudyError(f"{type(pl_module).__name__} logs no val_loss in validation_step; it logs {logged}")
        if not math.isfinite(metrics["val_loss"]):
            raise DivergedError(f"val_loss is {metrics['val_loss']} after epoch {len(self.curve) + 1}")
        self.curve.append(metrics)
        if self.last or not self.metrics or metrics["val_loss"] < self.metrics["val_loss"]:
            self.epoch, self.metrics, self.state = len(self.curve), metrics, self._validated


def perform(run: Run, place: Place, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Perform a run.

    Args:
        run: what to do.
        place: where.
        given: results of the runs that it needs, by key.

    Returns:
        The line of results.
    """
    began = time.perf_counter()
    needs = {need.key: (given or {})[need.key] for need in run.needs}
    failed = [key for key, result in needs.items() if result["status"] != "done"]
    result: dict[str, Any] = {"status": "failed", "reason": f"it needs {', '.join(failed)}, which diverged"}
    metrics: dict[str, Any] = {"epochs": 0}
    costs: dict[str, Any] = dict.fromkeys(("steps", "seconds", "flops", "cpu_seconds"), 0)
    if not failed:
        result, metrics, costs = (_derived if run.config.get("derive") in UNTRAINED else _trained)(run, place)
    costs["wall_seconds"] = time.perf_counter() - began
    if run.teachers:
        costs["teachers"] = {
            name: total([spent(needs[teacher.key], name) for teacher in run.teachers]) for name in COSTS if name in costs
        }
    what = {name: getattr(run, name) for name in ("key", "task", "method", "phase", "setting", "seed", "split")}
    if run.put:
        what["put"] = run.put
    if run.order is not None:
        what["order"] = run.order
    if run.teachers:
        what["teachers"] = [teacher.key for teacher in run.teachers]
    if run.start is not None:
        what["start"] = run.start.key
    line = {**what, **result, "metrics": metrics, "cost": costs, "environment": environment(place, run.task)}
    return {name: finite(value) for name, value in line.items()}


Outcome = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""Status with its reason, metrics and costs."""


def _trained(run: Run, place: Place) -> Outcome:
    cli = build(run.config, place, run.seed)
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    best, cost = Best(last=run.config.get(KEEP) == LAST), TrainingCost(verbose=False)
    used = time.process_time()
    first, prepared = begin(run, place, cli)
    best.first(first, module)
    # hooks of the first run first: Best before averages are taken away, the cost's clock last
    trainer.callbacks = [best, *trainer.callbacks, cost]  # type: ignore[attr-defined]
    parameters = {"deployed": elements(module), "training": trained_elements(module, trainer)}
    result: dict[str, Any] = {"status": "done", "reason": None}
    try:
        fit(trainer, module, data, run.seed if run.order is None else run.order)
    except DivergedError as reason:
        result.update(status="failed", reason=str(reason))
    if result["status"] == "done" and not best.metrics:
        raise StudyError("the network was never validated: check_val_every_n_epoch is more than the epochs")
    used = time.process_time() - used
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        parameters["training"] += int(getattr(callback, "extra_parameters", 0))
    metrics = summary(best)
    if result["status"] == "done" and run.phase != TUNE:
        keep(run, place, best.state)  # before the test is read, in case that it cannot be written
    if result["status"] == "done" and run.phase == FINAL:
        metrics.update(test(run, place, best.state))
    costs = {
        "steps": cost.ledger.training().steps,
        "seconds": cost.seconds + prepared.seconds,
        "flops": cost.flops + prepared.flops,
        "cpu_seconds": used,
        "parameters": parameters,
    }
    return result, metrics, costs


def _derived(run: Run, place: Place) -> Outcome:
    used = time.process_time()
    metrics, state, costs = untrained(run, place)
    result: dict[str, Any] = {"status": "done", "reason": None}
    if not math.isfinite(metrics["val_loss"]):
        result = {"status": "failed", "reason": f"val_loss is {metrics['val_loss']}"}
    elif state:
        keep(run, place, state)
    return result, metrics, {"steps": 0, **costs, "cpu_seconds": time.process_time() - used}


def fit(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, seed: int) -> None:
    """Train, with an order of the data that depends on the seed alone: dropout and noise draw from other generators."""
    pl.seed_everything(seed, verbose=False)
    order, loaders_of = torch.Generator().manual_seed(seed), data.train_dataloader

    def train_dataloader() -> Any:
        loaders = loaders_of()
        for loader in CombinedLoader(loaders).flattened:
            if isinstance(loader, DataLoader):
                loader.generator = order
                if hasattr(loader.sampler, "generator"):
                    loader.sampler.generator = order
        return loaders

    data.train_dataloader = train_dataloader  # type: ignore[method-assign]
    trainer.fit(module, datamodule=data)


def test(run: Run, place: Place, state: dict[str, Tensor]) -> dict[str, float]:
    """The metrics of the test, read for trained networks here and nowhere else, of a plain network with the kept weights."""
    cli = bare(run, place)
    cli.model.load_state_dict(state)
    return evaluate(cli.trainer.test, cli.model, cli.datamodule)


def keep(run: Run, place: Place, state: dict[str, Tensor]) -> None:
    """Save the network, whole or not at all.

    Raises:
        DiskError: it cannot be written.
    """
    path = place.network(run.key)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # tied weights are several names of one tensor, which this format refuses
        save_file({name: tensor.cpu().clone().contiguous() for name, tensor in state.items()}, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{path} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def summary(best: Best) -> dict[str, Any]:
    """What the validation said: metrics of the kept epoch ("best_epoch", or the last), of the last one, and all of them."""
    if not best.curve:
        return {"epochs": 0}
    return {
        **best.metrics,
        "best_epoch": best.epoch,
        "epochs": len(best.curve),
        "last": best.curve[-1],
        "curve": {name: [float(f"{row[name]:.5g}") for row in best.curve] for name in best.curve[0]},
    }


def elements(module: torch.nn.Module) -> int:
    """Parameters of a network."""
    return sum(parameter.numel() for parameter in module.parameters())


def trained_elements(module: pl.LightningModule, trainer: pl.Trainer) -> int:
    """Parameters that are trained: the network's, with what stands in for them."""
    total = elements(module)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, lightning_sop.SimulatedOverparam):
            rows = [row for row in callback.plan(module).rows if row.method is not None]
            total += sum(row.method.expanded_numel(row.site) - math.prod(row.site.shape) for row in rows if row.method)
    return total


def environment(place: Place, task: str) -> dict[str, Any]:
    """What the numbers may depend on."""
    cuda = place.accelerator != "cpu" and torch.cuda.is_available()
    return {
        **({"data": place.digests[task]} if task in place.digests else {}),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "commit": place.commit,
        "protocol": PROTOCOL,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def finite(value: Any) -> Any:
    """JSON has no NaN: such numbers become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list) else value


def quiet() -> None:
    """Nothing of a worker's runs is for readers but their results, and each has one core."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
