"""One guided forward of the grown network: where each donor's units arrive, part by part.

Every unit's output is replaced by the donors' outputs in their places. So each unit is judged by itself: what reaches its
input, through whatever operations lie before it, is compared with what reached it in the donors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_sop.deploy.replay import Call, map_tensors, tensors_in
from lightning_sop.growth.axes import AxisMap, by_groups, side_by_side
from lightning_sop.growth.blocks import Axes, average, push
from lightning_sop.growth.choices import CHUNKS, Choices, MismatchError, RetryError, fused_output
from lightning_sop.growth.depth import inside
from lightning_sop.growth.errors import FusionError
from lightning_sop.growth.match import close, differing_axes, match, ratios
from lightning_sop.growth.probe import Visit, Visits, answer, float_tensors, pattern, watched
from lightning_sop.growth.units import Role, find_units, is_norm, known, own_tensors, roles_of


class GuidedPass:
    """Runs the grown model once, guided by the donors; what was learned is in the attributes.

    Attributes:
        axes: the map of every axis of every tensor, by name.
        executed: paths of the units, in the order of their calls.
        outputs: the map of every output that grows, by path.
        inexact: norms that compute something else over several donors' units than each donor's norm.
        averaged: units that get an average of what the donors have there: exact behind linear layers only.
    """

    def __init__(
        self,
        grown: nn.Module,
        tensors: Sequence[Mapping[str, Tensor]],
        visits: Sequence[Visits],
        answers: Sequence[Sequence[Tensor]],
        weights: Sequence[float],
        choices: Choices,
        widen: str | None,
        blocks: Sequence[str] = (),
    ) -> None:
        self.choices = choices
        self.axes: dict[str, Axes] = {}
        self.executed: list[str] = []
        self.outputs: dict[str, AxisMap] = {}
        self.inexact: list[str] = []
        self.averaged: list[str] = []
        self._grown = grown
        self._units = {path: unit for path, unit in find_units(grown) if not inside(path, blocks)}
        self._tensors = tensors
        self._visits = visits
        self._answers = answers
        self._weights = list(weights)
        self._widen = widen
        self._inputs: dict[str, list[AxisMap | None]] = {}
        self._trusted = False  # whether the input of the unit that runs is just what the donors' network is to give it
        self._counts: dict[str, int] = defaultdict(int)
        self._written: dict[int, str] = {}  # by id of a tensor: the name under which it was first met

    def run(self, calls: Sequence[Call]) -> None:
        """Answer the calls, and learn.

        Raises:
            MismatchError: at the first unit that is not made of the donors'.
            RetryError: other choices are needed, and known.
            FusionError: the donors are of another architecture, or their widths do not add up.
        """
        for name, tensor in self._grown.state_dict(keep_vars=True).items():
            path, _, local = name.rpartition(".")
            if name not in self._tensors[0]:  # of a new block
                continue
            try:
                axes = self.tensor_axes(path, self._grown.get_submodule(path), local, tensor)
            except FusionError:
                if path not in self._units:
                    raise
                continue  # with the unit's inputs there may be a way; if not, it is said then
            if path in self._units:  # perhaps read by others, without a call
                self._push(name, tensor, axes)
            else:
                self._write(name, tensor, axes)
        with watched(self._units.items(), self._enter, self._leave):
            outputs = answer(self._grown, calls)
        ours = [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]
        for index, value in enumerate(ours):
            expected = fused_output([outputs[index] for outputs in self._answers], value, self._weights)
            if expected is not None and not self.averaged and not close(value, expected):
                raise MismatchError(
                    len(self.executed), "", "an output of the grown model is not made of the donors' outputs"
                )

    # ------------------------------------------------------------------ around a unit

    def _enter(self, path: str, args: Any, kwargs: Any) -> None:
        order, module, inputs = len(self.executed), self._units[path], float_tensors((args, kwargs))
        self.executed.append(path)
        visits = self._visit(path)
        if any(len(visit.inputs) != len(inputs) for visit in visits):
            raise FusionError(f"{path or 'the model'} gets other inputs in the grown model than in a donor")
        tied = self._tied_head(path, module)
        self._inputs[path], self._trusted = [], True
        for index, value in enumerate(inputs):
            self._inputs[path].append(self._locate(order, path, value, [visit.inputs[index] for visit in visits], tied))
        for local, tensor in own_tensors(module):
            name = f"{path}.{local}" if path else local
            if name not in self.axes and not (tied and local == "weight"):
                self._write(name, tensor, self.tensor_axes(path, module, local, tensor))

    def _write(self, name: str, tensor: Tensor, axes: Axes) -> None:
        self.axes[name] = axes
        self._written.setdefault(id(tensor), name)
        self._push(name, tensor, axes)

    def _push(self, name: str, tensor: Tensor, axes: Axes) -> None:
        push([tensors[name] for tensors in self._tensors], axes, tensor.detach(), self._weights)

    def _leave(self, path: str, output: Any) -> Any:
        module, visits = self._units[path], self._visit(path)
        self._counts[path] += 1
        forced = []
        for index, native in enumerate(tensors_in(output)):
            value, expected = self._forced(path, module, index, native, [visit.outputs[index] for visit in visits])
            if expected and self._trusted and not close(native, value):
                if not is_norm(module) and pattern(path) not in self.choices.mixing:
                    reason = f"{path} computes something else from the donors' weights than the donors do"
                    raise MismatchError(len(self.executed) - 1, path, reason)
                self.inexact += [path] * (path not in self.inexact)
            forced.append(value)
        queue = iter(forced)
        return map_tensors(lambda _: next(queue), output)

    def _visit(self, path: str) -> list[Visit]:
        count = self._counts[path]
        if any(len(visits.get(path, ())) <= count for visits in self._visits):
            raise FusionError(f"{path} runs in the grown model but not in every donor: they are not of one architecture")
        return [visits[path][count] for visits in self._visits]

    # ------------------------------------------------------------------ inputs

    def _locate(self, order: int, path: str, value: Tensor, donors: list[Tensor], tied: bool) -> AxisMap | None:
        """The map of one input."""
        growing = differing_axes(value.shape, [tensor.shape for tensor in donors])
        if growing is None or len(growing) > 1:
            raise MismatchError(order, path, f"the input of {path} grows along more than one axis")
        if not growing:
            same = all(close(value, tensor) for tensor in donors)
            self._trusted &= same
            self.averaged += [path] * (not same and path not in self.averaged)
            return None
        axis = growing[0]
        # A head that shares its weight with an embedding: the weights of the average come with its input.
        sizes = [tensor.shape[axis] for tensor in donors]
        copies = value.shape[axis] // sum(sizes) if self._widen == "copy" else 1
        wanted = [w / copies * tensor for w, tensor in zip(self._weights, donors, strict=True)] if tied else donors
        guesses = [side_by_side(sizes, value.shape[axis], chunks, copy=self._widen == "copy") for chunks in CHUNKS]
        regular = [guess for guess in guesses if guess is not None]
        found = match(value, wanted, axis, regular)
        if found is None and regular:
            factors = ratios(value, wanted, axis, regular[0])
            if factors:
                self._ask_upstream(path, donors, factors)
        if found is None:
            raise MismatchError(order, path, f"the input of {path} in the grown model is not made of the donors' inputs")
        return found

    def _ask_upstream(self, path: str, inputs: list[Tensor], factors: Sequence[float]) -> None:
        """Ask that the unit whose output this input is carries the inverse factors."""
        source = self._upstream(inputs)
        if source is None:
            return
        before = self.choices.gains.get(source, (1.0,) * len(factors))
        gains = {**self.choices.gains, source: tuple(old / new for old, new in zip(before, factors, strict=True))}
        raise RetryError(replace(self.choices, gains=gains))

    def _upstream(self, inputs: list[Tensor]) -> str | None:
        """The last unit whose output, in the first donor, is this input up to a constant."""
        for path in reversed(self.executed[:-1]):
            for value in self._visits[0][path][max(0, self._counts[path] - 1)].outputs[:1]:
                if value.shape == inputs[0].shape and value.is_floating_point():
                    factor = float((value * inputs[0]).sum() / value.square().sum().clamp_min(1e-30))
                    if factor and close(inputs[0], factor * value):
                        return path
        return None

    def _tied_head(self, path: str, module: nn.Module) -> bool:
        """Whether a unit averages with a weight that has its map already, as an embedding's."""
        weight = module._parameters.get("weight")
        first = self._written.get(id(weight)) if weight is not None else None
        if first is None or first in (f"{path}.weight", "weight") or weight is None:
            return False
        roles = roles_of(module, "weight", weight)
        return any(role.kind == "in" and axis is not None for role, axis in zip(roles, self.axes[first], strict=True))

    # ------------------------------------------------------------------ tensors

    def tensor_axes(self, path: str, module: nn.Module, local: str, tensor: Tensor) -> Axes:
        """The map of every axis of a unit's tensor.

        Raises:
            FusionError: widths that do not add up.
        """
        name = f"{path}.{local}" if path else local
        shapes = [tuple(tensors[name].shape) for tensors in self._tensors]
        growing = differing_axes(tensor.shape, shapes)
        if growing is None:
            raise FusionError(f"{name} is of shape {tuple(tensor.shape)} in the grown model and {shapes} in the donors")
        roles = list(roles_of(module, local, tensor, self._swapped(path, name)))
        if len(growing) == 1 and not known(module):  # positions, class tokens, scales; or, swapped, a matrix that sums
            roles[growing[0]] = Role("in" if self._swapped(path, name) else "out")
        axes: list[AxisMap | None] = [None] * tensor.dim()
        for axis in growing:
            sizes = [shape[axis] for shape in shapes]
            axes[axis] = self._axis(path, module, name, roles[axis], sizes, tensor.shape[axis])
        outputs = [i for i, role in enumerate(roles) if role.kind in ("out", "same") and axes[i] is not None]
        if not outputs:  # a head: sums over the donors' units
            return tuple(axis.averaging(self._weights) if axis is not None and axis.summed else axis for axis in axes)
        factors: Sequence[float] = self.choices.gains.get(path, ()) if local in module._parameters else ()
        if pattern(path) in self.choices.embeddings:
            factors = [(shape[outputs[0]] / tensor.shape[outputs[0]]) ** 0.5 for shape in shapes]
        grown = axes[outputs[0]]
        if factors and grown is not None:
            axes[outputs[0]] = grown.times(factors)
        return tuple(axes)

    def _swapped(self, path: str, name: str) -> bool:
        return bool(self.choices.swapped & {pattern(path), name})

    def _axis(self, path: str, module: nn.Module, name: str, role: Role, sizes: list[int], size: int) -> AxisMap:
        inputs = self._inputs.get(path, [])
        measured = inputs[role.source] if 0 <= role.source < len(inputs) else None
        if measured is not None:
            follows = role.kind in ("in", "same") or not known(module)
            if follows and len(measured) == size:
                return self._as(role, measured, sizes)
            if role.kind == "out" and getattr(module, "groups", 1) > 1:
                return by_groups(measured, size, module.groups, sizes)  # type: ignore[arg-type]
        if role.kind == "keep":
            raise FusionError(f"{name}: an axis that does not grow has {size} in the grown model and {sizes} in the donors")
        chunks = role.chunks or (self.choices.chunks.get(pattern(path), 1) if role.kind == "out" else 1)
        found = side_by_side(sizes, size, chunks, copy=self._widen == "copy")
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

    # ------------------------------------------------------------------ outputs

    def _forced(self, path: str, module: nn.Module, index: int, native: Tensor, donors: list[Tensor]) -> tuple[Tensor, bool]:
        """The donors' outputs in their places, and whether the unit should have computed just that."""
        growing = differing_axes(native.shape, [tensor.shape for tensor in donors])
        if not native.is_floating_point() or growing is None or len(growing) > 1 or (not growing and index):
            return native, False
        if not growing:
            return average(donors, self._weights), True
        sizes = [tensor.shape[growing[0]] for tensor in donors]
        found = self._output_map(path, module, sizes, native.shape[growing[0]], index)
        if found is None:
            return native, False
        if not index:
            self.outputs[path] = found
        return found.place(donors, native.clone(), growing[0]), True

    def _output_map(self, path: str, module: nn.Module, sizes: list[int], size: int, index: int) -> AxisMap | None:
        if isinstance(module, nn.RNNBase):
            chunks = 2 if module.bidirectional and index == 0 else 1
            return side_by_side(sizes, size, chunks, copy=self._widen == "copy")
        for local, _ in own_tensors(module):
            axes = self.axes.get(f"{path}.{local}" if path else local, ())
            if isinstance(module, nn.MultiheadAttention) and not local.startswith("out_proj"):
                continue
            for axis in axes:
                if axis is not None and not axis.summed and len(axis) == size:
                    return axis
        followed = [axis for axis in self._inputs[path] if axis is not None and len(axis) == size]
        return followed[0] if followed else side_by_side(sizes, size, copy=self._widen == "copy")
