"""When growth pays: trials on copies against independent computations, and the schedule on the toy of §8.7."""

from __future__ import annotations

import copy
import itertools
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_sop.growth import BackwardErrorSchedule, Evidence, Growth, Laboratory, Moment, fuse
from lightning_sop.growth.advisor import Trial
from lightning_sop.growth.backward_error import dot
from tests.callbacks.helpers import same_tensors
from tests.growth.nets import gradients

# torch compiles something of its own at the first forward derivative of a process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

TOTAL, EVERY, LR = 20_000, 250, 0.1
Batch = tuple[Tensor, Tensor]


def tanh_net(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1)).double()


def teacher() -> nn.Sequential:
    net = tanh_net(12, 0)
    with torch.no_grad():
        net[0].weight.mul_(3)
        net[2].weight.mul_(2)
    return net


def data(noise: float = 0.0) -> Batch:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return inputs, teacher()(inputs) + noise * torch.randn(512, 1, generator=generator, dtype=torch.float64)


def mean_square(network: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(network(batch[0]), batch[1])


def by_new_units(small: nn.Module) -> Growth:
    grown = tanh_net(3 * small[0].out_features, 5)
    probe = data()[0][:256]
    return Growth(fuse([small], grown, probe, widen="new"), grown, probe=probe)


def by_copies(small: nn.Module) -> Growth:
    grown = tanh_net(2 * small[0].out_features, 5)
    probe = data()[0][:256]
    return Growth(fuse([small, small], grown, probe), grown, probe=probe)


class Toy:
    """A plain training loop with a schedule; ``found`` is what it has measured, ``measured`` the FLOPs of all that."""

    def __init__(
        self,
        schedule: BackwardErrorSchedule,
        net: nn.Module,
        *,
        total: int = TOTAL,
        make: Callable[..., torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=LR),
        grow: Callable[[nn.Module], Growth] = by_new_units,
        size: int = 512,
        noise: float = 0.0,
    ) -> None:
        self.schedule, self.net, self.total, self.grow, self.size = schedule, net, total, grow, size
        self.optimizer = make(net.parameters())
        self.inputs, self.targets = data(noise)
        self.generator = torch.Generator().manual_seed(1)
        self.found: dict[int, Evidence] = {}
        self.losses: list[float] = []
        self.kept: list[Batch] = []
        self.measured = 0

    def run(self, start: int = 0, stop: int | None = None) -> int | None:
        """The step at which it grows, or None."""
        for step in range(start, self.total if stop is None else stop):
            moment = Moment(step, self.total)
            wanted = self.schedule.wants(moment)
            self.kept = self.kept[-wanted:] if wanted else []
            if wanted:
                laboratory = Laboratory(self.net, self.grow, mean_square, self.kept, [self.optimizer])
                evidence = self.schedule.consider(laboratory, moment)
                if evidence is not None:
                    self.found[step] = evidence
                if self.schedule.due(moment):
                    return step
            batch = self.batch()
            if wanted:
                self.kept.append(batch)
            self.optimizer.zero_grad()
            loss = mean_square(self.net, batch)
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())
        return None

    def batch(self) -> Batch:
        if self.size == 512:
            return self.inputs, self.targets
        rows = torch.randint(512, (self.size,), generator=self.generator)
        return self.inputs[rows], self.targets[rows]

    @property
    def planned(self) -> float:
        with FlopCounterMode(display=False) as counter:
            mean_square(self.net, self.batch()).backward()
        self.optimizer.zero_grad()
        return float(counter.get_total_flops() * self.total)


class Counting(BackwardErrorSchedule):
    """Also counts the FLOPs of its checks from outside."""

    actual = 0.0

    def consider(self, laboratory: Laboratory, moment: Moment) -> Evidence | None:
        with FlopCounterMode(display=False) as counter:
            evidence = super().consider(laboratory, moment)
        self.actual += counter.get_total_flops()
        return evidence


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


