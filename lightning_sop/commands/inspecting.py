"""``lightning-sop inspect``: what the callbacks of a configuration would do, without training."""

from __future__ import annotations

import inspect as signatures
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch import nn

from lightning_sop.callbacks import DeepFusionGrow, SimulatedOverparam
from lightning_sop.callbacks._growing import SELF, networks_of
from lightning_sop.callbacks._growing_run import calls_of_step, refuse_unsupported
from lightning_sop.callbacks._growing_step import check_ahead
from lightning_sop.callbacks._plain_copy import plain_copy
from lightning_sop.callbacks._step_loss import choice_options
from lightning_sop.commands.building import PROGRAM, DryCLI, UsageError, build_late_layers, console, first_batch, told
from lightning_sop.deploy.replay import Call
from lightning_sop.growth import fuse
from lightning_sop.growth.fuse import default_weights
from lightning_sop.growth.layout import Layout, find_layout


def inspect(words: list[str]) -> None:
    """Print what each callback of this package would do with every parameter; train nothing.

    Args:
        words: options as for ``fit``.

    Raises:
        UsageError: the configuration has no SimulatedOverparam and no DeepFusionGrow.
        FusionError: the networks that are to be fused do not fit.
    """
    cli = DryCLI(
        run=False,
        args=words,
        save_config_callback=None,
        parser_kwargs={
            "exit_on_error": False,
            "prog": f"{PROGRAM} inspect",
            "description": "Show, without training, what becomes of every parameter: for SimulatedOverparam counts before "
            "and after, and the reason for each one left alone; for DeepFusionGrow the plan of the fusion, found with the "
            "first training batch. Takes the options and configurations of 'fit'. For layers that a module builds in its "
            "setup(), that of the data module is called first; prepare_data() never is. Where one of them cannot run "
            "without training, a line says so, and what exists is shown.",
        },
    )
    configured = cli.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, which mypy cannot see
    forms = [callback for callback in configured if isinstance(callback, SimulatedOverparam)]
    events = [callback for callback in configured if isinstance(callback, DeepFusionGrow)]
    if not forms and not events:
        raise UsageError(
            "no lightning_sop.SimulatedOverparam among trainer.callbacks, and no DeepFusionGrow: nothing to inspect"
        )
    for text in build_late_layers(cli, data=bool(events)):
        note(text)
    out = console()
    for callback in forms:
        out.print(callback.plan(cli.model))
    if events:
        show_growth(cli, events, out)


def show_growth(cli: DryCLI, events: Sequence[DeepFusionGrow], out: Console) -> None:
    """Print the plan of each growth event, the later ones starting from what the earlier ones make.

    Args:
        cli: what was built from the configuration.
        events: in their order.
        out: where to.
    """
    try:
        refuse_unsupported(cli.trainer)
    except MisconfigurationException as error:
        note(f"'fit' will refuse this: {error}")
    batch = None
    try:
        batch = first_batch(cli)
    except Exception as error:  # user code, perhaps in want of prepared data
        note(f"no training batch to probe with, the plan follows from shapes and types alone: {told(error)}")
    here = plain_copy(cli.model)
    for event in events:
        calls = [] if batch is None else calls_of_step(None, here, batch, 0)
        if batch is not None and not calls:
            note(
                f"{type(here).__name__}.training_step() cannot run without its Trainer, the plan follows from shapes and "
                "types alone; the run itself listens to a step"
            )
        here = show_event(event, here, cli.trainer, calls, out, batch)


def show_event(
    event: DeepFusionGrow, here: LightningModule, trainer: Trainer, calls: Sequence[Call], out: Console, batch: Any
) -> LightningModule:
    """Print the plan of one growth event; returns a network of the shape that it grows to."""
    names = list(dict.fromkeys(event.donors))
    grown = check_ahead(event, here, trainer)
    networks = networks_of(event.loaded, here)
    donors = [networks[name] for name in event.donors]
    choice = {} if batch is None else choice_options(event, None, here, batch, 0)
    layout, function = plan(event, donors, grown, calls, choice)
    before = ", ".join(f"{values(networks[name]):,} ({name})" for name in names)
    shares = ", ".join(f"{weight:.3g} x {name}" for name, weight in zip(event.donors, layout.weights, strict=True))
    between = f"noise of {event.off_diagonal:g} of their weights" if event.off_diagonal else "zeros"
    into = {event.target: event.grown} if event.target else event.grown
    lines = {
        "when": described(event.schedule),
        "donors": f"{shares}; {len(donors)} of {len(names)} networks",
        "grown": ", ".join(f"{name}={value}" for name, value in into.items()),
        "parameters": f"{before} -> {values(grown):,}",
        "between donors": between,
        "learning rate": str(event.learning_rate),
        "function": function,
    }
    out.print("[bold]DeepFusionGrow[/bold]")
    for title, text in lines.items():
        out.print(f"  {title}: {text}", markup=False, highlight=False)
    out.print(layout.table())
    return grown


def plan(
    event: DeepFusionGrow,
    donors: Sequence[nn.Module],
    grown: nn.Module,
    calls: Sequence[Call],
    choice: Mapping[str, Any],
) -> tuple[Layout, str]:
    """The layout of an event's fusion, and what becomes of the function, measured on the networks as they are now."""
    if not calls:
        sources = [event.donors.index(name) for name in event.donors]
        weights = event.weights or default_weights(sources)
        return find_layout(donors, grown, [], weights, chunks=event.chunks, widen=event.widen), "not measured"
    fusion = fuse(donors, grown, list(calls), **event.options, **choice)
    now = ", with 'self' as it is now" if SELF in event.donors else ""
    return fusion.layout, f"{fusion.proof}{now}"


def described(schedule: Any) -> str:
    """A schedule as it would be written in Python."""
    names = signatures.signature(type(schedule).__init__).parameters
    settings = [f"{name}={getattr(schedule, name)!r}" for name in names if hasattr(schedule, name)]
    return f"{type(schedule).__name__}({', '.join(settings)})"


def values(network: nn.Module) -> int:
    """How many numbers the parameters have."""
    return sum(math.prod(parameter.shape) for parameter in network.parameters())


def note(text: str) -> None:
    """A line on standard error."""
    print(f"{PROGRAM}: note: {' '.join(text.split())}", file=sys.stderr)
