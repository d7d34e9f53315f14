"""What a growth does to gradients and steps: T6-T8, and the estimates of when growth pays."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sop.growth import GrowthOp
from lightning_sop.growth.backward_error import (
    dot,
    growth_test,
    igr_rate,
    matched_rates,
    speed_rate,
    split,
    u_statistic,
)
from tests.growth.nets import (
    CASES,
    CLASSES,
    INPUTS,
    Gradients,
    any_weights,
    classify,
    copies,
    fused,
    gradients,
    mlp,
    states,
)


@copies
@any_weights
def test_t6_pulled_back_gradients_of_copies_are_the_small_network_s(case: str, weights: tuple[float, ...]) -> None:
    small, wide, loss, probe, tolerance = CASES[case]
    grown = wide()
    op = fused([small, small], grown, probe, weights=weights)
    (pulled,) = op.pull(gradients(loss(grown), grown), states(small))
    expected = gradients(loss(small), small)
    assert pulled.keys() == expected.keys()
    assert max(float((pulled[name] - expected[name]).abs().max()) for name in expected) < tolerance


def test_t6_pulled_back_gradients_of_different_donors_are_their_ensemble_s() -> None:
    """Not the gradients of their separate losses."""
    donors, weights, grown = [mlp(5, 1), mlp(7, 2), mlp(6, 3)], (0.2, 0.5, 0.3), mlp(18)
    op = fused(donors, grown, weights=weights)
    ensemble = classify(lambda x: sum(w * donor(x) for w, donor in zip(weights, donors, strict=True)))
    pulled = op.pull(gradients(classify(grown), grown), states(*donors))
    for donor, own in zip(donors, pulled, strict=True):
        expected = gradients(ensemble, donor)
        assert max(float((own[name] - expected[name]).abs().max()) for name in expected) < 1e-14
    image, rest = split(op, gradients(classify(grown), grown), states(*donors))
    assert abs(dot(image, rest)) < 1e-17
    torch.testing.assert_close(split(op, image, states(*donors))[0], image, rtol=1e-13, atol=1e-16)


def energies(op: GrowthOp, grown: Gradients, small: Gradients, name: str) -> list[float]:
    """A row of the table: GᵀG, and ‖g_b‖², ‖Pg_b‖² and ‖g_⊥‖² relative to ‖g_s‖²."""
    image, rest = split(op, grown, [small])
    parts = [float(tensors[name].square().sum() / small[name].square().sum()) for tensors in (grown, image, rest)]
    gram = op.gram([small])[0][name]
    assert float(gram.max() - gram.min()) < 1e-15
    return [float(gram.mean()), *parts]


@pytest.mark.parametrize("k", [2, 3])
def test_t7_energies_of_equal_copies(k: int) -> None:
    small, grown = mlp(6, norm=True), mlp(6 * k, norm=True)
    op = fused([small] * k, grown, weights=[1 / k] * k)
    g_s, g_b = gradients(classify(small), small), gradients(classify(grown), grown)
    units, matrix = [k, 1 / k, 1 / k, 0], [k, 1, 1 / k, 1 - 1 / k]
    rows = dict.fromkeys(("0.weight", "0.bias", "1.weight", "1.bias", "3.bias"), units)
    rows |= {"3.weight": matrix, "5.weight": [1 / k, k, k, 0], "5.bias": [1, 1, 1, 0]}
    assert rows.keys() == g_b.keys()
    for name, row in rows.items():
        assert energies(op, g_b, g_s, name) == pytest.approx(row, rel=1e-12, abs=1e-15), name


def test_t7_energies_of_unequal_copies() -> None:
    small, grown, weights = mlp(7), mlp(14), (0.3, 0.7)
    op = fused([small, small], grown, weights=weights)
    g_s, g_b = gradients(classify(small), small), gradients(classify(grown), grown)
    total = sum(w * w for w in weights)
    for name in ("0.weight", "0.bias", "3.bias"):
        assert energies(op, g_b, g_s, name) == pytest.approx([2, total, 1 / 2, (0.3 - 0.7) ** 2 / 2], rel=1e-12), name


@pytest.mark.parametrize("into", ["zero_out", "zero_in", "zero_both"])
def test_t7_energies_of_new_units(into: str) -> None:
    """Old weights keep their gradient; on new ones it is ‖E δ aᵀ‖² going out, or ‖E ∂L/∂p xᵀ‖² coming in."""

    def net(width: int) -> nn.Sequential:
        torch.manual_seed(width)
        return nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 3)).double()

    small, grown = net(7), net(10)
    op = fused([small], grown, widen="new")
    with torch.no_grad():
        if into != "zero_out":
            grown[0].weight[7:], grown[0].bias[7:] = 0, 0
            grown[2].weight[:, 7:] = torch.tensor([[0.3], [-0.1], [0.5]]) if into == "zero_in" else 0
        hidden = torch.tanh(F.linear(INPUTS, grown[0].weight, grown[0].bias))
        delta = (small(INPUTS).softmax(1) - F.one_hot(CLASSES, 3)) / len(INPUTS)
        going_out = delta.T @ hidden[:, 7:]
        coming_in = delta @ grown[2].weight[:, 7:] * (1 - hidden[:, 7:].square())
        expected = {"0.weight": coming_in.T @ INPUTS, "0.bias": coming_in.sum(0), "2.weight": going_out}
    g_s, g_b = gradients(classify(small), small), gradients(classify(grown), grown)
    rest = split(op, g_b, [g_s])[1]
    for name, tensor in g_s.items():
        new = float(expected[name].square().sum() / tensor.square().sum()) if name in expected else 0.0
        assert energies(op, g_b, g_s, name) == pytest.approx([1, 1 + new, 1, new], rel=1e-12, abs=1e-15), name
    zero = {"zero_out": ("0.weight", "0.bias"), "zero_in": ("2.weight",), "zero_both": tuple(expected)}[into]
    for name in expected:
        assert (float(rest[name].norm()) < 1e-16) == (name in zero), name


OPTIMIZERS: dict[str, tuple[float, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (0.01, lambda groups: torch.optim.SGD(groups, momentum=0.9)),
    "adam": (0.003, lambda groups: torch.optim.AdamW(groups, eps=1e-30)),  # not 0: unseen tokens have no gradient
}


def train(net: nn.Module, loss: Callable[..., Tensor], kind: str, rates: Mapping[str, float], steps: int) -> None:
    """Mini-batches of 8 in an order that depends on the step alone, and weight decay at one speed for all."""
    base, make = OPTIMIZERS[kind]
    factors = [rates.get(name, 1.0) for name, _ in net.named_parameters()]
    decays = [{"lr": base * factor, "weight_decay": 0.01 / factor} for factor in factors]
    optimizer = make([{"params": [p], **options} for p, options in zip(net.parameters(), decays, strict=True)])
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net, torch.randint(16, (8,), generator=generator)).backward()
        optimizer.step()


@copies
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_t8_equal_copies_at_matched_rates_train_as_the_small_network(case: str, kind: str) -> None:
    """And at unchanged rates they do not; multipliers (k, 1, 1/k) for SGD and (1, 1/k, 1/k) for Adam."""
    small, wide, loss, probe, _ = CASES[case]
    small, matched, unchanged = copy.deepcopy(small), wide(), wide()
    for grown in (unchanged, matched):
        op = fused([small, small], grown, probe, weights=(0.5, 0.5))
    one_batch = gradients(loss(matched, slice(0, 8)), matched)
    rates = matched_rates(op, states(small), one_batch, optimizer=kind)
    if case == "mlp":
        units, matrix = (2, 1) if kind == "sgd" else (1, 0.5)
        expected = {"0.weight": units, "0.bias": units, "3.weight": matrix, "3.bias": units, "5.weight": 0.5, "5.bias": 1}
        assert rates == pytest.approx(expected, rel=1e-12)
    # A transformer amplifies rounding: two small ones that differ by it are 1e-14 apart after 40 steps, 1e-13 after 60.
    steps = 200 if case.startswith("mlp") else 40
    for net, multipliers in ((small, {}), (matched, rates), (unchanged, {})):
        train(net, loss, kind, multipliers, steps)
    with torch.no_grad():
        reference = small(probe)
        assert float((matched(probe) - reference).abs().max()) < 1e-12
        assert float((unchanged(probe) - reference).abs().max()) > 1e-3


def test_t8_equal_copies_stay_copies_and_unequal_ones_separate() -> None:
    """The rank of the first layer: 7 for ever, or 14."""
    small = mlp(7)
    for weights, rank in (((0.5, 0.5), 7), (None, 14)):
        grown = mlp(14)
        fused([small, small], grown, weights=weights)
        assert torch.linalg.matrix_rank(grown[0].weight, rtol=1e-12) == 7
        train(grown, classify, "sgd", {}, 300)
        assert torch.linalg.matrix_rank(grown[0].weight, rtol=1e-12) == rank
        if rank == 14:
            assert torch.linalg.matrix_rank(grown[0].weight, rtol=1e-4) == rank


def vectors(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{n: torch.randn(4, dtype=torch.float64, generator=generator) + 0.5 for n in "ab"} for _ in range(count)]


def mean_over_pairs(values: Callable[[int, int], float], indices: Sequence[int]) -> float:
    pairs = list(itertools.permutations(indices, 2))
    return sum(values(i, j) for i, j in pairs) / len(pairs)


def jackknife(values: Callable[[int, int], float], count: int) -> float:
    """The definition: leave out one batch at a time, with its row and its column."""
    left_out = [mean_over_pairs(values, [i for i in range(count) if i != without]) for without in range(count)]
    center = sum(left_out) / count
    return math.sqrt((count - 1) / count * sum((value - center) ** 2 for value in left_out))


def test_u_statistic_against_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sop.growth.backward_error._BLOCK", 3)  # tensors of 4 values take two blocks
    batches = vectors(6)
    batches[2].pop("b")  # a parameter that was not used
    found = u_statistic(batches)

    def product(i: int, j: int) -> float:
        return dot(batches[i], batches[j])

    assert pytest.approx(mean_over_pairs(product, range(6)), rel=1e-12) == found.U
    assert found.se == pytest.approx(jackknife(product, 6), rel=1e-12)
    assert pytest.approx(sum(product(i, i) for i in range(6)) / 6, rel=1e-12) == found.B
    assert u_statistic(batches[:2]).se == math.inf
    with pytest.raises(ValueError, match="2 batches or more, not 1"):
        u_statistic(batches[:1])


def test_u_statistic_has_no_bias() -> None:
    """The mean over all draws of 3 batches out of 3, with replacement, is the squared norm of the mean."""
    population = vectors(3)
    mean = {name: sum(batch[name] for batch in population) / 3 for name in "ab"}
    draws = [u_statistic(draw) for draw in itertools.product(population, repeat=3)]
    assert sum(draw.U for draw in draws) / len(draws) == pytest.approx(dot(mean, mean), rel=1e-12)
    assert sum(draw.B for draw in draws) / len(draws) > 1.1 * dot(mean, mean)


def test_growth_test_against_its_definition() -> None:
    small, grown, count = mlp(7), mlp(14), 6
    op = fused([small], grown, widen="new")
    g_s, g_b = ([gradients(classify(net, slice(8 * i, 8 * i + 8)), net) for i in range(count)] for net in (small, grown))
    rest = [split(op, gradient, states(small))[1] for gradient in g_b]
    h, new, phi = 0.1, 0.3, 0.8
    found = growth_test(op, [[g] for g in g_s], g_b, rate=h, new_rate=new, extra_cost=phi)

    def product(i: int, j: int) -> float:
        return new * dot(rest[i], rest[j]) - phi * h * dot(g_s[i], g_s[j])

    assert pytest.approx(mean_over_pairs(product, range(count)), rel=1e-12) == found.T
    assert found.se == pytest.approx(jackknife(product, count), rel=1e-12)
    assert (found.U_s, found.B_s) == pytest.approx((u_statistic(g_s).U, u_statistic(g_s).B), rel=1e-12)
    assert (found.U_b, found.B_b) == pytest.approx((u_statistic(g_b).U, u_statistic(g_b).B), rel=1e-12)
    assert found.U_perp == pytest.approx(u_statistic(rest).U, rel=1e-12)
    assert found.nu == pytest.approx(new * found.U_perp / (h * found.U_s)) and found.phi == phi
    assert (found.T > 0) == (found.nu > phi)
    assert found.pays(found.T / found.se - 0.01) and not found.pays(found.T / found.se + 0.01)
    noise = [[{name: sign * tensor for name, tensor in g_s[0].items()}] for sign in (1, -1)]
    lost = growth_test(op, noise, [g_b[0], g_b[0]], rate=h, new_rate=new, extra_cost=phi)
    assert lost.nu == math.inf and not lost.pays()  # two batches tell no error
    with pytest.raises(ValueError, match="gradients of 5 batches"):
        growth_test(op, [[g] for g in g_s[1:]], g_b, rate=h, new_rate=new, extra_cost=phi)


def test_one_rate_for_the_whole_network() -> None:
    assert speed_rate(0.1, 2.0, 4.0) == igr_rate(0.1, 2.0, 4.0) == pytest.approx(0.05)
    assert speed_rate(0.1, -1.0, 4.0) is None and speed_rate(0.1, 1.0, -4.0) is None and igr_rate(0.1, 0.0, 1.0) is None
