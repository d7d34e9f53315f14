"""Trying a growth out on copies: whether the next FLOPs are better spent on the grown network or on the small one.

A :class:`~lightning_sop.growth.evidence.Laboratory` says what a run offers for it, a :class:`Trial` measures. Nothing of the
run is changed: networks and optimizers are copied, random states are put back. When to measure, and what follows, is for the
schedule (:class:`~lightning_sop.growth.backward_error_schedule.BackwardErrorSchedule`). Derived for this package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_sop.deploy.replay import isolated_random_state, map_tensors, tensors_in
from lightning_sop.dynamics.flops import estimated_flops, flop_counter
from lightning_sop.growth.backward_error import igr_rate, speed_rate, split
from lightning_sop.growth.backward_error import mean_over_pairs as mean_over_pairs
from lightning_sop.growth.evidence import Evidence, Laboratory, held_out
from lightning_sop.growth.fuse import as_calls
from lightning_sop.growth.metric import Sizes, mean_of, mean_rate, products, products_of_sources, step_sizes, trap_within
from lightning_sop.growth.optimizers import plain_name
from lightning_sop.growth.probe import quiet_
from lightning_sop.growth.rates import rates_by_tensor
from lightning_sop.growth.rollout import grown_optimizers, train, trainable, twin_optimizers
from lightning_sop.growth.warm_up import WarmUp, boosts_of

State = dict[str, Tensor]
_HELD = 2**30  # bytes of gradients that are kept at once, if these are 8 or more


class Trial:
    """One growth tried out: the copies, and what is measured on them. ``flops`` counts what that takes.

    Attributes:
        small_flops: of forward and backward of one batch, the mean over ranks; ``small_forward``: of the forward alone.
        grown_flops: the same of the grown network, as ``grown_forward``; 0 before :meth:`measure_grown`.
        multipliers: of the learning rates after growth, by name; from :meth:`first_order`.
    """

    def __init__(self, laboratory: Laboratory) -> None:
        self.laboratory = laboratory
        self.flops = 0.0
        self.grown_flops = self.grown_forward = 0.0
        self.small = laboratory.duplicate(laboratory.small)
        self.small.zero_grad(set_to_none=True)
        live = {plain_name(name): p for name, p in laboratory.small.named_parameters()}
        twins = {live[name]: p for name, p in self.small.named_parameters() if name in live}
        self._optimizers = twin_optimizers(laboratory.optimizers, twins)
        quiet_(self.small)
        # The last batch of an epoch may be smaller: the largest one tells the cost, and its gradients come first.
        sizes = [sum(tensor.numel() for tensor in tensors_in(batch)) for batch in laboratory.batches]
        first, batches = sizes.index(max(sizes)), laboratory.batches
        self._batches = [batches[first], *batches[:first], *batches[first + 1 :]]
        self._known: dict[int, State] = {}
        self.small_flops, self.small_forward = self._measure(self.small)
        with isolated_random_state(), flop_counter() as counter:
            self.growth = laboratory.grow(self.small)
        self.grown = self.growth.network
        self.sources = list(self.growth.sources) or [self.small]
        (self.build_flops,) = self._mean([float(counter.get_total_flops())])
        self.flops += self.build_flops
        self._grown_optimizers = grown_optimizers(
            self.growth.fusion.op, self._optimizers, self.small, self.grown, self.growth.remembered
        )
        quiet_(self.small)
        quiet_(self.grown)
        self.multipliers: dict[str, float] = {}
        self._boosts: dict[str, float] = {}

    @property
    def duplication(self) -> bool:
        """Whether the grown network is made of copies of one network and of nothing else."""
        op, grown = self.growth.fusion.op, dict(self.grown.named_parameters())
        if self._foreign:
            return False
        pushed = op.push([dict(self.small.named_parameters())], grown)
        axes = [axis for tensor in op.layout.tensors.values() for axis in tensor.axes if axis is not None]
        return all(not len(axis.new) for axis in axes) and all(
            name in pushed and torch.equal(pushed[name], tensor) for name, tensor in grown.items()
        )

    def guessed_flops(self) -> float:
        """What :meth:`measure_grown` will take, about, from the numbers of weights."""
        small, grown = (sum(p.numel() for p in network.parameters()) for network in (self.small, self.grown))
        return 1.5 * self.small_flops * grown / small

    def measure_grown(self) -> None:
        """The cost of a batch in the grown network."""
        self.grown_flops, self.grown_forward = self._measure(self.grown)

    def _measure(self, network: nn.Module) -> list[float]:
        with flop_counter() as counter:
            self._known[id(network)] = self.gradient(network, self._batches[0], counter)
        counts = [float(counter.get_total_flops()), self._forward]
        if not all(counts):  # operations that are not counted: the number of weights stands for them
            counts = list(estimated_flops(sum(p.numel() for p in network.parameters())))
        counts = self._mean(counts)
        self.flops += counts[0]
        return counts

    def gradient(self, network: nn.Module, batch: Any, counter: FlopCounterMode | None = None) -> State:
        """The gradient of the loss by name, the mean over ranks; every call draws the same random numbers, if any."""
        named = trainable(network)
        with isolated_random_state(), torch.enable_grad():
            loss = self.laboratory.loss(network, map_tensors(torch.Tensor.clone, batch))
            if counter is not None:
                self._forward = float(counter.get_total_flops())
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
        values = [(value.to_dense() if value.is_sparse else value).detach() for value in found]
        if self.laboratory.mean is not None:  # in one piece
            flat = self.laboratory.mean(torch.cat([value.reshape(-1) for value in values]))
            pieces = torch.split(flat, [value.numel() for value in values])
            values = [piece.view_as(value).to(value.dtype) for piece, value in zip(pieces, values, strict=True)]
        return dict(zip(named, values, strict=True))

    def statistics_flops(self, number: int) -> float:
        """What the inner products of gradients on so many batches take."""
        groups = self._groups(number)
        networks = (self.small, self.grown, *self.sources)
        small, grown, *sources = (sum(p.numel() for p in trainable(network).values()) for network in networks)
        return 2.0 * (groups**2 * (small + 2 * grown + self._foreign * sum(sources)) + number * (small + grown))

    def trap_flops(self) -> float:
        """About what the trap test takes: a forward derivative (three forwards) for every tensor of the sources."""
        return 3 * (sum(len(trainable(source)) for source in self.sources) * self.small_forward + self.grown_forward)

    def first_order(self, number: int, new_rate: float) -> Evidence:
        """Gradients of both networks on ``number`` batches, and what they say; sets ``multipliers``.

        Args:
            number: of batches, 2 or more.
            new_rate: h_⊥ relative to the rate that a new value's tensor has after growth.
        """
        lab, op = self.laboratory, self.growth.fusion.op
        rate = mean_rate(self._optimizers, self.small, lab.factors)
        here = step_sizes(self._optimizers, self.small, lab.factors)
        there = step_sizes(self._grown_optimizers, self.grown, lab.factors)
        small, b_small = self._gradients(self.small, here, number, "gradients of the small network")
        grown, b_grown = self._gradients(self.grown, there, number, "gradients of the grown network")
        states = [dict(source.named_parameters()) for source in self.sources]
        self._grown_mean = mean_of(grown)
        duplication = self.duplication
        self.multipliers = self._multipliers(states, duplication)
        parts = [split(op, gradient, states) for gradient in grown]
        opened = {name: size * self.multipliers.get(name, 1.0) for name, size in there.items()}
        own, wide, rest = products(small, here), products(grown, there), products([part[1] for part in parts], opened)
        phi = self.grown_flops / self.small_flops - 1
        gain = new_rate * rest - phi * own
        if self._foreign:  # the ensemble learns at a speed of its own
            gain += products_of_sources([op.pull(gradient, states) for gradient in grown], here) - own
        u_small, u_grown, u_rest = (_over(mean_over_pairs(p)[0], rate) for p in (own, wide, rest))
        value, error = mean_over_pairs(gain)
        self.flops += self.statistics_flops(number)
        nu = new_rate * u_rest / u_small if u_small > 0 else math.inf if u_rest > 0 else math.nan
        b_small, b_grown = _over(b_small, rate), _over(b_grown, rate)
        return Evidence(
            nu=0.0 if duplication else nu,
            phi=phi,
            T=value,
            se=error,
            U_s=u_small,
            U_b=u_grown,
            U_perp=u_rest,
            B_s=b_small,
            B_b=b_grown,
            rate=rate,
            new_rate=new_rate * rate,
            speed_rate=_or_nan(speed_rate(rate, u_small, u_grown)),
            igr_rate=_or_nan(igr_rate(rate, b_small, b_grown)),
            batches=number,
            small_flops=self.small_flops,
            grown_flops=self.grown_flops,
            duplication=duplication,
        )

    def trap(self) -> float:
        """The trap test at the mean gradients of :meth:`first_order`; NaN where it cannot be made."""
        if self.growth.probe is None:
            return math.nan
        pulled = self.growth.fusion.op.pull(self._grown_mean, [dict(s.named_parameters()) for s in self.sources])
        with flop_counter() as counter:
            found = trap_within(self.grown, self._grown_mean, self.sources, pulled, as_calls(self.growth.probe))
        quiet_(self.small)
        quiet_(self.grown)
        found, flops = self._mean([found, float(counter.get_total_flops())])
        self.flops += flops
        return found

    def rollout_flops(self, steps: int) -> float:
        """What :meth:`rollout` takes."""
        held = len(self._held_out) * (2 * self.small_forward + self.grown_forward)
        return steps * (self.small_flops + self.grown_flops) + held

    def rollout(self, steps: int) -> tuple[Tensor, Tensor]:
        """Train both networks, which is their end, on the same batches, and compare them on others.

        Args:
            steps: of each.

        Returns:
            By how much the loss has decreased on each held-out batch, (held out,) float64: small, grown. The grown
            network's decrease is from the small one's loss.
        """
        lab, held = self.laboratory, self._held_out
        batches = lab.batches if lab.held_out else lab.batches[: -len(held)] or lab.batches
        before, after = self._losses(self.small, held), []
        changed = {name: lab.factors.get(name, 1.0) * f for name, f in self.multipliers.items()}
        warm_up = WarmUp.after(self.growth.fusion.op, lab.warm_up, self._boosts) if lab.warm_up else None
        small = ("small", self.small, self._optimizers, lab.factors, None)
        grown = ("grown", self.grown, self._grown_optimizers, {**lab.factors, **changed}, warm_up)
        for what, network, optimizers, factors, opening in (small, grown):
            run = train(network, optimizers, self.gradient, batches, steps, lab.clip, factors=factors, warm_up=opening)
            for done in run:
                lab.progress(f"rollout of the {what} network", done, steps)
            after.append(self._losses(network, held))
        self.flops += self.rollout_flops(steps)
        return before - after[0], before - after[1]

    @property
    def _held_out(self) -> Sequence[Any]:
        batches = self.laboratory.batches
        return self.laboratory.held_out or batches[-held_out(len(batches)) :]

    def _losses(self, network: nn.Module, batches: Sequence[Any]) -> Tensor:
        losses = []
        for batch in batches:
            with torch.no_grad(), isolated_random_state():
                losses.append(float(self.laboratory.loss(network, map_tensors(torch.Tensor.clone, batch))))
        return torch.tensor(self._mean(losses), dtype=torch.float64)

    def _gradients(self, network: nn.Module, sizes: Sizes, number: int, what: str) -> tuple[list[State], float]:
        """Means of groups of batches, as many as may be held, and the mean of gᵀDg over batches."""
        groups = self._groups(number)
        sums: list[State] = [{} for _ in range(groups)]
        counts = [0] * groups
        square = 0.0
        for index, batch in enumerate(self._batches[:number]):
            known = self._known.pop(id(network), None)
            gradient = self.gradient(network, batch) if known is None else known
            if known is None:
                self.flops += self.small_flops if network is self.small else self.grown_flops
            square += float(products([gradient], sizes)) / number
            group = index * groups // number
            counts[group] += 1
            sums[group] = {n: sums[group][n].add_(g) if n in sums[group] else g.clone() for n, g in gradient.items()}
            self.laboratory.progress(what, index + 1, number)
        return [{n: t / count for n, t in total.items()} for total, count in zip(sums, counts, strict=True)], square

    def _groups(self, number: int) -> int:
        held = _HELD // sum(p.numel() * p.element_size() for p in self.grown.parameters())
        return min(number, max(8, held))

    @property
    def _foreign(self) -> bool:
        """Whether other networks than the small one come in."""
        return self.growth.fusion.op.number_of_sources > 1 or self.sources != [self.small]

    def _multipliers(self, states: Sequence[Mapping[str, Tensor]], duplication: bool) -> dict[str, float]:
        """Of the learning rates after growth.

        Where new features come in, it is the gradient in the image of G that keeps its speed: if the whole gradient did, the
        tensors with new features would stand still exactly where the old ones have nothing left to learn.
        """
        op, gradient, factor = self.growth.fusion.op, self._grown_mean, self.laboratory.factor
        if factor is not None:
            return dict.fromkeys(gradient, factor)
        named, grown = trainable(self.grown), dict(self.grown.named_parameters())

        def rates(gradient: Mapping[str, Tensor]) -> dict[str, float]:
            return rates_by_tensor(self._grown_optimizers, named, op, states, grown, gradient)

        whole = rates(gradient) if duplication else {}
        if duplication and not self.laboratory.warm_up:
            return whole
        image = rates({name: t for name, t in split(op, gradient, states)[0].items() if name in op.layout.tensors})
        self._boosts = boosts_of(whole, image)
        return whole if duplication else image

    def _mean(self, values: Sequence[float]) -> list[float]:
        """Numbers as all ranks know them."""
        if self.laboratory.mean is None:
            return list(values)
        where = next(self.small.parameters()).device
        return [float(v) for v in self.laboratory.mean(torch.tensor(values, dtype=torch.float64, device=where))]


def _over(value: float, rate: float) -> float:
    return value / rate if rate else math.nan


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
