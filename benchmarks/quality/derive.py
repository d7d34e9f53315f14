"""What is made of trained networks: averages and ensembles of them, and starting points."""

from __future__ import annotations

import itertools
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.quality.baselines.averaging import MeanProbability, mean_state
from benchmarks.quality.baselines.wide import reduce
from benchmarks.quality.build import BuildCLI, bare, network_of, state_of
from benchmarks.quality.place import Place
from benchmarks.quality.plan import FINAL, Run
from lightning_sop.dynamics.flops import flop_counter

REDUCTION_BATCHES = 16
"""Of the training set, on which units are compared and refitted."""


class Spent:
    """FLOPs and seconds of what is done within: neither evaluation nor the building of networks."""

    def __init__(self) -> None:
        self.flops, self.seconds = 0, 0.0
        self._counter = flop_counter()

    def __enter__(self) -> Spent:
        self._began = time.perf_counter()
        self._counter.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._counter.__exit__(*error)  # type: ignore[no-untyped-call]
        self.flops, self.seconds = self._counter.get_total_flops(), time.perf_counter() - self._began


def untrained(run: Run, place: Place) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Average or ensemble of a run's teachers.

    Returns:
        Metrics, the state if it is one network's, and costs.
    """
    cli = bare(run, place)
    module, data = cli.model, cli.datamodule
    parameters = sum(parameter.numel() for parameter in module.parameters())
    trained = len(run.teachers) * parameters
    state: dict[str, Tensor] = {}
    spent = Spent()
    if run.config["derive"] == "average":
        with spent:
            module.load_state_dict(mean_state([state_of(teacher, place) for teacher in run.teachers]))
            if any(isinstance(part, _BatchNorm) for part in module.modules()):
                module.to(cli.trainer.strategy.root_device)
                torch.optim.swa_utils.update_bn(training_inputs(data, run, cli.trainer), module)
        state = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
        deployed = parameters
    else:
        module.net = MeanProbability([network_of(teacher, place).net for teacher in run.teachers])
        deployed = trained
    metrics = evaluate(cli.trainer.validate, module, data)
    if run.phase == FINAL:
        metrics.update(evaluate(cli.trainer.test, module, data))
    costs = {"flops": spent.flops, "seconds": spent.seconds, "parameters": {"deployed": deployed, "training": trained}}
    return {**metrics, "epochs": 0}, state, costs


def evaluate(what: Any, module: pl.LightningModule, data: pl.LightningDataModule) -> dict[str, float]:
    """Metrics of a Trainer's method."""
    return {name: float(value) for name, value in what(module, data, verbose=False)[0].items()}


def training_inputs(data: pl.LightningDataModule, run: Run, trainer: pl.Trainer) -> Any:
    """Inputs of the training set's batches, as a Trainer hands them over, in the order of the run's seed."""
    pl.seed_everything(run.seed, verbose=False)
    data.prepare_data()
    data.setup("fit")
    device = trainer.strategy.root_device

    def ready(batch: Any) -> Any:
        batch = data.transfer_batch_to_device(data.on_before_batch_transfer(batch, 0), device, 0)
        return data.on_after_batch_transfer(batch, 0)

    return (ready(batch)[0] for batch in data.train_dataloader())


def begin(run: Run, place: Place, cli: BuildCLI) -> tuple[dict[str, float] | None, Spent]:
    """Put the weights in place with which a run begins, if those are not its seed's, and its teachers beside it.

    Returns:
        Metrics of validation, where these weights may be kept, and what they cost.
    """
    spent = Spent()
    module, device = cli.model, cli.trainer.strategy.root_device
    if run.config.get("derive") == "reduce":
        other, (teacher,) = bare(run, place), run.teachers
        inputs = itertools.islice(training_inputs(other.datamodule, run, other.trainer), REDUCTION_BATCHES)
        wide = network_of(teacher, place).to(device)
        with spent:
            state = reduce(wide, module.to(device), inputs)
        for network in (module, other.model):
            network.load_state_dict(state)
        return evaluate(other.trainer.validate, other.model, other.datamodule), spent
    if run.start is not None:
        transfer(state_of(run.start, place), module)
    if run.teachers:
        module.teachers = [network_of(teacher, place).to(device) for teacher in run.teachers]
    return None, spent


def transfer(state: dict[str, Tensor], module: torch.nn.Module) -> None:
    """Load what fits, but never the head: its classes are others."""
    own = module.state_dict()
    fitting = {
        name: tensor
        for name, tensor in state.items()
        if ".head." not in f".{name}" and name in own and own[name].shape == tensor.shape
    }
    module.load_state_dict({**own, **fitting})
