"""What an optimizer remembers, through a fusion: momentum and second moments of the grown network.

Let f = Σ_j λ_j f_j be the fused network. A copy j of a network has in f the gradient λ_j ∂L/∂θ in what makes its units, and
the whole ∂L/∂θ in a head that sums over them; between two copies of one network stands the same as within them, because
their units have the same values. First moments are carried over as gradients are, second moments as their squares.

For copies of one network this is the fused network's gradient itself, with one exception: before a LayerNorm (RMSNorm,
GroupNorm) that runs over copies of unequal λ, whose backward mixes them. There only the sum over the copies is exact, which
is what moves the function.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sop.growth import blocks
from lightning_sop.growth.axes import AxisMap
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
    "Adamax": {"exp_avg": 1, "exp_inf": 2},  # its square, that is
    "Adadelta": {"square_avg": 2, "acc_delta": 0},
    "Adagrad": {"sum": 2},
    "Adafactor": {"variance": 2},  # the product of its factors, too
    "RMSprop": {"square_avg": 2, "momentum_buffer": 0, "grad_avg": 1},
    "Rprop": {"prev": 1, "step_size": 0},
}
#: Entries that decay with one of the ``betas`` from zero, for which the step count corrects.
_DECAYING = {"exp_avg": 0, "exp_avg_sq": 1, "max_exp_avg_sq": 1}
#: Options of a group, and the entries that an optimizer reads if they are set.
_REQUIRED = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg", "momentum": "momentum_buffer"}
_ROW, _COLUMN, _WHOLE = "row_var", "col_var", "variance"  # of Adafactor


def grow_optimizer_state(
    op: GrowthOp,
    optimizer: torch.optim.Optimizer,
    states: Sequence[Mapping[str, OptimizerState]],
    grown: Mapping[str, Tensor],
) -> dict[str, dict[str, Any]]:
    """The optimizer state of the grown network's parameters.

    Args:
        op: the fusion.
        optimizer: for its type and options; not modified.
        states: for each source, by parameter name, what an optimizer of that type holds; a source without state, or with
            one of another kind or shape, counts as one at rest: its momentum is zero, its second moments are those of the
            others. Where step counts differ, the longest counts, and the others' moments are corrected for it.
        grown: the grown parameters by first name.

    Returns:
        State by first name; names whose state starts anew are missing. Empty, with a warning, for an optimizer that is not
        in :data:`POWERS`, or that holds tensors not listed there.
    """
    kind = type(optimizer).__name__
    powers = next((POWERS[cls.__name__] for cls in type(optimizer).__mro__ if cls.__name__ in POWERS), None)
    states = [{name: _dense(state) for name, state in by_name.items()} for by_name in states]
    ours = [s for by_name in states for s in by_name.values() if powers is None or powers.keys() & s.keys()]
    unknown = sorted({key for s in ours for key, value in s.items() if _is_table(value)} - set(powers or ()))
    if powers is None or unknown:
        what = f"{kind}'s entries {', '.join(unknown)}" if powers and unknown else kind
        warnings.warn(
            f"{what}: how this state grows is not known, so it starts anew. To carry it over, pass a function that maps it "
            "(optimizer_state=).",
            stacklevel=2,
        )
        return {}
    required = {key for option, key in _REQUIRED.items() if key in powers and _set(optimizer, option)}
    if "square_avg" not in powers:
        required.discard("momentum_buffer")  # SGD makes it where it is missing, RMSprop does not
    result = {}
    for name, parameter in grown.items():
        tensor = op.layout.tensors.get(name)
        if tensor is None:
            continue
        shapes = [tensor.donor_shapes[op.sources.index(source)] for source in range(len(states))]
        held = [_usable(by_name.get(name), shape, powers) for by_name, shape in zip(states, shapes, strict=True)]
        entries = _entries(op, tensor, held, shapes, powers, optimizer.defaults.get("betas", ()), parameter)
        if entries and required <= entries.keys():
            result[name] = _factored(entries) if "Adafactor" in {c.__name__ for c in type(optimizer).__mro__} else entries
    return result


def _is_table(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _set(optimizer: torch.optim.Optimizer, option: str) -> bool:
    return any(group.get(option) for group in optimizer.param_groups)


def _usable(state: OptimizerState | None, shape: Sequence[int], powers: Mapping[str, int]) -> OptimizerState | None:
    """The state if it is one of this optimizer for a tensor of this shape."""
    tables = {key: value for key, value in (state or {}).items() if key in powers and isinstance(value, Tensor)}
    return state if tables and all(value.shape == torch.Size(shape) for value in tables.values()) else None


def _entries(
    op: GrowthOp,
    tensor: TensorMap,
    held: Sequence[OptimizerState | None],
    shapes: Sequence[Sequence[int]],
    powers: Mapping[str, int],
    betas: Sequence[Any],
    parameter: Tensor,
) -> dict[str, Any]:
    present = [state for state in held if state]
    latest = max(present, key=_step, default=None)
    entries: dict[str, Any] = {}
    for key in dict.fromkeys(key for state in present for key in state):
        if key not in powers:  # a single number, as all others have been looked at
            entries[key] = copy.deepcopy(latest[key]) if latest and key in latest else None
            continue
        power, by_source, known = powers[key], [], []
        for state in held:
            value = state.get(key) if state else None
            if isinstance(value, Tensor):
                wide = value.to(parameter.device, torch.promote_types(value.dtype, torch.float32))
                if key in _DECAYING and betas and latest:
                    wide = wide * _correction(float(betas[_DECAYING[key]]), _step(state), _step(latest))
                known.append(wide.square() if key == "exp_inf" else wide)
            by_source.append(known[-1] if isinstance(value, Tensor) else None)
        if not known:
            entries[key] = None
            continue
        # At rest: no momentum, and second moments of the size that the others have.
        size = 0.0 if power == 1 else float(torch.stack([value.mean() for value in known]).mean())
        full = [known[0].new_full(tuple(s), size) if v is None else v for s, v in zip(shapes, by_source, strict=True)]
        value = grow_moment(op, tensor, full, power)
        like = next(state[key] for state in present if isinstance(state.get(key), Tensor))
        entries[key] = (value.sqrt() if key == "exp_inf" else value).to(like.dtype)
    return entries


def _step(state: OptimizerState | None) -> float:
    return float((state or {}).get("step", 0))


def _correction(beta: float, step: float, latest: float) -> float:
    """By what to multiply an average over so many steps from zero, to read it as one over more."""
    return (1 - beta**latest) / (1 - beta**step) if 0 < step < latest else 1.0


def _dense(state: OptimizerState) -> OptimizerState:
    """Adafactor's second moment as one table."""
    if _ROW not in state or _COLUMN not in state:
        return state
    rows, columns = state[_ROW], state[_COLUMN]
    whole = rows @ columns / rows.mean(-2, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return {**{key: value for key, value in state.items() if key not in (_ROW, _COLUMN)}, _WHOLE: whole}


def _factored(entries: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`_dense`."""
    whole = entries.get(_WHOLE)
    if whole is None or whole.dim() < 2:
        return entries
    factors = {_ROW: whole.mean(-1, keepdim=True), _COLUMN: whole.mean(-2, keepdim=True)}
    return {**{key: value for key, value in entries.items() if key != _WHOLE}, **factors}


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
        return blocks.average(donors, op.layout.weights).clone()
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
    if foreign and power == 1:
        return
    places, units, _ = blocks.block(tensor.axes, choice, grown)
    factor = torch.ones((), dtype=torch.float64)
    for number in outputs:
        axis = tensor.axes[number]
        assert axis is not None
        mass = _mass(op, axis, choice[number]) / axis.share[axis.positions(choice[number])[0]]
        factor = factor * blocks.along(mass, number, len(tensor.axes))
    source = donors[leading]
    if foreign:  # whatever the unit's inputs are, they are none that the donor has
        inputs = [number for number, axis in enumerate(tensor.axes) if axis is not None and axis.summed]
        means = source.mean(dim=inputs, keepdim=True)
        values = means[tuple(torch.zeros_like(u) if number in inputs else u for number, u in enumerate(units))]
    else:
        values = source[units]
    grown[places] = (values.double() * factor.to(grown.device) ** power).to(grown.dtype)


def _mass(op: GrowthOp, axis: AxisMap, donor: int) -> Tensor:
    """The part of the fused output that goes through each unit: λ, divided among the copies of a unit."""
    _, units = axis.positions(donor)
    return op.layout.weights[donor] / torch.bincount(units)[units].double()
