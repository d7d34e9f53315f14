"""The new units of a widened network: which weights feed each of them, and which hear it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_sop.deploy.replay import isolated_random_state
from lightning_sop.growth.layout import Layout
from lightning_sop.growth.probe import quiet_
from lightning_sop.growth.units import is_norm

Loss = Callable[[nn.Module], Tensor]
Values = dict[str, Tensor]
"""Whole tensors by name, flattened."""


@dataclass(frozen=True)
class Weights:
    """Weights of new units in one tensor.

    Attributes:
        name: of the tensor.
        index: (units, weights) where each unit's lie in the flattened tensor.
        usual: mean norm of a line of weights of the units beside them, 0 without any.
        line: how many weights are in such a line; a unit has several where a map is flattened.
    """

    name: str
    index: Tensor
    usual: float = 0.0
    line: int = 1


@dataclass(frozen=True)
class Rows:
    """What feeds the new units along one axis of a tensor.

    Attributes:
        layer: path of the module that it is of.
        fed: from old units, or from what does not grow; no weights where this is a bias.
        whole: (new, entries) where all lies that feeds each.
        positions: (new,) along the axis.
        part: (new,) in which of the axis' equal parts each lies.
        parts: how many of these there are.
        frozen: whether the tensor has no gradient in training.
    """

    layer: str
    fed: Weights
    whole: Tensor
    positions: Tensor
    part: Tensor
    parts: int
    frozen: bool

    @property
    def is_bias(self) -> bool:
        """Whether no inputs are weighted here."""
        return not self.fed.index.shape[1]


@dataclass(frozen=True)
class Columns:
    """What hears the new units along one axis of a tensor.

    Attributes:
        heard: from each to old units, or to what does not grow.
        whole: (new, entries) where all lies that hears each.
    """

    heard: Weights
    whole: Tensor


@dataclass(frozen=True)
class NewUnits:
    """New units that one layer makes.

    Attributes:
        layer: its path.
        fed: from old units, or from what does not grow, to each.
        heard: from each to old units, or to what does not grow.
        whole: all that feeds each: biases and weights from new units, too.
    """

    layer: str
    fed: Sequence[Weights]
    heard: Sequence[Weights]
    whole: Sequence[Weights]

    def __len__(self) -> int:
        return len(self.whole[0].index)


class Meter:
    """Gradients of a loss on a copy of a network whose tensors are given other values.

    Dropout is off, and norms over the batch take the batch's statistics. Every call draws the same random numbers.

    Args:
        network: not modified.
        loss: of the network, a scalar with a graph.
        names: of the tensors that matter.
        mean: of a tensor over the processes of a distributed run, None where there is one.

    Attributes:
        start: what the tensors are in the network.
    """

    def __init__(
        self, network: nn.Module, loss: Loss, names: Iterable[str], mean: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._network, self._loss, self._mean = quiet_(copy.deepcopy(network)), loss, mean
        named = dict(self._network.named_parameters(remove_duplicate=False))
        self._names = list(dict.fromkeys(names))
        for parameter in named.values():
            parameter.requires_grad_(False)
        for name in self._names:
            named[name].requires_grad_(True)
        self.start: Values = {name: named[name].detach().flatten().clone() for name in self._names}

    def gradient(self, values: Mapping[str, Tensor]) -> Values:
        """The gradient, flattened, where the tensors have these values.

        Raises:
            ValueError: a loss that is no scalar with a graph.
        """
        network = copy.deepcopy(self._network)  # what it keeps from call to call is in no other gradient
        named = dict(network.named_parameters(remove_duplicate=False))
        tensors = [named[name] for name in self._names]
        with torch.no_grad():
            for name, tensor in zip(self._names, tensors, strict=True):
                tensor.copy_(values[name].view_as(tensor))
        with isolated_random_state(), torch.enable_grad():
            loss = self._loss(network)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ValueError("the loss that new units are chosen by must be a scalar with a graph")
            found = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
        flat = [(value.to_dense() if value.is_sparse else value).detach().flatten() for value in found]
        if self._mean is not None:  # in one piece
            flat = list(torch.split(self._mean(torch.cat(flat)), [len(piece) for piece in flat]))
        return dict(zip(self._names, flat, strict=True))


def rows_and_columns(network: nn.Module, layout: Layout) -> tuple[list[Rows], list[Columns]]:
    """What feeds and what hears new units, tensor by tensor; of what feeds them, layers with weights and without groups."""
    rows, columns = [], []
    for name, tensor in layout.tensors.items():
        path, _, local = name.rpartition(".")
        module = network.get_submodule(path)
        parameter = getattr(module, local)
        if not isinstance(parameter, nn.Parameter) or not parameter.is_floating_point():
            continue
        kind = torch.int32 if parameter.numel() < 2**31 else torch.int64
        cells = torch.arange(parameter.numel(), dtype=kind).view(parameter.shape)
        for number, axis in enumerate(tensor.axes):
            if axis is None or not len(axis.new):
                continue
            inner = cells
            for other, there in enumerate(tensor.axes):
                if there is not None and other != number:
                    inner = inner.index_select(other, (there.donor >= 0).nonzero().flatten())
            lines = inner.movedim(number, 0).reshape(len(axis), -1)
            usual = take(parameter.flatten(), lines[axis.donor >= 0]).norm(dim=1).mean().nan_to_num()
            weights = Weights(name, lines[axis.new], float(usual), lines.shape[1])
            whole = cells.movedim(number, 0).reshape(len(axis), -1)[axis.new]
            if axis.summed:
                columns.append(Columns(weights, whole))
            elif not is_norm(module) and getattr(module, "groups", 1) == 1:
                fed = weights if parameter.dim() > 1 else Weights(name, weights.index[:, :0])
                parts = max(1, axis.chunks)
                part = torch.div(axis.new * parts, len(axis), rounding_mode="floor")
                rows.append(Rows(path, fed, whole, axis.new, part, parts, not parameter.requires_grad))
    layers = {row.layer for row in rows if row.fed.index.shape[1] > 1}
    return [row for row in rows if row.layer in layers], columns


def scatter(values: Values, weights: Sequence[Weights], new: Tensor | float, which: Tensor | None = None) -> None:
    """Write weights into flattened tensors, in place.

    Args:
        values: the tensors.
        weights: where.
        new: one number, or (units, weights) of all these tensors side by side.
        which: of the units.
    """
    parts = torch.split(new, [w.index.shape[1] for w in weights], 1) if isinstance(new, Tensor) else [new] * len(weights)
    for w, part in zip(weights, parts, strict=True):
        flat, index = values[w.name], w.index if which is None else w.index[which]
        chosen = part if which is None or not isinstance(part, Tensor) else part[which]
        flat[index.to(flat.device)] = chosen.to(flat) if isinstance(chosen, Tensor) else flat.new_tensor(chosen)


def gather(values: Mapping[str, Tensor], weights: Sequence[Weights]) -> Tensor:
    """Weights of new units, or what is like them, from flattened tensors: (units, weights), float64 on the CPU."""
    return torch.cat([take(values[w.name], w.index) for w in weights], 1)


def take(flat: Tensor, index: Tensor) -> Tensor:
    """Values of a flattened tensor, of the index' shape, float64 on the CPU."""
    return flat[index.to(flat.device)].detach().cpu().double()


def usual_norm(weights: Sequence[Weights]) -> float:
    """The mean norm of the old units' weights; of several lines, the root of the sum of squares."""
    return math.sqrt(sum(w.index.shape[1] / max(1, w.line) * w.usual**2 for w in weights))