def test_noise_between_copies_is_something_new() -> None:
    def noisy(small: nn.Module) -> Growth:
        grown = tanh_net(8, 5)
        return Growth(fuse([small, small], grown, data()[0], off_diagonal=0.1), grown)

    def two_layers(small: nn.Module) -> Growth:
        big = deep(14)
        return Growth(fuse([small, small], big, torch.ones(4, 3).double(), off_diagonal=0.1), big)

    def deep(width: int) -> nn.Sequential:
        torch.manual_seed(0)
        layers = (nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        return nn.Sequential(*layers).double()

    assert trial_of(tanh_net(4, 1), noisy).duplication  # one layer has nothing between copies
    batches = [(torch.ones(4, 3).double(), torch.ones(4, 1).double())] * 4
    assert not trial_of(deep(7), two_layers, batches).duplication
    assert not trial_of(tanh_net(4, 1), by_new_units).duplication


def trial_of(
    net: nn.Module,
    grow: Callable[[nn.Module], Growth],
    batches: list[Batch] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> Trial:
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=LR)
    trial = Trial(Laboratory(net, grow, mean_square, batches or [data()] * 4, [optimizer], **options))
    trial.measure_grown()
    return trial


def test_evidence_of_a_linear_network_by_hand() -> None:
    """f = v W x: new units bring the gradient 2 E r W' x on their outgoing weights, and the FLOPs go with the width."""

    def linear(width: int) -> nn.Sequential:
        torch.manual_seed(width)
        return nn.Sequential(nn.Linear(3, width, bias=False), nn.Linear(width, 1, bias=False)).double()

    inputs = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = inputs[:, :1] ** 2
    small, made = linear(2), []

    def grow(network: nn.Module) -> Growth:
        made.append(linear(5))
        return Growth(fuse([network], made[-1], inputs, widen="new"), made[-1], probe=inputs)

    trial = trial_of(small, grow, [(inputs, targets)] * 4)
    evidence = trial.first_order(4, 0.5)
    with torch.no_grad():
        w, v, more = small[0].weight, small[1].weight, made[0][0].weight[2:]
        residual = inputs @ w.T @ v.T - targets
        on_w, on_v = v.T @ (2 * residual * inputs).mean(0)[None], (2 * residual * (inputs @ w.T)).mean(0)
        on_new = (2 * residual * (inputs @ more.T)).mean(0)
    u_small, u_new = float(on_w.square().sum() + on_v.square().sum()), float(on_new.square().sum())
    assert pytest.approx(u_small) == evidence.U_s and evidence.U_perp == pytest.approx(u_new)
    assert pytest.approx(u_small) == evidence.B_s and evidence.B_b == pytest.approx(u_small + u_new)
    assert evidence.nu == pytest.approx(0.5 * u_new / u_small) and evidence.phi == pytest.approx(5 / 2 - 1)
    assert pytest.approx(LR * (0.5 * u_new - 1.5 * u_small)) == evidence.T and evidence.se == pytest.approx(0, abs=1e-15)
    assert evidence.small_flops == 18 * 40 * 2  # W, v: forward and own gradients 2·(8 n w); the hidden gradient 2 n w
    assert (evidence.rate, evidence.new_rate) == (LR, LR / 2)
    assert (evidence.speed_rate, evidence.igr_rate) == pytest.approx((LR * u_small / (u_small + u_new),) * 2)
    assert 0 < trial.trap() <= 1


def test_statistics_over_different_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pair by pair; groups of batches, where not all gradients can be held, leave the mean over batches in B."""
    inputs, targets = data(0.3)
    batches = [(inputs[i : i + 32], targets[i : i + 32]) for i in range(0, 512, 32)]
    net = tanh_net(4, 1)
    found = trial_of(net, by_new_units, batches).first_order(16, 1.0)
    each = [gradients(mean_square(net, batch), net) for batch in batches]
    pairs = [dot(a, b) for a, b in itertools.permutations(each, 2)]
    assert pytest.approx(sum(pairs) / len(pairs)) == found.U_s
    assert pytest.approx(sum(dot(g, g) for g in each) / 16) == found.B_s
    monkeypatch.setattr("lightning_sop.growth.advisor._HELD", 0)
    grouped = trial_of(net, by_new_units, batches).first_order(16, 1.0)
    means = [{n: (a[n] + b[n]) / 2 for n in a} for a, b in zip(each[::2], each[1::2], strict=True)]
    pairs = [dot(a, b) for a, b in itertools.permutations(means, 2)]
    assert pytest.approx(sum(pairs) / len(pairs)) == grouped.U_s
    assert grouped.B_s == pytest.approx(found.B_s) and grouped.batches == 16


def test_adam_is_measured_by_its_own_steps() -> None:
    net = tanh_net(4, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        mean_square(net, data()).backward()
        optimizer.step()
    found = trial_of(net, by_new_units, optimizer=optimizer).first_order(4, 1.0)
    expected = 0.0
    for parameter, gradient in zip(net.parameters(), gradients(mean_square(net, data()), net).values(), strict=True):
        moment = optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.999**5)
        expected += float((gradient.square() / (moment.sqrt() + 1e-8)).sum())
    assert pytest.approx(expected, rel=1e-6) == found.U_s


@pytest.mark.parametrize("grow", [by_new_units, by_copies])
def test_rollout_against_a_direct_simulation(grow: Callable[[nn.Module], Growth]) -> None:
    """Momentum carried over, rates matched: for new units those of before, for copies of unequal weight 1/Σλ², and so on."""
    inputs, targets = data()
    batches = [(inputs[i : i + 64], targets[i : i + 64]) for i in range(0, 512, 64)]
    net = tanh_net(4, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad()
        mean_square(net, batch).backward()
        optimizer.step()
    trial = trial_of(net, grow, batches, optimizer)
    trial.first_order(4, 1.0)
    small, grown = trial.rollout(10)
    start = [mean_square(net, batch).item() for batch in batches[6:]]

    growth, share = grow(copy.deepcopy(net)), (0.3, 0.7)
    memory = {name: optimizer.state[p]["momentum_buffer"] for name, p in net.named_parameters()}
    factors = dict.fromkeys(memory, 1.0)
    wide_memory: dict[str, Tensor] = {}
    for name, parameter in growth.network.named_parameters():
        wide_memory[name] = torch.zeros_like(parameter)
        if grow is by_new_units:
            place = tuple(slice(0, size) for size in memory[name].shape)
            wide_memory[name][place] = memory[name]
    if grow is by_copies:
        for name in ("0.weight", "0.bias"):
            wide_memory[name] = torch.cat([part * memory[name] for part in share])
            factors[name] = 1 / sum(part * part for part in share)
        wide_memory["2.weight"], wide_memory["2.bias"] = memory["2.weight"].repeat(1, 2), memory["2.bias"]
        factors["2.weight"] = 0.5
    assert trial.multipliers == pytest.approx(factors, rel=1e-6)
    expected = []
    for network, held, rates in ((copy.deepcopy(net), memory, {}), (growth.network, wide_memory, factors)):
        held = {name: tensor.clone() for name, tensor in held.items()}
        for step in range(10):
            found = gradients(mean_square(network, batches[step % 6]), network)
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    held[name] = 0.9 * held[name] + found[name]
                    parameter -= 0.02 * rates.get(name, 1.0) * held[name]
        expected.append([b - mean_square(network, batch).item() for b, batch in zip(start, batches[6:], strict=True)])
    assert small.tolist() == pytest.approx(expected[0], rel=1e-9) and grown.tolist() == pytest.approx(expected[1], rel=1e-6)


def test_a_check_changes_nothing_of_the_run() -> None:
    """Weights, buffers, gradients, optimizer, modes and random states, of a network with dropout and BatchNorm."""

    def normed(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(8, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.5), nn.Linear(width, 1)
        ).double()

    torch.manual_seed(0)
    net = normed(4)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # counts the optimizer's steps
    mean_square(net, data()).backward()
    optimizer.step()

    def grow(small: nn.Module) -> Growth:
        torch.rand(3), random.random(), np.random.rand()
        grown = normed(8)
        return Growth(fuse([small, small], grown, data()[0]), grown, probe=data()[0])

    def everything() -> Any:
        gradient = [p.grad.clone() for p in net.parameters()]
        modes = [module.training for module in net.modules()]
        randomness = [torch.get_rng_state().clone(), str(random.getstate()), str(np.random.get_state())]
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        tensors = copy.deepcopy([dict(net.state_dict()), optimizer.state_dict()["state"]])
        return [tensors, gradient, modes, randomness, options, held, optimizer._opt_called]  # type: ignore[attr-defined]

    batches = [tuple(t.clone() for t in data()) for _ in range(4)]
    before = everything()
    schedule = BackwardErrorSchedule(every=1000, min_steps=1, batches=4, horizon=0, cost=1.0)
    evidence = schedule.consider(Laboratory(net, grow, mean_square, batches, [optimizer]), Moment(1, 3000))
    assert evidence is not None and evidence.duplication and evidence.steps == 100
    assert same_tensors(everything(), before)
    assert same_tensors(batches, [data()] * 4)


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
        part.kept = []
        ended = part.run(start, stop)
    assert ended == grew and part.found == full.found
    again = BackwardErrorSchedule()
    again.load_state_dict(part.schedule.state_dict())
    assert again.due(Moment(grew, TOTAL)) and again.wants(Moment(grew, TOTAL)) == 0 and again.spent == full.schedule.spent


def test_after_resuming_a_check_waits_for_its_batches() -> None:
    toy = Toy(BackwardErrorSchedule(every=EVERY, batches=4, cost=1.0), tanh_net(4, 1))
    toy.run(0, EVERY - 1)
    toy.kept = []
    toy.run(EVERY - 1, EVERY + 10)
    assert next(iter(toy.found)) == EVERY - 1 + 4


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
