"""The proof that a deploy file computes what was trained: two sets of weights answer the same calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from lightning_sop.deploy.content import DeployContent
from lightning_sop.deploy.errors import CollapseError
from lightning_sop.deploy.receipt import Proof
from lightning_sop.deploy.replay import Call, compare, compare_weights, few_samples, replay
from lightning_sop.deploy.weights import State

Load = Callable[[nn.Module, DeployContent], None]


def prove(
    module: nn.Module | None,
    load: Load,
    *,
    reference: DeployContent,
    recomputed: Mapping[str, Tensor],
    deployed: DeployContent,
    calls: Sequence[Call],
    note: str = "",
) -> Proof:
    """Measure a deploy file's content against weights that come another way.

    Args:
        module: A copy of the plain model, to be loaded into and run in evaluation mode; None if there is none.
        load: Loads a content into the module as a user would, strictly.
        reference: The trained weights, with each one that a method trains recomputed from the method's own tensors.
        recomputed: These recomputed weights by plain name, in any dtype.
        deployed: What was read back from the file's bytes.
        calls: Recorded calls to answer with both.
        note: Why there is no module, or no call.

    Raises:
        CollapseError: The content cannot be loaded into the plain model.
    """
    weights = compare_weights(recomputed, deployed.state_dict)
    weights = max(weights, compare_weights(_tensors(reference.state_dict), deployed.state_dict), key=_relative)
    if module is None or not calls:
        return Proof(weights, note=note or "no forward call was recorded: weights were compared, outputs were not")
    _load(module, load, reference)
    answers, failures = _answers(module, calls)
    if not answers:
        return Proof(weights, note="no recorded call could be compared: " + ("; ".join(failures) or "no float outputs"))
    _load(module, load, deployed)
    expected = [tensor for _, outputs in answers for tensor in outputs]
    measured = [tensor for call, _ in answers for tensor in replay(module, call)]
    outputs = compare(expected, measured, [f"output {index}" for index in range(len(expected))])
    return Proof(weights, outputs, [call for call, _ in answers], "; ".join(failures))


def _answers(module: nn.Module, calls: Sequence[Call]) -> tuple[list[tuple[Call, list[Tensor]]], list[str]]:
    """The calls that work outside a step, with their outputs, and why the others do not."""
    answers: list[tuple[Call, list[Tensor]]] = []
    failures: list[str] = []
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
            answers += [(call, outputs)] if outputs else []
            reason = ""
            break
        failures += [reason] if reason else []
    return answers, failures


def _load(module: nn.Module, load: Load, content: DeployContent) -> None:
    try:
        load(module, content)
    except RuntimeError as error:
        raise CollapseError(f"The deploy file's weights do not fit the plain model: {error}") from error


def _tensors(state: State) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()}


def _relative(difference: tuple[float, float, str]) -> float:
    return difference[1]
