"""A run built from its configuration without training: module, data, first batch."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any, NoReturn

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console

PROGRAM = "lightning-sop"
WIDTH_OF_FILES = 160
"""Columns of a table that goes to a file or a pipe, where rich would assume 80."""

FUSION = "lightning_sop_fusion"
"""Entry of a checkpoint written by ``fuse`` that says how it was made."""


class UsageError(ValueError):
    """The command cannot do what was asked; the message says why and what to do."""


class Words(ArgumentParser):
    """A parser whose every complaint is an error of one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class DryCLI(LightningCLI):
    """Builds model, data and Trainer from a configuration of ``fit``, and runs nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # a configuration that `fit --print_config` wrote also holds the arguments of Trainer.fit
        parser.add_method_arguments(Trainer, "fit", skip={"model", "train_dataloaders", "val_dataloaders", "datamodule"})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Lightning's own would warn that words are given where the process has some too: they are the same, less a few
        self.config = parser.parse_args(args)  # type: ignore[arg-type]  # commands give words, never a dict

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return super().instantiate_trainer(logger=False, **kwargs)  # a dry run leaves no log


class LonelyCLI(DryCLI):
    """Its Trainer is one of this process and the CPU, without callbacks, whatever the run is to have."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        alone = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "sync_batchnorm": False}
        quiet = {"callbacks": [], "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        return super().instantiate_trainer(precision=None, plugins=None, **alone, **quiet, **kwargs)


def connect(cli: LightningCLI) -> None:
    """What hooks may read: self.trainer with its datamodule, module and stage; no process and no device is set up."""
    cli.trainer.state.fn, cli.trainer.training = TrainerFn.FITTING, True
    cli.trainer.strategy.connect(cli.model)
    cli.trainer._data_connector.attach_data(cli.model, datamodule=cli.datamodule)


def build_late_layers(cli: LightningCLI, *, data: bool = False) -> list[str]:
    """Run the hooks in which a module may build layers, as ``Trainer._run`` does, but prepare, download and train nothing.

    The data module's ``setup`` comes first, as in a run, and only where somebody reads its results.

    Args:
        cli: what was built from the configuration.
        data: whether the data are asked for also where the module has no ``setup`` to read them.

    Returns:
        What could not be run, one note for each.

    Raises:
        Exception: an error in ``configure_model`` that no failed ``setup`` explains.
    """
    model, notes, lacking = cli.model, [], "layers that need it are not shown"
    connect(cli)
    own = is_overridden("setup", model)
    owners = ([cli.datamodule] if own or data else []) + ([model] if own else [])
    for owner in owners:
        if owner is None:
            continue
        try:
            owner.setup(stage=TrainerFn.FITTING)
        except Exception as error:  # user code, perhaps in want of prepared data, of processes or of a device
            notes.append(f"{type(owner).__name__}.setup() cannot run without training, {lacking}: {told(error)}")
    try:
        model.configure_model()
    except Exception as error:
        if not notes:
            raise
        notes.append(f"{type(model).__name__}.configure_model() could not run after that: {told(error)}")
    return notes


def first_batch(cli: LightningCLI) -> Any:
    """The first training batch, as the batch hooks of module and data leave it; the data must be set up.

    Raises:
        UsageError: there are no training data.
    """
    owner = cli.datamodule if cli.datamodule is not None else cli.model
    if not is_overridden("train_dataloader", owner):
        raise UsageError(f"{type(owner).__name__} has no train_dataloader() to take a batch from: add a data section")
    loader = CombinedLoader(owner.train_dataloader(), "max_size_cycle")
    first = next(iter(loader), None)
    if first is None:
        raise UsageError(f"{type(owner).__name__}.train_dataloader() gives no batch")
    return cli.model._apply_batch_transfer_handler(first[0], device=torch.device("cpu"), dataloader_idx=0)


def told(error: Exception) -> str:
    """An error's type and message."""
    return f"{type(error).__name__}: {error}"


def console() -> Console:
    """For tables, on standard output."""
    out = Console()
    return out if out.is_terminal else Console(width=WIDTH_OF_FILES)
