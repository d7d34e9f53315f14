"""How far a deploy file may be from what was trained: what rounding explains, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_sop.deploy.parts import parts
from lightning_sop.deploy.replay import NO_DIFFERENCE, Difference, compare
from lightning_sop.deploy.weights import State, coarsest_dtype

# Relative to the largest value of a tensor. Rounding weights costs half an epsilon each; a deep network adds it up.
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Tolerance:
    """The relative differences that are allowed.

    Args:
        fixed: One for all; None goes by dtypes.
        states: The weights as they are trained and as they are deployed: what counts is the coarser one.
        parameters: Names of what outputs are computed with in its own precision; without any, all weights are. A buffer in
            a low precision, of counts or flags, say, does not make outputs coarse.
    """

    def __init__(self, fixed: float | None, *states: Mapping[str, Any], parameters: Collection[str] = ()) -> None:
        self._fixed, self._states, self._parameters = fixed, states, parameters

    @property
    def outputs(self) -> float:
        """Of outputs."""
        return self._allowed(self._parameters) if self._parameters else self._allowed({n for s in self._states for n in s})

    def of(self, name: str) -> float:
        """Of one weight."""
        return self._allowed([name])

    def used(self, difference: Difference) -> float:
        """How much of what is allowed a weight's difference takes."""
        allowed = self.of(difference.name)
        return difference.relative / allowed if allowed else difference.relative

    def _allowed(self, names: Collection[str]) -> float:
        if self._fixed is not None:
            return self._fixed
        found = {f"{number} {name}": state.get(name) for number, state in enumerate(self._states) for name in names}
        return _TOLERANCES.get(coarsest_dtype(found), 1e-1)


def compare_weights(reference: Mapping[str, Tensor], state: State, tolerance: Tolerance) -> Difference:
    """Of the differences between reference weights and a state_dict's, the one that takes most of what is allowed."""
    found = []
    for name, tensor in reference.items():
        if isinstance(state.get(name), Tensor):
            pieces, others = parts(tensor), parts(state[name])
            alike = len(pieces) == len(others)  # no sparse tensor against a dense one, say
            found.append(compare(pieces, others, [name] * len(pieces)) if alike else Difference(math.inf, math.inf, name))
    return max(found, key=tolerance.used, default=NO_DIFFERENCE)
