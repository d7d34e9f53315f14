"""When the schedule grows, on the toy, and what it costs."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lightning_sop.growth import BackwardErrorSchedule, Evidence, Laboratory, Moment
from lightning_sop.growth.advisor import Trial
from lightning_sop.growth.backward_error import dot
from tests.growth.nets import gradients
from tests.growth.toy import (
    EVERY,
    LR,
    TOTAL,
    Counting,
    Toy,
    by_copies,
    by_new_units,
    data,
    mean_square,
    tanh_net,
    teacher,
)

# torch compiles something of its own at the first forward derivative of a process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def test_the_toy_grows_at_the_plateau_and_within_its_cost() -> None:
    schedule = Counting(every=EVERY, batches=4)
    toy = Toy(schedule, tanh_net(4, 1))
    grew = toy.run()
    assert grew is not None and 2500 < grew < 5000
    learning = [evidence for step, evidence in toy.found.items() if step < 2500]
    assert len(learning) >= 3 and all(e.nu < 3 and not e.steps for e in learning)
    last = toy.found[grew]
    assert last.grow and last.nu > 1.3 * last.phi and last.T > 0 and last.phi == pytest.approx(2, abs=0.01)
    assert last.gain > 1.3 and last.grown_decrease > 1.3 * (1 + last.phi) * last.small_decrease > 0 and last.steps == 20
    # What the small network still had in front of it is small, and what growth brings is not.
    assert toy.losses[-1] < 0.02 * toy.losses[0]
    plain = Toy(schedule, copy.deepcopy(toy.net))
    wide = Toy(schedule, by_new_units(copy.deepcopy(toy.net)).network)
    for after in (plain, wide):
        after.schedule = BackwardErrorSchedule(min_steps=10**9)
        after.run(0, 3000)
    assert plain.losses[-1] > 0.9 * toy.losses[-1] and wide.losses[-1] < 0.5 * toy.losses[-1]
    assert 0 < schedule.actual <= schedule.spent * (1 + 1e-9)
    assert schedule.spent <= 0.03 * toy.planned and schedule.spent < 1.1 * schedule.actual


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_the_toy_grows_with_other_optimizers(kind: str) -> None:
    make = {
        "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.003),
    }
    toy = Toy(BackwardErrorSchedule(every=EVERY, batches=4), tanh_net(4, 1), make=make[kind])
    grew = toy.run(stop=6000)
    assert grew is not None and toy.found[grew].gain > 1.5
    assert toy.losses[-1] < 0.02 and toy.losses[grew - 500] - toy.losses[-1] < 0.2 * toy.losses[-1]


def test_quiet_where_the_student_fits() -> None:
    """Its gradients are noise: of the targets, or nothing at all."""
    for noise, total in ((0.1, TOTAL), (0.0, 12_000)):
        toy = Toy(Counting(), teacher(), total=total, size=128, noise=noise)
        assert toy.run() is None and toy.found
        assert all(not e.grow and (not e.steps or not e.gain > 1) for e in toy.found.values())
        assert toy.schedule.actual <= toy.schedule.spent * (1 + 1e-9) <= 0.03 * toy.planned  # type: ignore[attr-defined]


def test_quiet_where_little_of_the_run_is_left() -> None:
    """At the plateau, where it would grow otherwise; and it stays so."""
    toy = Toy(Counting(every=EVERY, batches=4), tanh_net(4, 1))
    toy.run(stop=200)
    toy.schedule = Counting(every=EVERY, batches=4, min_steps=TOTAL - 100)
    assert toy.run(TOTAL - 150) is None and not toy.found
    assert toy.schedule.actual <= 0.001 * toy.planned  # type: ignore[attr-defined]
    assert toy.schedule.wants(Moment(TOTAL - 1, TOTAL)) == 0


@pytest.mark.parametrize("total", [100, 700, 1500])
def test_a_run_too_short_for_a_decision_is_left_alone_within_the_cost(total: int) -> None:
    toy = Toy(Counting(every=20, horizon=0), tanh_net(4, 1), total=total)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert toy.run() is None and not toy.found
    assert ["allows no decision" in str(w.message) for w in caught] == [True]
    assert toy.schedule.actual <= 0.03 * toy.planned  # type: ignore[attr-defined]


def test_budget_shortens_what_it_cannot_pay() -> None:
    """Of runs of any length no more than 3 % goes into checks."""
    for total in (2500, 4000, 8000):
        toy = Toy(Counting(every=50, z=0.0, patience=1), tanh_net(4, 1), total=total)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            toy.run()
        assert toy.schedule.actual <= toy.schedule.spent * (1 + 1e-9) <= 0.03 * toy.planned  # type: ignore[attr-defined]
        assert all(8 <= e.batches < 32 for e in toy.found.values())


def test_copies_are_decided_by_the_rollout_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(BackwardErrorSchedule(every=EVERY, batches=8, min_steps=500), tanh_net(4, 1), grow=by_copies)
    assert toy.run() is None
    (evidence,) = toy.found.values()
    assert evidence.duplication and evidence.nu == 0 and evidence.trap < 1e-12 and evidence.steps == 100
    assert not evidence.gain > 1 and evidence.U_perp > 0  # a new part of the gradient without new directions
    pays = torch.ones(2, dtype=torch.float64)
    monkeypatch.setattr(Trial, "rollout", lambda self, steps: (pays, 3 * pays))
    again = Toy(BackwardErrorSchedule(every=EVERY, batches=8, min_steps=500), tanh_net(4, 1), grow=by_copies)
    grew = again.run()
    assert grew == next(iter(toy.found)) and again.found[grew].gain == pytest.approx(3 / (1 + evidence.phi))


def test_the_state_is_plain_and_goes_on() -> None:
    full = Toy(BackwardErrorSchedule(every=EVERY, batches=4), tanh_net(4, 1))
    grew = full.run()
    assert grew is not None
    part = Toy(BackwardErrorSchedule(every=EVERY, batches=4), tanh_net(4, 1))
    steps = sorted(full.found)
    for start, stop in itertools.pairwise([0, 300, steps[0] - 10, steps[-2] + 5, TOTAL]):
        state = json.loads(json.dumps(part.schedule.state_dict()))
        part.schedule = BackwardErrorSchedule(every=EVERY, batches=4)
        part.schedule.load_state_dict(state)
        ended = part.run(start, stop)
    assert ended == grew and part.found == full.found
    again = BackwardErrorSchedule()
    again.load_state_dict(part.schedule.state_dict())
    assert again.due(Moment(grew, TOTAL)) and again.wants(Moment(grew, TOTAL)) == 0 and again.spent == full.schedule.spent


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a whole number, 1 or more, not 0"),
        ({"batches": 3}, "batches must be a whole number, 4 or more"),
        ({"patience": True}, "patience must be a whole number"),
        ({"rollout": 2.5}, "rollout must be a whole number"),
        ({"min_steps": -1}, "min_steps must be a whole number, 0 or more"),
        ({"cost": 0}, r"cost must be in \(0, 1\]"),
        ({"horizon": float("inf")}, "horizon must be a number"),
        ({"z": -1.0}, "z must be a number"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BackwardErrorSchedule(**options)


def test_the_length_of_the_run_must_be_known() -> None:
    with pytest.raises(ValueError, match="needs to know the length of the run"):
        BackwardErrorSchedule().wants(Moment(0))


def test_metrics_are_what_was_measured() -> None:
    metrics = Evidence(nu=2.0, phi=1.0, flops=3.0).metrics()
    assert metrics["growth/nu"] == 2 and metrics["growth/flops"] == 3 and "growth/gain" not in metrics


def rank(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)

    def mean(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor / 2

    net = tanh_net(4, 1)
    inputs, targets = data(0.5)
    schedule = BackwardErrorSchedule(every=1000, batches=8, patience=1, z=0, horizon=0, cost=1.0)
    batches = [(inputs[i : i + 16], targets[i : i + 16]) for i in range(128 * number, 128 * number + 128, 16)]
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    found = [
        schedule.consider(Laboratory(net, by_new_units, mean_square, batches, [optimizer], mean=mean), Moment(step, 10**5))
        for step in (1000, 2000, 3000)
    ]
    alone = BackwardErrorSchedule(every=1000, batches=8, patience=1, z=0, horizon=0, cost=1.0)
    own = alone.consider(Laboratory(net, by_new_units, mean_square, batches, [optimizer]), Moment(1000, 10**5))
    torch.save(
        {"found": [vars(e) for e in found if e], "state": schedule.state_dict(), "own": vars(own)}, f"{folder}/{number}"
    )
    dist.destroy_process_group()


def test_ranks_decide_alike(tmp_path: Path) -> None:
    mp.start_processes(rank, (str(tmp_path),), nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / str(number)) for number in (0, 1))
    assert one["found"] and str(one["found"]) == str(two["found"]) and one["state"] == two["state"]
    assert one["own"]["U_s"] != two["own"]["U_s"]  # each has its own data
    net = tanh_net(4, 1)
    inputs, targets = data(0.5)
    both = [[(inputs[i : i + 16], targets[i : i + 16]) for i in range(s, s + 128, 16)] for s in (0, 128)]
    each = [[gradients(mean_square(net, batch), net) for batch in batches] for batches in both]
    means = [{n: (a[n] + b[n]) / 2 for n in a} for a, b in zip(*each, strict=True)]
    pairs = [dot(a, b) for a, b in itertools.permutations(means, 2)]
    assert one["found"][0]["U_s"] == pytest.approx(sum(pairs) / len(pairs))
