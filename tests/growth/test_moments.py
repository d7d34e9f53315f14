"""What an optimizer remembers, through a fusion: against autograd's gradients, and against the next steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sop.growth import GrowthOp, fuse
from lightning_sop.growth.moments import POWERS, grow_moment, grow_optimizer_state
from lightning_sop.growth.optimizers import replace_parameters
from lightning_sop.growth.rates import StepRates, rates_for
from lightning_sop.zoo.nets import Decoder, ResNet
from tests.growth.architectures import trained

SEED = torch.Generator().manual_seed(0)
VECTORS = torch.randn(32, 6, dtype=torch.float64, generator=SEED)
IMAGES = torch.randn(16, 1, 8, 8, dtype=torch.float64, generator=SEED)
TOKENS = torch.randint(11, (8, 7), generator=SEED)
CLASSES = torch.randint(3, (32,), generator=SEED)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3)
    )


def plain(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


def conv(width: int) -> nn.Module:
    return ResNet((1, 8, 8), 3, width=width)


def decoder(width: int, tied: bool = True) -> nn.Module:
    return Decoder(11, 6, width=width, depth=1, heads=width // 4, tied=tied)


def untied(width: int) -> nn.Module:
    return decoder(width, False)


Make = Callable[[int], nn.Module]
NETS: dict[str, tuple[Make, int, Tensor, Tensor]] = {
    "mlp": (mlp, 5, VECTORS, CLASSES),
    "conv": (conv, 2, IMAGES, CLASSES[:16]),
    "decoder": (decoder, 8, TOKENS[:, :-1], TOKENS[:, 1:].flatten()),
    "decoder-untied": (untied, 8, TOKENS[:, :-1], TOKENS[:, 1:].flatten()),
}
WEIGHTS = [(0.5, 0.5), (0.3, 0.7), (1 / 3, 1 / 3, 1 / 3), (0.2, 0.3, 0.5)]
any_net = pytest.mark.parametrize("net", NETS)
any_weights = pytest.mark.parametrize("weights", WEIGHTS, ids=str)


def network(make: Make, width: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return trained(make(width).double())


def loss_of(net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(net(inputs).flatten(0, -2), targets)


def gradients(net: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    net.train()
    named = dict(net.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss_of(net, inputs, targets), list(named.values())), strict=True))


def copies(net: str, weights: Sequence[float]) -> tuple[nn.Module, nn.Module, GrowthOp]:
    make, width, inputs, _ = NETS[net]
    small, wide = network(make, width), network(make, width * len(weights), 9)
    return small, wide, fuse([small] * len(weights), wide, inputs, weights=weights).op


@any_net
@any_weights
def test_a_gradient_grows_to_that_of_copies(net: str, weights: Sequence[float]) -> None:
    """Autograd's gradient of the fused network is what a first moment of the small one's gradient becomes."""
    small, wide, op = copies(net, weights)
    there, here = (gradients(model, *NETS[net][2:]) for model in (small, wide))
    assert here.keys() <= op.layout.tensors.keys()
    unequal = len(set(weights)) > 1
    for name, expected in here.items():
        tensor = op.layout.tensors[name]
        pulled = op.pull({name: grow_moment(op, tensor, [there[name]], 1)}, [there])[0][name]
        torch.testing.assert_close(pulled, there[name], rtol=1e-8, atol=1e-10)
        if unequal and net.startswith("decoder") and not name.startswith(("norm", "head")):
            continue  # LayerNorm's backward mixes copies, and the sum over them is what is exact
        torch.testing.assert_close(grow_moment(op, tensor, [there[name]], 1), expected, rtol=1e-8, atol=1e-10)
        second = grow_moment(op, tensor, [there[name].square()], 2)
        torch.testing.assert_close(second, expected.square(), rtol=1e-8, atol=1e-10)
        absolute = grow_moment(op, tensor, [torch.ones_like(there[name])], 0)
        torch.testing.assert_close(absolute, torch.ones_like(expected))


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7)], ids=str)
def test_moments_of_different_donors(weights: Sequence[float]) -> None:
    """Diagonal blocks: each donor's own by its weight; between donors nothing, and for second moments the row's mean."""
    donors, wide = [network(plain, 4, 0), network(plain, 5, 1)], network(plain, 9)
    op = fuse(donors, wide, VECTORS, weights=weights).op
    one, two = (gradients(donor, VECTORS, CLASSES) for donor in donors)
    (w1, w2), name = weights, "2.weight"
    tensor = op.layout.tensors[name]
    first = grow_moment(op, tensor, [one[name], two[name]], 1)
    torch.testing.assert_close(first, torch.block_diag(w1 * one[name], w2 * two[name]), rtol=0, atol=1e-12)
    second = grow_moment(op, tensor, [one[name].square(), two[name].square()], 2)
    a, b = (w1 * one[name]).square(), (w2 * two[name]).square()
    above, below = a.mean(1, keepdim=True).expand(4, 5), b.mean(1, keepdim=True).expand(5, 4)
    expected = torch.cat([torch.cat([a, above], 1), torch.cat([below, b], 1)])
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-12)
    head = grow_moment(op, op.layout.tensors["4.weight"], [one["4.weight"], two["4.weight"]], 1)
    torch.testing.assert_close(head, torch.cat([one["4.weight"], two["4.weight"]], 1), rtol=0, atol=1e-12)
    bias = grow_moment(op, op.layout.tensors["4.bias"], [one["4.bias"], two["4.bias"]], 1)
    torch.testing.assert_close(bias, w1 * one["4.bias"] + w2 * two["4.bias"], rtol=0, atol=1e-12)


# ------------------------------------------------------------------ optimizers


def matrices(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=1e-2)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "SGD-nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, dampening=0),
    "SGD-plain": lambda p: torch.optim.SGD(p, lr=0.05),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-30),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-30, amsgrad=True, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = matrices
EXACT = ("SGD", "SGD-nesterov", "SGD-plain", "Adam", "AdamW")


def step(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> dict[str, Tensor]:
    """One step on its own batch; returns what it added to each parameter."""
    rows = torch.arange(number, number + 24) % 32
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.zero_grad()
    loss_of(net, VECTORS[rows], CLASSES[rows]).backward()
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in net.named_parameters()}


def grown(
    small: nn.Module, optimizer: torch.optim.Optimizer, kind: str, weights: Sequence[float] = (0.5, 0.5), **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, GrowthOp]:
    """A fused network and the optimizer that goes on with it, at matched rates."""
    wide = network(plain, 5 * len(weights), 9)
    op = fuse([small] * len(weights), wide, VECTORS, weights=weights).op
    held, live = dict(small.named_parameters()), dict(wide.named_parameters())
    state = {name: dict(optimizer.state[p]) for name, p in held.items() if optimizer.state.get(p)}
    carried = grow_optimizer_state(op, optimizer, [state], live)
    other = OPTIMIZERS[kind](list(small.parameters()))
    successors = {held[name]: live[name] for name in held}
    replace_parameters(other, successors, {live[name]: entry for name, entry in carried.items()})
    held_names = {name for name, p in live.items() if any(p is q for g in other.param_groups for q in g["params"])}
    gradient = {name: g for name, g in gradients(wide, VECTORS, CLASSES).items() if name in held_names}
    rates = rates_for(other, op, [held], live, gradient)
    StepRates(other, {live[name]: rate for name, rate in rates.items()})
    return wide, other, op


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_is_carried_through_every_optimizer(kind: str) -> None:
    """Exactly for SGD and Adam, whose matched rates are exact; for others the next update is of the size of the last."""
    small = network(plain, 5)
    optimizer = OPTIMIZERS[kind](list(small.parameters()))
    for number in range(6):
        last = step(small, optimizer, number)
    wide, other, _ = grown(small, optimizer, kind)
    entries = {key for state in optimizer.state.values() for key in state}
    assert all(set(state) == entries for state in other.state.values()) or kind == "Adafactor"
    assert len(other.state) == len(optimizer.state)
    for number in range(6, 10):
        before = {name: float(update.norm()) for name, update in last.items()}
        last, there = step(small, optimizer, number), step(wide, other, number)
        if kind in EXACT:
            torch.testing.assert_close(wide(VECTORS), small(VECTORS), rtol=0, atol=1e-13)
        elif number == 6:
            for name, update in there.items():
                size, reference = float(update.norm()), max(before[name], float(last[name].norm()))
                assert size <= 2 * reference + 1e-12, name
                assert size >= min(before[name], float(last[name].norm())) / 2, name


def test_every_listed_optimizer_is_tested() -> None:
    tested = {type(make([nn.Parameter(torch.zeros(2, 2))])).__name__ for make in OPTIMIZERS.values()}
    assert set(POWERS) - tested <= {"SparseAdam", "Muon"}


def test_three_copies_with_adam_stay_one_network() -> None:
    small = network(plain, 5)
    optimizer = OPTIMIZERS["AdamW"](list(small.parameters()))
    for number in range(4):
        step(small, optimizer, number)
    wide, other, _ = grown(small, optimizer, "AdamW", (1 / 3,) * 3)
    for number in range(4, 8):
        step(small, optimizer, number)
        step(wide, other, number)
    torch.testing.assert_close(wide(VECTORS), small(VECTORS), rtol=0, atol=1e-12)


def test_unequal_copies_separate_and_their_first_update_is_no_spike() -> None:
    small = network(plain, 5)
    optimizer = OPTIMIZERS["Adam"](list(small.parameters()))
    for number in range(6):
        last = step(small, optimizer, number)
    wide, other, _ = grown(small, optimizer, "Adam", (0.3, 0.7))
    first = step(wide, other, 5)  # the same batch again
    for name, update in first.items():
        assert 0.5 <= float(update.norm() / last[name].norm()) <= 2, name
    for number in range(6, 60):
        step(wide, other, number)
    hidden = wide[2](torch.tanh(wide[0](VECTORS)))
    singular = torch.linalg.svdvals(hidden - hidden.mean(0))
    assert (singular > 1e-6 * singular[0]).sum() == 10  # ten different units, not twice the same five


def test_an_unknown_optimizer_starts_anew_with_a_warning() -> None:
    small, wide, op = copies("mlp", (0.5, 0.5))
    optimizer = torch.optim.ASGD(small.parameters())
    state = {name: {"eta": torch.tensor(1.0), "ax": p.detach()} for name, p in small.named_parameters()}
    with pytest.warns(UserWarning, match="ASGD: how this state grows is not known, so it starts anew"):
        assert grow_optimizer_state(op, optimizer, [state], dict(wide.named_parameters())) == {}


def test_an_unknown_entry_starts_anew_with_a_warning() -> None:
    class Anchored(torch.optim.Adam):
        pass

    small, wide, op = copies("mlp", (0.5, 0.5))
    state = {name: {"exp_avg": torch.zeros_like(p), "anchor": p.detach()} for name, p in small.named_parameters()}
    with pytest.warns(UserWarning, match="Anchored's entries anchor: how this state grows"):
        assert not grow_optimizer_state(op, Anchored(small.parameters()), [state], dict(wide.named_parameters()))


def adam_states(net: nn.Module, steps: int, **options: Any) -> dict[str, dict[str, Any]]:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, **options)
    for number in range(steps):
        step(net, optimizer, number)
    return {name: dict(optimizer.state[p]) for name, p in net.named_parameters()}


def test_a_donor_without_state_counts_as_at_rest() -> None:
    donors, wide = [network(plain, 4, 0), network(plain, 5, 1)], network(plain, 9)
    op = fuse(donors, wide, VECTORS).op
    state = adam_states(donors[0], 5)
    optimizer = torch.optim.Adam(wide.parameters())
    carried = grow_optimizer_state(op, optimizer, [state, {}], dict(wide.named_parameters()))
    weight = carried["0.weight"]
    torch.testing.assert_close(weight["exp_avg"][:4], state["0.weight"]["exp_avg"] / 2)
    assert not weight["exp_avg"][4:].any()
    size = state["0.weight"]["exp_avg_sq"].mean() / 4
    torch.testing.assert_close(weight["exp_avg_sq"][4:], size.expand(5, 6))
    assert carried["2.weight"]["step"] == 5


def test_a_state_of_another_kind_or_shape_counts_as_none() -> None:
    donors, wide = [network(plain, 4, 0), network(plain, 5, 1)], network(plain, 9)
    op, live = fuse(donors, wide, VECTORS).op, dict(wide.named_parameters())
    state = adam_states(donors[0], 3)
    foreign = {name: {"momentum_buffer": torch.ones_like(p)} for name, p in donors[1].named_parameters()}
    wrong = {name: {**state[name], "exp_avg": torch.ones(99)} for name in state}
    optimizer = torch.optim.Adam(wide.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = grow_optimizer_state(op, optimizer, [state, {}], live)
        shaped = grow_optimizer_state(op, optimizer, [state, wrong], live)
        other = grow_optimizer_state(op, optimizer, [state, foreign], live)
        assert grow_optimizer_state(op, optimizer, [foreign, foreign], live) == {}
    for name in alone:
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(alone[name][key], shaped[name][key])
            assert torch.equal(alone[name][key], other[name][key])


def test_an_entry_that_the_options_ask_for_and_no_donor_has_starts_anew() -> None:
    """Adam's donors were trained without amsgrad, the run is with it."""
    small, wide, op = copies("mlp", (0.5, 0.5))
    state = adam_states(small, 3)
    optimizer = torch.optim.Adam(wide.parameters(), amsgrad=True)
    assert grow_optimizer_state(op, optimizer, [state], dict(wide.named_parameters())) == {}
    step(wide, optimizer, 0)


