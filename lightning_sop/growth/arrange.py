"""Where the donors' units lie in the tensors of one unit of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from lightning_sop.growth.axes import AxisMap, by_groups, side_by_side
from lightning_sop.growth.blocks import Axes
from lightning_sop.growth.choices import Choices
from lightning_sop.growth.errors import FusionError
from lightning_sop.growth.match import differing_axes
from lightning_sop.growth.probe import pattern
from lightning_sop.growth.units import AxisKind, Role, known, own_tensors, roles_of


class Arrangement:
    """The maps of tensors' axes, from shapes, the meaning of axes, measured inputs, and choices for what these leave open.

    Args:
        tensors: of each donor, by name.
        weights: λ.
        choices: for what shapes leave open.
        widen: see :func:`~lightning_sop.growth.layout.find_layout`.
    """

    def __init__(
        self, tensors: Sequence[Mapping[str, Tensor]], weights: Sequence[float], choices: Choices, widen: str | None
    ) -> None:
        self.choices = choices
        self._tensors = tensors
        self._weights = list(weights)
        self._widen = widen

    def side_by_side(self, sizes: Sequence[int], size: int, chunks: int = 1) -> AxisMap | None:
        """The regular map, with new units or copies where there is more room."""
        return side_by_side(sizes, size, chunks, copy=self._widen == "copy")

    def output_map(
        self,
        path: str,
        module: nn.Module,
        axes: Mapping[str, Axes],
        inputs: Sequence[AxisMap | None],
        sizes: list[int],
        size: int,
        index: int,
    ) -> AxisMap | None:
        """Where the donors' units lie in a unit's ``index``-th output, given the maps of its tensors and inputs."""
        if isinstance(module, nn.RNNBase):
            return self.side_by_side(sizes, size, 2 if module.bidirectional and index == 0 else 1)
        for local, _ in own_tensors(module):
            if isinstance(module, nn.MultiheadAttention) and not local.startswith("out_proj"):
                continue
            for axis in axes.get(f"{path}.{local}" if path else local, ()):
                if axis is not None and not axis.summed and len(axis) == size:
                    inside = self.choices.inside.get(path)  # in the tensors only: the unit itself multiplies its output
                    return axis.times([1 / factor for factor in inside]) if inside else axis
        followed = [axis for axis in inputs if axis is not None and len(axis) == size]
        return followed[0] if followed else self.side_by_side(sizes, size)

    def tensor_axes(
        self, path: str, module: nn.Module, local: str, tensor: Tensor, inputs: Sequence[AxisMap | None] = ()
    ) -> Axes:
        """The map of every axis of a unit's tensor.

        Args:
            path: of the unit.
            module: the unit in the grown model.
            local: the tensor's name in it.
            tensor: in the grown model.
            inputs: where the donors' units lie in the unit's inputs, where that was measured.

        Raises:
            FusionError: widths that do not add up.
        """
        name = f"{path}.{local}" if path else local
        shapes = [tuple(tensors[name].shape) for tensors in self._tensors]
        growing = differing_axes(tensor.shape, shapes)
        if growing is None:
            raise FusionError(f"{name} is of shape {tuple(tensor.shape)} in the grown model and {shapes} in the donors")
        roles = list(roles_of(module, local, tensor, self._swapped(path, name)))
        if growing and not known(module):  # positions, class tokens, scales; or, swapped, a matrix that sums
            kinds: tuple[AxisKind, AxisKind] = ("in", "out") if self._swapped(path, name) else ("out", "in")
            for axis, kind in zip(growing, kinds, strict=False):
                roles[axis] = Role(kind)
        axes: list[AxisMap | None] = [None] * tensor.dim()
        for axis in growing:
            sizes = [shape[axis] for shape in shapes]
            axes[axis] = self._axis(path, module, name, roles[axis], sizes, tensor.shape[axis], inputs)
        outputs = [i for i, role in enumerate(roles) if role.kind in ("out", "same") and axes[i] is not None]
        if not outputs:  # a head: sums over the donors' units
            return tuple(axis.averaging(self._weights) if axis is not None and axis.summed else axis for axis in axes)
        gains = self.choices.gains.get(path) or self.choices.inside.get(path) or ()
        factors: Sequence[float] = gains if local in module._parameters else ()
        if pattern(path) in self.choices.embeddings:
            factors = [(shape[outputs[0]] / tensor.shape[outputs[0]]) ** 0.5 for shape in shapes]
        grown = axes[outputs[0]]
        if factors and grown is not None:
            axes[outputs[0]] = grown.times(factors)
        return tuple(axes)

    def _swapped(self, path: str, name: str) -> bool:
        return bool(self.choices.swapped & {pattern(path), name})

    def _axis(
        self,
        path: str,
        module: nn.Module,
        name: str,
        role: Role,
        sizes: list[int],
        size: int,
        inputs: Sequence[AxisMap | None],
    ) -> AxisMap:
        measured = inputs[role.source] if 0 <= role.source < len(inputs) else None
        if measured is not None:
            follows = role.kind in ("in", "same") or not known(module)
            if follows and len(measured) == size:
                return self._as(role, measured, sizes)
            if role.kind == "out" and getattr(module, "groups", 1) > 1:
                return by_groups(measured, size, module.groups, sizes)  # type: ignore[arg-type]
        if role.kind == "keep":
            raise FusionError(f"{name}: an axis that does not grow has {size} in the grown model and {sizes} in the donors")
        asked = self.choices.chunks
        chunks = role.chunks or asked.get(
            f"{pattern(name)} {role.kind}", asked.get(pattern(path), 1) if role.kind == "out" else 1
        )
        found = self.side_by_side(sizes, size, chunks)
        if found is None or (self._widen is None and size != sum(sizes)):
            parts = f" in {chunks} equal parts" if chunks > 1 else ""
            raise FusionError(
                f"{name}: an axis has {' + '.join(map(str, sizes))} units in the donors and {size} in the grown "
                f"model{parts}; expected {sum(sizes)}, or no growth"
            )
        return self._as(role, found, sizes)

    @staticmethod
    def _as(role: Role, axis: AxisMap, sizes: list[int]) -> AxisMap:
        """What is summed over counts each of the donors' units once, however many copies there are."""
        return replace(axis, summed=True).averaging([1.0] * len(sizes)) if role.kind == "in" else axis
