"""One guided forward of the grown network: where each donor's units arrive, part by part.

Every unit's output is replaced by the donors' outputs in their places. So each unit is judged by itself: what reaches its
input, through whatever operations lie before it, is compared with what reached it in the donors.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_sop.deploy.replay import Call, map_tensors, tensors_in
from lightning_sop.growth.arrange import Arrangement
from lightning_sop.growth.axes import AxisMap, identity
from lightning_sop.growth.blocks import Axes, average, push
from lightning_sop.growth.choices import CHUNKS, Choices, MismatchError, RetryError, fused_output
from lightning_sop.growth.depth import inside
from lightning_sop.growth.errors import FusionError
from lightning_sop.growth.match import close, differing_axes, match, ratios
from lightning_sop.growth.probe import Visit, Visits, answer, float_tensors, pattern, watched
from lightning_sop.growth.units import find_units, is_norm, own_tensors, roles_of


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
        self.arrangement = Arrangement(tensors, weights, choices, widen)
        self._inputs: dict[str, list[AxisMap | None]] = {}
        self._last_inputs: dict[str, list[Tensor]] = {}
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
                axes = self.arrangement.tensor_axes(path, self._grown.get_submodule(path), local, tensor)
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
        self._last_inputs[path] = inputs
        self._inputs[path], self._trusted = [], True
        for index, value in enumerate(inputs):
            known_values = [visit.inputs[index] for visit in visits]
            self._inputs[path].append(self._locate(order, path, value, known_values, tied))
        for local, tensor in own_tensors(module):
            name = f"{path}.{local}" if path else local
            if name not in self.axes and not (tied and local == "weight"):
                axes = self.arrangement.tensor_axes(path, module, local, tensor, self._inputs[path])
                self._write(name, tensor, axes)

    def _write(self, name: str, tensor: Tensor, axes: Axes) -> None:
        self.axes[name] = axes
        self._written.setdefault(id(tensor), name)
        self._push(name, tensor, axes)

    def _push(self, name: str, tensor: Tensor, axes: Axes) -> None:
        offset = float(name.rpartition(".")[0] in self.choices.offsets)
        push([tensors[name] for tensors in self._tensors], axes, tensor.detach(), self._weights, offset)

    def _leave(self, path: str, output: Any) -> Any:
        module, visits = self._units[path], self._visit(path)
        self._counts[path] += 1
        forced = []
        for index, native in enumerate(tensors_in(output)):
            value, expected = self._forced(path, module, index, native, [visit.outputs[index] for visit in visits])
            if expected and self._trusted and not close(native, value):
                if not is_norm(module) and pattern(path) not in self.choices.mixing:
                    self._ask_inside(path, native, value)
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

    def _locate(self, order: int, path: str, value: Tensor, donors: list[Tensor], tied: Sequence[float]) -> AxisMap | None:
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
        wanted = [w / copies * tensor for w, tensor in zip(tied, donors, strict=True)] if tied else donors
        guesses = [self.arrangement.side_by_side(sizes, value.shape[axis], chunks) for chunks in CHUNKS]
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
        offsets = self.choices.offsets | ({source} if self._adds_one(source) else set())
        raise RetryError(replace(self.choices, gains=gains, offsets=offsets))

    def _adds_one(self, path: str) -> bool:
        """Whether a unit multiplies by 1 + w, as some norms do, and not by w."""
        if not is_norm(self._units[path]):
            return False
        unit = copy.deepcopy(self._units[path])
        unit._forward_hooks.clear()
        unit._forward_pre_hooks.clear()
        before = float_tensors(unit(*self._last_inputs[path]))[0]
        for parameter in unit.parameters(recurse=False):
            parameter.mul_(2).add_(1)
        after = float_tensors(unit(*self._last_inputs[path]))[0]
        return len(list(unit.parameters(recurse=False))) == 1 and close(after, 2 * before)

    def _upstream(self, inputs: list[Tensor]) -> str | None:
        """The last unit whose output, in the first donor, is this input up to a constant."""
        for path in reversed(self.executed[:-1]):
            for value in self._visits[0][path][max(0, self._counts[path] - 1)].outputs[:1]:
                if value.shape == inputs[0].shape and value.is_floating_point():
                    factor = float((value * inputs[0]).sum() / value.square().sum().clamp_min(1e-30))
                    if factor and close(inputs[0], factor * value):
                        return path
        return None

    def _ask_inside(self, path: str, native: Tensor, expected: Tensor) -> None:
        """Where a unit multiplies by what follows its width (an embedding scaled inside), ask for inverse factors."""
        places = self.outputs.get(path)
        if places is None or path in self.choices.inside:
            return
        axis = next(a for a, size in enumerate(native.shape) if size == len(places))
        found = []
        for donor in range(len(self._weights)):
            where, _ = places.positions(donor)
            found += ratios(
                native.index_select(axis, where), [expected.index_select(axis, where)], axis, identity(len(where))
            )
        if len(found) == len(self._weights):
            inverse = tuple(1 / factor for factor in found)
            raise RetryError(replace(self.choices, inside={**self.choices.inside, path: inverse}))

    def _tied_head(self, path: str, module: nn.Module) -> list[float]:
        """For a unit that averages with a weight which has its map already, as an embedding's: what its input must carry."""
        weight = module._parameters.get("weight")
        first = self._written.get(id(weight)) if weight is not None else None
        if first is None or first in (f"{path}.weight", "weight") or weight is None:
            return []
        roles = roles_of(module, "weight", weight)
        for role, axis in zip(roles, self.axes[first], strict=True):
            if role.kind == "in" and axis is not None:
                shares = [float(axis.share[axis.positions(donor)[0]][0]) for donor in range(len(self._weights))]
                return [weight / share for weight, share in zip(self._weights, shares, strict=True)]
        return []

    # ------------------------------------------------------------------ outputs

    def _forced(self, path: str, module: nn.Module, index: int, native: Tensor, donors: list[Tensor]) -> tuple[Tensor, bool]:
        """The donors' outputs in their places, and whether the unit should have computed just that."""
        growing = differing_axes(native.shape, [tensor.shape for tensor in donors])
        if not native.is_floating_point() or growing is None or len(growing) > 1 or (not growing and index):
            return native, False
        if not growing:
            return average(donors, self._weights), True
        sizes = [tensor.shape[growing[0]] for tensor in donors]
        size, inputs = native.shape[growing[0]], self._inputs[path]
        found = self.arrangement.output_map(path, module, self.axes, inputs, sizes, size, index)
        if found is None:
            return native, False
        if not index:
            self.outputs[path] = found
        return found.place(donors, native.clone(), growing[0]), True
