"""What an engine refuses: optimizers that cannot train φ, and states of other runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_sop.reparam.form import TrainingForm

#: Version of the plain data that an engine saves.
FORMAT = 1


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse optimizers through which φ cannot be updated."""
    name = type(optimizer).__name__
    if not getattr(type(optimizer).step, "hooked", False):
        raise TypeError(
            f"{name}.step does not run torch's optimizer step hooks, through which weights in training form are updated. "
            "Its class must call torch.optim.Optimizer.__init__."
        )
    if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__):
        raise TypeError(f"{name} shards parameters over the ranks, and φ cannot follow. Use the optimizer that it wraps.")


def check_state(state: Mapping[str, Any], forms: Mapping[str, TrainingForm]) -> None:
    """Refuse a state that was not saved by a run like this one."""
    if state.get("format") != FORMAT:
        raise ValueError(
            f"The checkpoint's SimulatedOverparam state has format {state.get('format')!r}; this version reads {FORMAT}. "
            "Resume with the version of lightning_sop that wrote it, or start from its weights alone."
        )
    for name, saved in state["forms"].items():
        if name not in forms:
            raise ValueError(
                f"The checkpoint trains '{name}' in a larger form, which this run does not convert. Resume with the same "
                "model, include, exclude, layers and rules, or start a new run from the checkpoint's weights."
            )
        form = forms[name]
        ours = (type(form.method).__name__, form.method.settings, list(form.site.shape))
        theirs = (saved["method"], saved["settings"], list(saved["shape"]))
        if ours != theirs:
            raise ValueError(
                f"The checkpoint trains '{name}' as {theirs[0]} {theirs[1]} of shape {theirs[2]}, this run as {ours[0]} "
                f"{ours[1]} of shape {ours[2]}. Resume with the checkpoint's settings, or start a new run from its weights."
            )
