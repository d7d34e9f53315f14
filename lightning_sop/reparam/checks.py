"""What an engine refuses: optimizers that cannot train φ, and states of other runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sop.reparam.form import TrainingForm
from lightning_sop.reparam.tied import TiedForm

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


def check_update(optimizer: Optimizer, form: TrainingForm, version: int, edited: bool, by_value: bool) -> None:
    """Refuse an optimizer that has updated a weight, or edited its gradient, while φ was in the place of it.

    Args:
        optimizer: whose step has just ended.
        form: of the weight.
        version: of the weight when φ took its place.
        edited: whether its gradient was edited since it was pulled back to φ.
        by_value: also look for writes through ``.data``, which have no version; on the CPU only, to wait for nothing.
    """
    weight, written = form.parameter, form._written
    changed = weight._version not in (version, form._written_version)
    if not changed and by_value and weight.device.type == "cpu" and written is not None:
        changed = not torch.allclose(weight, written, rtol=0, atol=0, equal_nan=True)
    if changed or edited:
        what = "has written into" if changed else "has edited the gradient of"
        raise RuntimeError(
            f"{type(optimizer).__name__}.step() {what} '{form.site.name}' itself, and not of what is in its param_groups at "
            "that moment, through which that weight is trained. If it keeps parameters or layers of its own, use another "
            f"optimizer or exclude '{form.site.name}'; edit gradients before step(), and weights after it."
        )


def check_name(owner: nn.Module, name: str, child: TrainingForm | TiedForm) -> None:
    """Refuse a layer that has something else under the name that its training form is to have."""
    there = owner._modules.get(name)
    taken = hasattr(type(owner), name) or any(name in part for part in (owner.__dict__, owner._parameters, owner._buffers))
    if taken or not (there is None or isinstance(there, (TrainingForm, TiedForm))):
        weight = child.form.site.name if isinstance(child, TiedForm) else child.site.name
        raise ValueError(
            f"the layer of '{weight}', a {type(owner).__name__}, has something called '{name}' already, which is what the "
            f"training form of its weight is called. Rename that, or exclude '{weight}'."
        )


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
