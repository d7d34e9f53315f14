"""Building the networks that DeepFusionGrow needs: donors from checkpoints, the grown model from hyper-parameters."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_sop.callbacks._plain_copy import plain_copy
from lightning_sop.callbacks._probe import ProbeRecorder
from lightning_sop.deploy.replay import Call, isolated_random_state, map_tensors
from lightning_sop.growth import FusionError
from lightning_sop.growth.adopt import adopt
from lightning_sop.growth.optimizers import plain_name

SELF = "self"


@dataclass
class Donor:
    """A network to fuse.

    Attributes:
        name: ``"self"``, or the file it comes from.
        module: the LightningModule, None for ``"self"``.
        optimizer_states: by optimizer, as in the checkpoint; empty where there are none.
    """

    name: str
    module: LightningModule | None = None
    optimizer_states: Sequence[Mapping[str, Any]] = field(default_factory=list)


def build(module: LightningModule, changes: Mapping[str, Any]) -> LightningModule:
    """A new module of the same class with other hyper-parameters; no global random state is used up.

    Args:
        module: whose class and hyper-parameters (``save_hyperparameters``) are taken.
        changes: new values by name; dots reach into nested ones (``"net.width"``).

    Raises:
        FusionError: the class has no such hyper-parameter, or cannot be built from those that were saved.
    """
    cls = type(module)
    parameters = inspect.signature(cls.__init__).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    saved = {key: value for key, value in module.hparams.items() if not key.startswith("_")}
    for name in changes:
        first, *path = name.split(".")
        if first not in saved and (path or first not in parameters):
            known = ", ".join(sorted(saved)) or "none: call self.save_hyperparameters() in its __init__"
            raise FusionError(f"grown: {cls.__name__} has no hyper-parameter {first!r}; it has {known}")
    arguments = {key: value for key, value in _nested(module.hparams, changes).items() if key in parameters or open_ended}
    missing = [
        name
        for name, p in list(parameters.items())[1:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in arguments
    ]
    if missing:
        raise FusionError(
            f"{cls.__name__} cannot be built anew: its argument {missing[0]!r} is not among the saved hyper-parameters. "
            "Call self.save_hyperparameters() in its __init__, or grow one attribute with target= and class_path."
        )
    with isolated_random_state():
        if "_instantiator" in module.hparams:
            from lightning.pytorch.cli import instantiate_module

            built: LightningModule = instantiate_module(cls, arguments)
        else:
            built = cls(**arguments)
        built.configure_model()
    return plain_copy(built) if any("_orig_mod" in part._modules for part in built.modules()) else built


def build_target(specification: Mapping[str, Any]) -> nn.Module:
    """A module from ``class_path`` and ``init_args``."""
    import importlib

    try:
        path, _, name = str(specification["class_path"]).rpartition(".")
        cls = getattr(importlib.import_module(path), name)
        with isolated_random_state():
            made = cls(**specification.get("init_args", {}))
    except (KeyError, ImportError, AttributeError, TypeError, ValueError) as error:
        raise FusionError(f"grown: {dict(specification)} cannot be built ({type(error).__name__}: {error})") from error
    if not isinstance(made, nn.Module):
        raise FusionError(f"grown: {specification['class_path']} is no nn.Module")
    return made


def load_donor(path: str, like: LightningModule) -> Donor:
    """A donor from a checkpoint of Lightning's, or from a deploy file; only plain data is read.

    Raises:
        FusionError: no such file, an unreadable one, or weights that do not fit their own hyper-parameters.
    """
    if not Path(path).is_file():
        raise FusionError(f"donor {path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["state_dict"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError) as error:
        raise FusionError(
            f"donor {path}: corrupt, truncated, or no checkpoint of plain data ({type(error).__name__})"
        ) from error
    hyper_parameters = {k: v for k, v in checkpoint.get("hyper_parameters", {}).items() if not k.startswith("_")}
    module = build(like, hyper_parameters)
    try:
        module.load_state_dict({name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise FusionError(
            f"donor {path} is no {type(like).__name__} of its own hyper-parameters: {' '.join(lines[1:3])}"
        ) from error
    return Donor(path, module, checkpoint.get("optimizer_states", []))


def calls_of_step(module: LightningModule, batch: Any, index: int) -> list[Call]:
    """The calls with which a training step enters the module's networks, from a run of it on a plain copy.

    Returns:
        The calls that were made before the step ended or failed: outside of a Trainer not every step works.
    """
    subject = plain_copy(module)
    recorder = ProbeRecorder()
    recorder.attach(subject)
    recorder.open()
    try:
        with silent(), torch.no_grad(), isolated_random_state():
            subject.training_step(map_tensors(torch.Tensor.clone, batch), index)
    except Exception:  # the user's step, outside of its Trainer: anything may happen
        pass
    finally:
        recorder.detach()
    return recorder.calls


def wider(module: LightningModule, grown: Mapping[str, Any], target: str | None) -> LightningModule:
    """The grown network, with weights of its own: of other hyper-parameters, or with another module as ``target``."""
    if target is None:
        return build(module, grown)
    copied = plain_copy(module)
    if not isinstance(getattr(copied, target, None), nn.Module):
        raise FusionError(f"target: {type(module).__name__} has no module {target!r}")
    setattr(copied, target, build_target(grown))
    return copied


def become(module: LightningModule, grown: LightningModule, changes: Mapping[str, Any]) -> dict[nn.Parameter, nn.Parameter]:
    """Turn the module into the grown one, in place; returns the successors of the parameters that had to be replaced."""
    own = frozenset(LightningModule().__dict__) | {"_hparams", "_hparams_initial", "_hparams_name"}
    successors = adopt(module, grown, build(module, {}) if changes else None, keep=own)
    if changes:
        module.hparams.update(_nested(module.hparams, changes))
    return successors


def fits(module: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether tensors of a state_dict have the module's shapes."""
    shapes = {plain_name(name): tuple(t.shape) for name, t in module.state_dict().items() if isinstance(t, Tensor)}
    wanted = {plain_name(name): tuple(t.shape) for name, t in state.items() if isinstance(t, Tensor)}
    return all(shapes[name] == shape for name, shape in wanted.items() if name in shapes)


def _nested(hparams: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters with changes, those with dots in their names put into their places."""
    result = {name: copy.deepcopy(value) for name, value in hparams.items() if not name.startswith("_")}
    for name, value in changes.items():
        inner, path = result, name.split(".")
        for key in path[:-1]:
            inner = inner[key]
            inner = inner.get("init_args", inner)
        inner[path[-1]] = value
    return result


@contextmanager
def silent() -> Iterator[None]:
    """Steps outside of a Trainer warn when they log."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
