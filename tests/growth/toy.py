"""The teacher-student toy: its networks, their growth, and a plain training loop with a schedule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_sop.growth import BackwardErrorSchedule, Evidence, Growth, Laboratory, Moment, fuse

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
        self.measured = 0

    def run(self, start: int = 0, stop: int | None = None) -> int | None:
        """The step at which it grows, or None."""
        for step in range(start, self.total if stop is None else stop):
            moment = Moment(step, self.total)
            wanted = self.schedule.wants(moment)
            if wanted:
                laboratory = Laboratory(self.net, self.grow, mean_square, self.others(wanted, step), [self.optimizer])
                evidence = self.schedule.consider(laboratory, moment)
                if evidence is not None:
                    self.found[step] = evidence
                if self.schedule.due(moment):
                    return step
            batch = self.batch()
            self.optimizer.zero_grad()
            loss = mean_square(self.net, batch)
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())
        return None

    def batch(self, generator: torch.Generator | None = None) -> Batch:
        if self.size == 512:
            return self.inputs, self.targets
        rows = torch.randint(512, (self.size,), generator=generator or self.generator)
        return self.inputs[rows], self.targets[rows]

    def others(self, number: int, step: int) -> list[Batch]:
        """Batches for a check, drawn beside those that are trained on."""
        generator = torch.Generator().manual_seed(step)
        return [self.batch(generator) for _ in range(number)]

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