def test_donors_of_different_age_are_corrected_for_it() -> None:
    """With the step count of the older one, the younger one's moments must mean what they meant."""
    donors, wide = [network(plain, 4, 0), network(plain, 5, 1)], network(plain, 9)
    op = fuse(donors, wide, VECTORS, weights=(0.5, 0.5)).op
    young, old = adam_states(donors[0], 2), adam_states(donors[1], 200)
    carried = grow_optimizer_state(op, torch.optim.Adam(wide.parameters()), [young, old], dict(wide.named_parameters()))
    entry, name = carried["0.weight"], "0.weight"
    assert entry["step"] == 200
    for key, beta, factor in (("exp_avg", 0.9, 0.5), ("exp_avg_sq", 0.999, 0.25)):
        unbiased = entry[key] / (1 - beta**200)
        torch.testing.assert_close(unbiased[:4], factor * young[name][key] / (1 - beta**2))
        torch.testing.assert_close(unbiased[4:], factor * old[name][key] / (1 - beta**200))


def test_adafactors_factors_are_those_of_the_grown_square() -> None:
    _, wide, op = copies("mlp", (0.3, 0.7))
    square = torch.outer(torch.rand(5, generator=SEED), torch.rand(5, generator=SEED)).double()
    rows, columns = square.mean(1, keepdim=True), square.mean(0, keepdim=True)
    state = {"2.weight": {"step": torch.tensor(3.0), "row_var": rows, "col_var": columns}}
    entry = grow_optimizer_state(
        op, torch.optim.Adafactor(wide.parameters()), [state], {"2.weight": wide.get_parameter("2.weight")}
    )["2.weight"]
    expected = grow_moment(op, op.layout.tensors["2.weight"], [square], 2)
    torch.testing.assert_close(entry["row_var"] @ entry["col_var"] / entry["row_var"].mean(), expected)
    assert entry["step"] == 3


def test_nothing_of_the_donors_is_shared() -> None:
    small, wide, op = copies("mlp", (0.5, 0.5))
    state = adam_states(small, 2)
    kept = copy.deepcopy(state)
    carried = grow_optimizer_state(op, torch.optim.Adam(wide.parameters()), [state], dict(wide.named_parameters()))
    for entry in carried.values():
        for value in entry.values():
            value.add_(1)
    for name in kept:
        assert all(torch.equal(kept[name][key], state[name][key]) for key in kept[name])
