"""Recording what the units of a network get and give."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sop.deploy.replay import Call, first_floating, isolated_random_state, map_tensors, tensors_in
from lightning_sop.growth.units import find_units


@dataclass
class Visit:
    """One call of a unit: its floating-point inputs, and its output with all tensors in it."""

    inputs: list[Tensor]
    output: Any

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors of the output, in order."""
        return list(tensors_in(self.output))


Visits = dict[str, list[Visit]]


def pattern(path: str) -> str:
    """The path with its numbers replaced by ``*``, which all layers of one kind share."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def record_visits(
    model: nn.Module, calls: Sequence[Call], parts: Iterable[tuple[str, nn.Module]] | None = None
) -> tuple[Visits, list[Tensor]]:
    """Every call of every unit while the model answers ``calls``, and the floating-point tensors that it answers.

    Args:
        model: any module.
        calls: what to call it with.
        parts: what to record instead of all units, by path.
    """
    visits: Visits = defaultdict(list)
    pending: dict[str, list[Tensor]] = {}

    def enter(path: str, args: Any, kwargs: Any) -> None:
        pending[path] = [tensor.clone() for tensor in float_tensors((args, kwargs))]

    def leave(path: str, output: Any) -> Any:
        visits[path].append(Visit(pending.pop(path), map_tensors(lambda t: t.detach().clone(), output)))
        return output

    with watched(find_units(model) if parts is None else parts, enter, leave):
        answers = float_tensors(answer(model, calls))
    return visits, answers


def answer(model: nn.Module, calls: Sequence[Call], *, part_by_part: bool = True) -> list[Any]:
    """What a model answers in evaluation mode, without gradients and without using up global random state.

    Args:
        model: any module.
        calls: what to call it with.
        part_by_part: forbid torch's encoder layers to compute all of themselves without calling their parts.
    """
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast and not part_by_part)
    like = first_floating(model)
    model.eval()
    try:
        with torch.no_grad(), isolated_random_state():
            answers = []
            for call in calls:
                args, kwargs = map_tensors(lambda tensor: _on(tensor, like), (call.args, call.kwargs))
                answers.append(model.get_submodule(call.module)(*args, **kwargs))
            return answers
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def watched(
    units: Iterable[tuple[str, nn.Module]],
    enter: Callable[[str, Any, Any], None],
    leave: Callable[[str, Any], Any],
) -> Iterator[None]:
    """Call ``enter`` before each call of a unit and ``leave`` after it, whose value becomes the unit's output."""
    handles = []
    try:
        for path, module in units:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, path=path: enter(path, args, kwargs), with_kwargs=True
                )
            )
            handles.append(module.register_forward_hook(lambda _, args, output, path=path: leave(path, output)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def quiet_(network: nn.Module) -> nn.Module:
    """Set a copy up for comparisons: no dropout, and norms over the batch as in training, with their averages left alone."""
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.train()
            module.momentum = 0.0
        elif isinstance(module, nn.RNNBase):
            module.train()  # cuDNN has no backward otherwise
            module.dropout = 0.0
    return network


def float_tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in a nested value, detached, in order."""
    return [tensor.detach() for tensor in tensors_in(value) if tensor.is_floating_point()]


def _on(tensor: Tensor, like: Tensor) -> Tensor:
    floating = tensor.is_floating_point()
    return tensor.detach().to(like.device, like.dtype if floating else tensor.dtype, copy=True)
