"""What an optimizer remembers, through a fusion: momentum and second moments of the grown network.

Let f = Σ_j λ_j f_j be the fused network. A copy j of a network has in f the gradient λ_j ∂L/∂θ in what makes its units, and
the whole ∂L/∂θ in a head that sums over them; between two copies of one network stands the same as within them, because
their units have the same values. First moments are carried over as gradients are, second moments as their squares.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sop.growth.axes import AxisMap
from lightning_sop.growth.blocks import average
from lightning_sop.growth.fuse import GrowthOp
from lightning_sop.growth.layout import TensorMap

OptimizerState = Mapping[str, Any]
MapState = Callable[
    [GrowthOp, torch.optim.Optimizer, Sequence[Mapping[str, OptimizerState]], Mapping[str, Tensor]],
    dict[str, dict[str, Any]],
]

#: By optimizer (subclasses count): with which power of the gradient an entry grows. 0: it does not depend on its scale.
POWERS: Mapping[str, Mapping[str, int]] = {
    "SGD": {"momentum_buffer": 1},
    "Muon": {"momentum_buffer": 1},
    "Adam": {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2},
    "AdamW": {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2},
    "NAdam": {"exp_avg": 1, "exp_avg_sq": 2},
    "RAdam": {"exp_avg": 1, "exp_avg_sq": 2},
    "SparseAdam": {"exp_avg": 1, "exp_avg_sq": 2},
    "Adamax": {"exp_avg": 1, "exp_inf": 1},
    "Adadelta": {"square_avg": 2, "acc_delta": 0},
    "Adagrad": {"sum": 2},
    "RMSprop": {"square_avg": 2, "momentum_buffer": 0, "grad_avg": 1},
    "Rprop": {"prev": 1, "step_size": 0},
}


def grow_optimizer_state(
    op: GrowthOp,
    optimizer: torch.optim.Optimizer,
    states: Sequence[Mapping[str, OptimizerState]],
    grown: Mapping[str, Tensor],
) -> dict[str, dict[str, Any]]:
    """The optimizer state of the grown network's parameters.

    Args:
        op: the fusion.
        optimizer: for its type; not modified.
        states: for each source, by parameter name, what an optimizer of that type holds; a source without state counts as
            one at rest: its momentum is zero, its second moments are those of the others.
        grown: the grown parameters by first name.

    Returns:
        State by first name. Empty, with a warning, for an optimizer that is not in :data:`POWERS`, or for entries that are
        neither of the parameter's shape nor single numbers.
    """
    powers = next((POWERS[cls.__name__] for cls in type(optimizer).__mro__ if cls.__name__ in POWERS), None)
    if powers is None:
        warnings.warn(
            f"{type(optimizer).__name__}: how its state grows is not known, so it starts anew. To carry it over, pass a "
            "function that maps it (optimizer_state=).",
            stacklevel=2,
        )
        return {}
    result = {}
    for name, parameter in grown.items():
        tensor = op.layout.tensors.get(name)
        held = [state.get(name) for state in states]
        first = next((state for state in held if state), None)
        if tensor is None or first is None:
            continue
        result[name] = {key: _entry(op, tensor, key, held, powers.get(key), parameter) for key in first}
    return result


def _entry(
    op: GrowthOp,
    tensor: TensorMap,
    key: str,
    held: Sequence[OptimizerState | None],
    power: int | None,
    parameter: Tensor,
) -> Any:
    present = [state for state in held if state]
    value = present[0][key]
    if not isinstance(value, Tensor) or value.dim() == 0 or power is None:
        return copy.deepcopy(value)
    shapes = tensor.donor_shapes
    by_source: list[Tensor] = []
    for source, state in enumerate(held):
        shape = shapes[op.sources.index(source)]
        if state:
            by_source.append(state[key])
        else:  # at rest: no momentum, and second moments of the size that the others have
            size = 0.0 if power == 1 else float(torch.stack([s[key].float().mean() for s in present]).mean())
            by_source.append(torch.full(shape, size, dtype=value.dtype, device=value.device))
    return grow_moment(op, tensor, by_source, power).to(parameter.device, value.dtype)


def grow_moment(op: GrowthOp, tensor: TensorMap, states: Sequence[Tensor], power: int) -> Tensor:
    """One entry of an optimizer's state for one grown tensor.

    Args:
        op: the fusion.
        tensor: which tensor.
        states: the entry in each source, of the source's shape.
        power: of the gradient: 1 for momentum, 2 for second moments, 0 for what does not depend on the gradient's scale.

    Returns:
        A tensor of the grown shape. Where units of different networks meet, and in new units, first moments are zero and
        all others are the mean over the donor's (over the old) inputs of the same unit, so that the first updates are of
        the size of the others.
    """
    donors = [states[source] for source in op.sources]
    if not tensor.grows:
        return average(donors, op.layout.weights).clone()
    grown = donors[0].new_zeros(tensor.shape)
    if power != 1:
        grown += torch.stack([state.float().mean() for state in donors]).mean().to(grown.dtype)
    growing = [number for number, axis in enumerate(tensor.axes) if axis is not None]
    for combination in itertools.product(range(len(donors)), repeat=len(growing)):
        choice = dict(zip(growing, combination, strict=True))
        _fill(op, tensor, donors, choice, power, grown)
    return grown


def _fill(
    op: GrowthOp, tensor: TensorMap, donors: Sequence[Tensor], choice: Mapping[int, int], power: int, grown: Tensor
) -> None:
    """The block in which each growing axis has the units of the chosen donor."""
    outputs = [number for number in choice if not tensor.axes[number].summed]  # type: ignore[union-attr]
    leading = choice[outputs[0]] if outputs else choice[next(iter(choice))]
    foreign = any(op.sources[donor] != op.sources[leading] for donor in choice.values())
    source = donors[leading]
    places, units = [], []
    factor = torch.ones((), dtype=torch.float64)
    for number, axis in enumerate(tensor.axes):
        shape = [-1 if number == other else 1 for other in range(len(tensor.axes))]
        if axis is None:
            place = unit = torch.arange(tensor.shape[number])
        else:
            place, unit = axis.positions(choice[number])
            if not axis.summed:
                factor = factor * (_mass(op, axis, choice[number]) / axis.share[place]).view(shape)
        places.append(place.view(shape).to(grown.device))
        units.append(unit.view(shape).to(grown.device))
    if foreign:
        if power == 1:
            return
        inputs = [number for number, axis in enumerate(tensor.axes) if axis is not None and axis.summed]
        values = source.mean(dim=inputs, keepdim=True)
        index = [u if number not in inputs else torch.zeros_like(u) for number, u in enumerate(units)]
        index = [torch.zeros_like(p) if n in inputs else u for n, (p, u) in enumerate(zip(places, index, strict=True))]
        block = values[tuple(index)]
    else:
        block = source[tuple(units)]
    grown[tuple(places)] = (block.double() * factor.to(grown.device) ** power).to(grown.dtype)


def _mass(op: GrowthOp, axis: AxisMap, donor: int) -> Tensor:
    """The part of the fused output that goes through each unit: λ, divided among the copies of a unit."""
    _, units = axis.positions(donor)
    return op.layout.weights[donor] / torch.bincount(units)[units].double()
