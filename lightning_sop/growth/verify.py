"""The proof of a fusion: the grown network against the average of its donors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from lightning_sop.deploy.replay import Call, compare
from lightning_sop.growth.axes import AxisMap
from lightning_sop.growth.blocks import average
from lightning_sop.growth.choices import fused_output
from lightning_sop.growth.errors import FusionError
from lightning_sop.growth.layout import Layout
from lightning_sop.growth.match import differing_axes
from lightning_sop.growth.probe import answer, float_tensors, record_visits

_OUTSIDE = (
    ": a parameter that is used outside of its own layer, such as in F.linear(x, layer.weight.t()), cannot be grown. Put a "
    "layer with a weight of its own there"
)


@dataclass(frozen=True)
class Proof:
    """The measured gap between the grown network and the average of its donors' outputs.

    Attributes:
        gap: largest difference, relative to the largest value of the output it is found in.
        promised: whether theory says that there is none.
        outputs: number of output tensors compared.
        inexact: norms over the units of several donors, from which a gap comes that was not promised away.
        averaged: layers that get an average of what the donors have there, from which one comes, too.
    """

    gap: float
    promised: bool
    outputs: int
    inexact: tuple[str, ...]
    averaged: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"grown network = average of the donors up to {self.gap:.1e}"
        causes = []
        if self.inexact:
            causes.append(f"{len(self.inexact)} norms run over units of several donors ({self.inexact[0]}, ...)")
        if self.averaged:
            causes.append(f"{len(self.averaged)} layers get an average of the donors' units ({self.averaged[0]}, ...)")
        return f"{text}, because {' and '.join(causes)}" if causes else text


def prove(
    donors: Sequence[nn.Module],
    grown: nn.Module,
    calls: Sequence[Call],
    layout: Layout,
    *,
    promised: bool,
    tolerance: float,
) -> Proof:
    """Compare outputs on a probe.

    Raises:
        FusionError: the gap is above the tolerance although exactness was promised; names the first layer that differs.
    """
    expected = [float_tensors(answer(donor, calls, part_by_part=False)) for donor in donors]
    measured = float_tensors(answer(grown, calls, part_by_part=False))
    pairs = []
    for index, output in enumerate(measured):
        reference = fused_output([outputs[index] for outputs in expected], output, layout.weights)
        if reference is not None:
            pairs.append((reference, output))
    if not pairs:
        raise FusionError("no output of the probe can be compared: the model returns no floating-point tensors")
    names = [f"output {number}" for number in range(len(pairs))]
    gap = compare([a for a, _ in pairs], [b for _, b in pairs], names)
    if promised and gap.exceeds(tolerance):
        raise FusionError(
            f"the fused network differs from the average of its donors by {gap.relative:.2e} of the largest output, where "
            f"it should be the same{_first_difference(donors, grown, calls, layout, tolerance)}"
        )
    return Proof(gap.relative, promised, len(pairs), *(((), ()) if promised else (layout.inexact, layout.averaged)))


def _first_difference(
    donors: Sequence[nn.Module], grown: nn.Module, calls: Sequence[Call], layout: Layout, tolerance: float
) -> str:
    """The first layer whose output is not the donors' outputs in their places, or their average where it does not grow."""
    known = [record_visits(donor, calls)[0] for donor in donors]
    differs = partial(_differs, weights=layout.weights, tolerance=tolerance)
    for path, visits in record_visits(grown, calls)[0].items():
        here, there = visits[0], [visit[path][0] for visit in known if visit[path]]
        if not here.outputs or len(there) < len(donors):  # a new block
            continue
        if differs(here.outputs[0], [visit.outputs[0] for visit in there], places=layout.outputs.get(path)):
            heard = zip(here.inputs, zip(*(visit.inputs for visit in there), strict=False), strict=False)
            before = any(differs(value, values) for value, values in heard)
            return f"; the first layer that differs is {path}" + f", and what reaches it differs already{_OUTSIDE}" * before
    return f"; no layer differs, but what is computed outside of them does{_OUTSIDE}"


def _differs(
    here: Tensor, there: Sequence[Tensor], *, weights: Sequence[float], tolerance: float, places: AxisMap | None = None
) -> bool:
    """Whether a tensor is not what it should be; of one that grows to who knows what, that is not known."""
    growing = differing_axes(here.shape, [tensor.shape for tensor in there])
    if places is not None:
        expected = places.place(there, here.clone(), (growing or [0])[0])
    elif growing == [] and here.is_floating_point():
        expected = average(there, weights)
    else:
        return False
    return compare([expected], [here], [""]).exceeds(tolerance)
