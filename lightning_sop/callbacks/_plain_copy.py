"""A copy of a LightningModule as it will be deployed: plain layers, nothing compiled, no Trainer."""

from __future__ import annotations

import contextlib
import copy
import types
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.compile import to_uncompiled
from torch import nn

from lightning_sop.deploy.content import DeployContent
from lightning_sop.deploy.errors import CollapseError
from lightning_sop.reparam.form import TrainingForm
from lightning_sop.reparam.tied import TiedForm

_FORMS = (TrainingForm, TiedForm)


class _Gone(nn.Module):
    """Stands in a copy for what is not copied."""


def plain_copy(module: pl.LightningModule) -> pl.LightningModule:
    """Deep copy without training forms and compiled wrappers; whatever they hold is never copied.

    Raises:
        Exception: Something that the module holds cannot be copied.
    """
    memo: dict[int, Any] = {}
    context = module._compiler_ctx
    if context is not None:
        memo[id(context["dynamo_ctx"])] = None
    twin = _bare_copy(module, memo)
    assert isinstance(twin, pl.LightningModule)
    if twin._compiler_ctx is not None:
        to_uncompiled(twin)
    _unwatch(twin)
    return twin


def without_forms(value: Any, above: tuple[int, ...] = ()) -> Any:
    """A value with the modules in it that hold training forms as copies that do not; the value itself, if there are none.

    Args:
        value: dicts and lists of anything are looked into.
        above: identities of those that it is in, which it may hold itself.
    """
    if isinstance(value, nn.Module) and any(isinstance(part, _FORMS) for part in value.modules()):
        with contextlib.suppress(Exception):  # what cannot be copied is saved as it is
            return _bare_copy(value, {})
    if not isinstance(value, (dict, list)) or id(value) in above:
        return value
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    bare = [(key, without_forms(item, (*above, id(value)))) for key, item in items]
    if all(new is old for (_, new), (_, old) in zip(bare, items, strict=True)):
        return value
    result = copy.copy(value)
    for key, item in bare:
        result[key] = item
    return result


def _bare_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    compiled = []
    for child in module.modules():
        if isinstance(child, _FORMS):
            memo[id(child)] = _Gone()
        elif isinstance(getattr(child, "_orig_mod", None), nn.Module):  # what torch.compile returns
            compiled.append(child)
    for wrapper in reversed(compiled):  # inner wrappers before the outer ones
        memo[id(wrapper)] = copy.deepcopy(wrapper._orig_mod, memo)
    twin = copy.deepcopy(module, memo)
    _rebind(twin, memo)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _Gone):
                delattr(parent, name)
    return twin


def _rebind(twin: nn.Module, memo: dict[int, Any]) -> None:
    """Give hooks and attributes that are lambdas or local functions the copies of what they know of the original.

    A deep copy has the very same functions.
    """
    for part in twin.modules():
        for holder in (part.__dict__, *(value for value in part.__dict__.values() if isinstance(value, dict))):
            for name, value in list(holder.items()):
                if isinstance(value, types.FunctionType):
                    holder[name] = _with_copies(value, memo, ())


def _with_copies(function: types.FunctionType, memo: dict[int, Any], above: tuple[int, ...]) -> types.FunctionType:
    """A function with copies in its closure; itself, if there are none of what that holds."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            known = cell.cell_contents
        except ValueError:  # not assigned yet
            known = None
        found = memo.get(id(known), known)
        if isinstance(known, types.FunctionType) and id(known) not in above:
            found = _with_copies(known, memo, (*above, id(function)))
        cells.append(cell if found is known else types.CellType(found))
    if all(new is old for new, old in zip(cells, function.__closure__ or (), strict=True)):
        return function
    rebound = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    rebound.__kwdefaults__ = function.__kwdefaults__
    rebound.__dict__.update(function.__dict__)
    return rebound


def _unwatch(twin: nn.Module) -> None:
    """W&B's ``watch()`` logs in hooks of the forward: what a copy does is not the run's."""
    for part in twin.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for number, hook in list(hooks.items()):
                if str(getattr(hook, "__module__", "")).partition(".")[0] == "wandb":
                    del hooks[number]


def load_as_lightning_does(module: nn.Module, content: DeployContent) -> None:
    """Load a deploy file's content into a module the way ``load_from_checkpoint`` does.

    Raises:
        CollapseError: The module's ``on_load_checkpoint()`` fails with it.
    """
    assert isinstance(module, pl.LightningModule)
    checkpoint = content.as_checkpoint()
    try:
        module.on_load_checkpoint(checkpoint)
    except Exception as error:  # the user's own code
        omitted = f" It left out {', '.join(map(repr, content.omitted))}, which is no plain data." if content.omitted else ""
        raise CollapseError(
            "The deploy file cannot be loaded into the plain model: on_load_checkpoint() fails with it "
            f"({type(error).__name__}: {error}). It has weights, hyper-parameters and what on_save_checkpoint() adds "
            f"(tensors, numbers, strings, lists and dicts), and nothing else of the training.{omitted} Let "
            "on_load_checkpoint() do without what is missing."
        ) from error
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
