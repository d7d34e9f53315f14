"""FLOPs against numbers by hand; adding up costs, and what has been saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sop.dynamics.cost import CHECKS, GROWTH, VALIDATION, Clock, Ledger, Phase, stage_name
from lightning_sop.dynamics.flops import estimated_flops, flop_counter, flops_of

# ---------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(1, 3, 4), (5, 10, 2)])
def test_a_linear_layer_is_two_flops_a_weight_and_sample(batch: int, inputs: int, outputs: int) -> None:
    layer, data = nn.Linear(inputs, outputs), torch.randn(batch, inputs)
    once = 2 * batch * inputs * outputs
    assert flops_of(lambda: layer(data).sum()) == (2 * once, once)  # backward: the weight's gradient alone
    data.requires_grad_()
    assert flops_of(lambda: layer(data).sum()) == (3 * once, once)
    with torch.no_grad():
        assert flops_of(lambda: layer(data).sum()) == (once, once)


def test_a_network_of_two_layers() -> None:
    network = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 5))
    first, second = 2 * 16 * 80, 2 * 16 * 40
    found = flops_of(lambda: network(torch.randn(16, 10)).sum())
    assert found == (2 * first + 3 * second, first + second)
    assert flops_of(lambda: network(torch.randn(16, 10))[0, 0]).forward == first + second


def test_gradients_can_be_asked_for_where_a_parameter_goes_into_a_module() -> None:
    weight, dropout = nn.Parameter(torch.ones(3, 4)), nn.Dropout(0.0)
    data = torch.randn(5, 4)
    with flop_counter() as counter:
        (gradient,) = torch.autograd.grad((data @ dropout(weight).T).sum(), [weight])
    torch.testing.assert_close(gradient, data.sum(0).expand(3, 4))
    assert counter.get_total_flops() == 2 * 2 * 5 * 4 * 3


def test_a_convolution() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1)
    once = 2 * 2 * 8 * 8 * 4 * 3 * 9
    assert flops_of(lambda: layer(torch.randn(2, 3, 8, 8)).sum()) == (2 * once, once)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_counted_on_the_cpu(causal: bool) -> None:
    """Two products of queries, keys and values; five in the backward of the fused kernels, which compute one again."""
    q = torch.randn(2, 3, 5, 4, requires_grad=True)
    product = 2 * (2 * 3) * 5 * 5 * 4
    found = flops_of(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=causal).sum())
    assert found == ((2 + 5) * product, 2 * product)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(kind: Any, gates: int) -> None:
    layer = kind(4, 6, batch_first=True)
    data = torch.randn(2, 5, 4, requires_grad=True)
    once = 2 * (2 * 5) * gates * 6 * (4 + 6)
    found = flops_of(lambda: layer(data)[0].sum())
    assert found.forward == once
    assert found.total == pytest.approx(3 * once, rel=0.1)  # the first state has no gradient to pass on


def test_an_encoder_layer_is_its_matrices_and_its_attention() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    tokens, weights, product = 3 * 5, 4 * 8 * 8 + 2 * 8 * 16, 2 * (3 * 2) * 5 * 5 * 4
    assert flops_of(lambda: layer(torch.randn(3, 5, 8)).sum()).forward == 2 * tokens * weights + 2 * product


def test_backward_may_be_another_one() -> None:
    layer, seen = nn.Linear(2, 3), []
    flops_of(lambda: layer(torch.randn(4, 2)).sum(), lambda loss: seen.append(loss))
    assert len(seen) == 1 and layer.weight.grad is None
    flops_of(lambda: layer(torch.randn(4, 2)).sum())
    assert layer.weight.grad is not None


def test_what_cannot_be_counted_is_estimated_from_the_size() -> None:
    gain = nn.Parameter(torch.ones(7))
    assert flops_of(lambda: (gain * torch.randn(4, 7)).sum()) == (0, 0)
    assert estimated_flops(7, 4) == (6 * 7 * 4, 2 * 7 * 4)


# ---------------------------------------------------------------------- adding up


def grown_run() -> Ledger:
    """Ten small batches of 100, five of 250 after growth, and two of 500 after another one."""
    ledger = Ledger(factors=[2.5, 2.0])
    for stage, (batches, flops) in enumerate([(10, 100.0), (5, 250.0), (2, 500.0)]):
        for _ in range(batches):
            ledger.add(stage_name(stage), Phase(1, 1, flops, 0.5))
    ledger.add(CHECKS, Phase(flops=300.0, seconds=3.0))
    ledger.add(GROWTH, Phase(flops=50.0, seconds=1.0))
    ledger.add(VALIDATION, Phase(seconds=9.0))
    ledger.donors["a"] = Phase(20, 20, 2000.0, 40.0)
    return ledger


def test_what_was_spent_and_saved() -> None:
    ledger = grown_run()
    trained = 10 * 100 + 5 * 250 + 2 * 500
    assert ledger.stage == 2 and ledger.training() == Phase(17, 17, trained, 8.5)
    assert ledger.spent() == Phase(17, 17, trained + 350, 12.5)
    assert ledger.spent(donors=True).flops == trained + 2350
    assert ledger.reference() == 17 * 500
    assert ledger.saved() == 17 * 500 - trained - 350 and ledger.saved(donors=True) == ledger.saved() - 2000
    assert ledger.share() == (trained + 350) / 8500 and ledger.share(donors=True) == (trained + 2350) / 8500


def test_without_growth_nothing_is_saved() -> None:
    ledger = Ledger()
    assert math.isnan(ledger.share())
    ledger.add(stage_name(0), Phase(2, 4, 400.0, 1.0))
    assert ledger.saved() == 0 and ledger.share() == 1
    assert ledger.metrics() == {"cost/flops": 400.0, "cost/seconds": 1.0, "cost/batches": 4.0}
    growing = ledger.metrics(growing=True)
    assert growing["growth/flops_small"] == 400 and growing["growth/flops_grown"] == 0
    assert not {name for name in growing if "saved" in name or "donors" in name}


def test_metrics() -> None:
    assert grown_run().metrics() == {
        "cost/flops": 3250.0,
        "cost/seconds": 8.5,
        "cost/batches": 17.0,
        "growth/flops_small": 1000.0,
        "growth/flops_grown": 2250.0,
        "growth/flops_checks": 300.0,
        "growth/flops_growth": 50.0,
        "growth/flops_donors": 2000.0,
        "growth/flops_donors_estimated": 0.0,
        "growth/flops_saved": 4900.0,
        "growth/flops_saved_with_donors": 2900.0,
        "growth/seconds_small": 5.0,
        "growth/seconds_grown": 3.5,
        "growth/seconds_checks": 3.0,
        "growth/seconds_growth": 1.0,
        "growth/seconds_donors": 40.0,
    }


def test_what_is_not_known_is_not_logged() -> None:
    ledger = grown_run()
    ledger.donors["b"] = Phase(flops=7.0, seconds=math.nan, estimated=True)
    metrics = ledger.metrics()
    assert "growth/seconds_donors" not in metrics and metrics["growth/flops_donors"] == 2007
    assert metrics["growth/flops_donors_estimated"] == 1
    ledger.donors["c"] = Phase(flops=math.nan)
    metrics = ledger.metrics()
    assert "growth/flops_saved" in metrics and "growth/flops_saved_with_donors" not in metrics
    ledger.factors.append(math.nan)  # it has grown, and what a batch costs now is not known yet
    assert "growth/flops_saved" not in ledger.metrics()
    ledger.add(stage_name(3), Phase(1, 1, math.nan))
    assert "cost/flops" not in ledger.metrics() and ledger.metrics()["cost/batches"] == 18


def test_growing_before_the_first_step_saves_nothing_whatever_it_costs() -> None:
    ledger = Ledger(factors=[math.nan])
    ledger.add(GROWTH, Phase(flops=30.0))
    ledger.add(stage_name(1), Phase(1, 1, 100.0))
    assert ledger.reference() == 100 and ledger.saved() == -30 and ledger.share() == 1.3


def test_two_parts_are_the_whole() -> None:
    whole, first, second = grown_run(), Ledger(factors=[2.5]), Ledger(factors=[math.nan, 2.0], since=12)
    first.add(stage_name(0), whole.phase(stage_name(0)))
    first.add(stage_name(1), Phase(2, 2, 500.0, 1.0))
    second.add(stage_name(1), Phase(3, 3, 750.0, 1.5))
    for name in (stage_name(2), CHECKS, GROWTH, VALIDATION):
        second.add(name, whole.phase(name))
    first.donors = second.donors = whole.donors
    first.merge(second)
    assert first == whole
    with pytest.raises(ValueError, match=r"growth has multiplied the cost by \[2\.5, 2\.0\] and by \[3\.0\]"):
        first.merge(Ledger(factors=[3.0]))


def test_state_is_plain_data_with_a_format(tmp_path: Path) -> None:
    ledger = grown_run()
    torch.save(ledger.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert Ledger.from_state(state) == ledger
    with pytest.raises(ValueError, match="has format 99, not 1"):
        Ledger.from_state({**state, "format": 99})


# ---------------------------------------------------------------------- time


def test_the_clock_gives_each_second_to_one_phase() -> None:
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0, 100.0, 101.0])
    ledger = Ledger()
    clock = Clock(ledger, lambda: next(times))
    clock.enter("too early")  # nothing runs: not even the time is asked for
    clock.leave()
    clock.start("a")  # 0
    clock.lap()  # 1
    with clock.within("b"):  # 3
        clock.enter("c")  # 6
        clock.rename("d")  # 10
        clock.leave()  # 15
    clock.leave()  # 21, and there is no more to leave
    clock.stop()  # 28
    clock.lap()
    assert {name: phase.seconds for name, phase in ledger.phases.items()} == {"a": 3.0, "b": 9.0, "c": 9.0, "d": 7.0}
    clock.start("a")
    clock.stop()
    assert ledger.phase("a").seconds == 4.0


def test_the_clock_goes_on_after_an_error() -> None:
    times = iter(range(10))
    clock = Clock(Ledger(), lambda: float(next(times)))
    clock.start("a")
    with pytest.raises(ZeroDivisionError), clock.within("b"):
        raise ZeroDivisionError
    clock.stop()
    assert clock.ledger.phase("a").seconds == 2 and clock.ledger.phase("b").seconds == 1


def test_counting_leaves_the_values() -> None:
    network, data = nn.Linear(3, 2), torch.randn(4, 3)
    outputs: list[Tensor] = []
    flops_of(lambda: outputs.append(network(data)))
    assert torch.equal(outputs[0], network(data))
