"""Training forms in a plain torch loop, without Lightning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sop.reparam.base import Method, Site
from lightning_sop.reparam.engine import Engine
from lightning_sop.reparam.form import TrainingForm
from lightning_sop.reparam.live import live_engines
from lightning_sop.reparam.majority import MajorityKernels
from lightning_sop.reparam.methods import METHODS
from lightning_sop.reparam.names import owner_key
from lightning_sop.reparam.select import Rule, make_plan
from lightning_sop.reparam.tied import TiedForm


def expand_(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    method: Method | None = None,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    layers: Sequence[str] | None = None,
    rules: Sequence[Rule] | None = None,
    seed: int | None = None,
) -> Engine:
    """Train a model in a larger form, in place: afterwards every ``optimizer.step()`` updates the larger tensors.

    ``model.eval()`` and ``state_dict()`` give the collapsed weights, ``model.train()`` the mixed ones. End with
    :func:`collapse_`. For a method that anneals, set the returned engine's ``progress`` (0 to 1) as training goes on.

    Args:
        model: any module; its parameters, its state_dict and their names stay as they are.
        optimizer: the optimizer(s) that hold the model's parameters; they stay as they are, too.
        method: how to train each weight; default ``MajorityKernels()``.
        include: patterns of names to convert, see :class:`~lightning_sop.reparam.select.Rule`; default all.
        exclude: patterns of names to leave plain.
        layers: layer types to convert; default :data:`~lightning_sop.reparam.select.DEFAULT_LAYERS`.
        rules: several methods for several parts of the model, instead of the four arguments before.
        seed: of the mixes and of the initial differences; default torch's initial seed. No global random state is used.

    Returns:
        The engine, which knows the plan (``engine.plan``) and can be saved (``engine.state_dict()``).
    """
    engine = Engine(model, make_plan(model, resolve_rules(method, include, exclude, layers, rules)), resolve_seed(seed))
    engine.attach()
    engine.start([optimizer] if isinstance(optimizer, Optimizer) else optimizer)
    if model.training:
        engine.mix_in()
    return engine


def resolve_rules(
    method: Method | None,
    include: Sequence[str] | None,
    exclude: Sequence[str],
    layers: Sequence[str] | None,
    rules: Sequence[Rule] | None,
) -> list[Rule]:
    """The rules that a user's arguments stand for."""
    if rules is None:
        return [Rule(method if method is not None else MajorityKernels(), include, exclude, layers)]
    if method is not None or include is not None or exclude or layers is not None:
        raise ValueError("give either rules, or method with include, exclude and layers, not both")
    if not rules:
        raise ValueError("rules is empty: give at least one Rule")
    return list(rules)


def resolve_seed(seed: int | None) -> int:
    """The seed, or one that follows from torch's own without using any random number."""
    return torch.initial_seed() % 2**63 if seed is None else seed


def collapse_(model: nn.Module) -> nn.Module:
    """Leave the plain network with the collapsed weights, in place: the end of training, or of a copy of the model.

    Args:
        model: a module that is trained through training forms, or a copy of one.

    Returns:
        The model, without any trace of its training forms.
    """
    inside = {id(form) for form in forms_in(model).values()}
    for engine in live_engines():
        if all(id(form) in inside for form in engine.forms.values()):
            engine.detach()
    return strip_(model)


def strip_(module: nn.Module) -> nn.Module:
    """Remove every training form from a module or a copy of one, with the collapsed weights left in the layers.

    Args:
        module: changed in place, and returned.
    """
    for layer in list(module.modules()):
        for name, child in list(layer._modules.items()):
            if isinstance(child, TrainingForm):
                child.mean_in()
                child.live = False
            if isinstance(child, (TrainingForm, TiedForm)):
                del layer._modules[name]
    return module


def forms_in(module: nn.Module) -> Mapping[str, TrainingForm]:
    """Every training form in a module, by the path of its weight in that module.

    Args:
        module: any module.
    """
    found = {}
    for path, child in module.named_modules():
        if isinstance(child, TrainingForm):
            found[owner_key(path + ".", child._name)] = child
    return found


def collapsed_from_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Collapsed weights in float64 from a saved engine state, under each of their names, without a model.

    Args:
        state: what the ``state_dict()`` of an :class:`Engine` gave.
    """
    weights = {}
    for saved in state["forms"].values():
        if saved["method"] not in METHODS:
            raise ValueError(
                f"'{saved['names'][0]}' was trained as {saved['method']}, which is not among lightning_sop.reparam.METHODS "
                f"({', '.join(METHODS)}). Import the module that adds it there first."
            )
        method = METHODS[saved["method"]](**saved["settings"])
        site = Site(saved["names"][0], tuple(saved["shape"]), saved["out_axis"])
        phi = method.parameters([tensor.double() for tensor in saved["storage"]])
        for name in saved["names"]:
            weights[name] = method.collapse(phi, site)
    return weights
