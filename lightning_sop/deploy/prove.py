"""The proof that a deploy file computes what was trained: two sets of weights answer the same calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_sop.deploy.content import DeployContent
from lightning_sop.deploy.errors import CollapseError
from lightning_sop.deploy.receipt import Proof
from lightning_sop.deploy.replay import Call, Difference, compare, few_samples, replay
from lightning_sop.deploy.tolerance import Tolerance, compare_weights
from lightning_sop.deploy.weights import State

Load = Callable[[nn.Module, DeployContent], None]

_WEIGHTS_ONLY = "weights were compared, outputs were not"


def prove(
    fresh: Callable[[], nn.Module],
    load: Load,
    *,
    reference: DeployContent,
    recomputed: Mapping[str, Tensor],
    deployed: DeployContent,
    calls: Sequence[Call],
    tolerance: Tolerance,
    note: str = "",
) -> Proof:
    """Measure a deploy file's content against weights that come another way.

    Args:
        fresh: Makes a copy of the plain model as it is now, to be loaded into and run in evaluation mode.
        load: Loads a content into the module as a user would, strictly.
        reference: The trained weights, with each one that a method trains recomputed from the method's own tensors.
        recomputed: These recomputed weights by plain name, in any dtype.
        deployed: What was read back from the file's bytes.
        calls: Recorded calls to answer with both.
        tolerance: Of outputs and weights; only if that of outputs is exceeded, it is seen whether they are repeatable.
        note: Why there is no call.

    Raises:
        CollapseError: The content cannot be loaded into the plain model.
    """
    sides = (recomputed, _tensors(reference.state_dict))
    weights = max((compare_weights(side, deployed.state_dict, tolerance) for side in sides), key=tolerance.used)
    if not calls:
        return Proof(weights, note=note or f"no forward call was recorded: {_WEIGHTS_ONLY}")

    try:
        first = fresh()
    except Exception as error:  # users keep what they like in their modules: handles, locks, graphs
        return Proof(weights, note=f"the module cannot be copied ({type(error).__name__}: {error}): {_WEIGHTS_ONLY}")
    # A module may keep state from call to call: hidden states, generators of its own. Each side begins with the same.
    expected = _answers(_loaded(first, load, reference), calls)
    del first
    left_out = [name for name in reference.state_dict if name not in deployed.state_dict]
    measured = _answers(_loaded(fresh(), load, deployed, left_out), calls)
    if not expected.outputs:
        reason = "; ".join(expected.failures) or "no float outputs"
        return Proof(weights, note=f"no recorded call could be compared: {reason}")
    outputs = _gap(expected, measured)
    allowed = tolerance.outputs
    if outputs.exceeds(allowed) and _gap(expected, _answers(_loaded(fresh(), load, reference), calls)).exceeds(allowed):
        return Proof(weights, note=f"outputs are not repeatable, the same weights give others each time: {_WEIGHTS_ONLY}")
    return Proof(weights, outputs, expected.calls, "; ".join(expected.failures))


@dataclass(frozen=True)
class _Answers:
    """The calls that work outside a step, all of their outputs, and why the other calls do not."""

    calls: list[Call] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def _answers(module: nn.Module, calls: Sequence[Call]) -> _Answers:
    found = _Answers()
    for whole in calls:
        reason = ""
        for call in (few_samples(whole), whole):  # a batch cannot always be cut: a graph's nodes are no samples
            if call is None:
                continue
            try:
                outputs = replay(module, call)
            except Exception as error:  # the user's forward, outside of its step: anything may happen
                reason = f"{whole.module or 'forward'} could not be replayed ({type(error).__name__}: {error})"
                continue
            if outputs:
                found.calls.append(call)
                found.outputs.extend(outputs)
            reason = ""
            break
        found.failures.extend([reason] if reason else [])
    return found


def _gap(expected: _Answers, measured: _Answers) -> Difference:
    if len(expected.outputs) != len(measured.outputs):  # a call works with one of the two only
        return Difference(math.inf, math.inf, "number of outputs")
    return compare(expected.outputs, measured.outputs, [f"output {index}" for index in range(len(expected.outputs))])


def _loaded(module: nn.Module, load: Load, content: DeployContent, left_out: Sequence[str] = ()) -> nn.Module:
    try:
        load(module, content)
    except CollapseError:  # that says more
        raise
    except Exception as error:  # of the user's own set_extra_state(), too
        hint = (
            f" The file has no {', '.join(map(repr, left_out))}, which the module gives as something else than plain data: "
            "let its get_extra_state() return tensors, numbers, strings, lists and dicts, and use format='ckpt'."
            if left_out
            else ""
        )
        raise CollapseError(f"The deploy file's weights do not fit the plain model: {error}{hint}") from error
    return module


def _tensors(state: State) -> dict[str, Tensor]:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: value for name, value in tensors.items() if value.is_floating_point() or value.is_complex()}
