"""Model, data and Trainer of a run, from its configuration."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningCLI
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.quality.baselines.steps import distill, penalize, use_sgd
from benchmarks.quality.baselines.wide import widen
from benchmarks.quality.config import StudyError
from benchmarks.quality.keys import Config
from benchmarks.quality.place import PATHS, Place
from benchmarks.quality.plan import KEEP, Run

QUIET: Config = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "devices": 1,
}
CHANGES: Mapping[str, Callable[..., None]] = {
    "widen": widen,
    "distill": distill,
    "penalize": penalize,
    "sgd": use_sgd,
}
"""What a configuration's ``changes`` may do to the module that LightningCLI has built."""


class BuildCLI(LightningCLI):
    """LightningCLI that builds model, data and Trainer of a mapping and runs nothing.

    Raises:
        StudyError: the mapping names something that is not there.
    """

    def __init__(self, config: Config) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the words of the command line are not for this parser
            try:
                super().__init__(
                    args=config,
                    run=False,
                    save_config_callback=None,
                    seed_everything_default=False,
                    parser_kwargs={"exit_on_error": False},
                )
            except ArgumentError as error:
                raise StudyError(f"a configuration that LightningCLI refuses: {error}") from error


def build(config: Config, place: Place, seed: int) -> BuildCLI:
    """Model, data and Trainer of a configuration."""
    gc.collect()  # those before hold each other, and data sets: a worker that is never idle would keep dozens
    config = copy.deepcopy(config)
    for name in ("derive", KEEP):
        config.pop(name, None)
    changes = config.pop("changes", [])
    arguments = config["data"].get("init_args", {})
    for name in PATHS:
        if name in arguments:
            arguments[name] = str(Path(place.data or "", arguments[name]))
    config["trainer"] = {**config.get("trainer", {}), **QUIET, "accelerator": place.accelerator}
    config["seed_everything"] = seed
    cli = BuildCLI(config)
    for change in changes:
        for name, settings in change.items():
            CHANGES[name](cli.model, **settings)
    return cli


def bare(run: Run, place: Place) -> BuildCLI:
    """The network that is deployed, with a Trainer for nothing but evaluation."""
    return build({**run.config, "trainer": {}}, place, run.seed)


def network_of(run: Run, place: Place) -> Any:
    """The trained network of a run, in evaluation mode."""
    module = bare(run, place).model
    module.load_state_dict(state_of(run, place))
    return module.eval()


def state_of(run: Run, place: Place) -> dict[str, Tensor]:
    """The kept weights of a run.

    Raises:
        StudyError: their file is damaged.
    """
    path = place.network(run.key)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise StudyError(f"{path} is damaged ({error}); remove it, and the network is trained again") from error
