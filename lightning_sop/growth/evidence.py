"""What is needed to try a growth out, and what comes of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sop.growth.fuse import Fusion


@dataclass(frozen=True)
class Evidence:
    """What a check has found. NaN stands for what was not measured.

    Losses are in the user's units. U and B are in the metric D of the optimizer's steps (the identity for SGD, one over the
    root of the second moment for the Adam family). Subscripts: s small, b grown, perp outside of the image of G.

    Attributes:
        nu: h_⊥U_⊥/(h U_s); 0 for duplication, of which it says nothing.
        phi: F_b/F_s - 1, from the FLOPs of forward and backward of one batch.
        T: first-order gain of the next steps, h_⊥U_⊥ - phi h U_s in units of the loss per step; with donors other than the
            network itself also the gain of their ensemble's speed over the network's.
        se: jackknife standard error of ``T``.
        U_s: unbiased ‖E g_s‖².
        U_b: the same of the grown network.
        U_perp: the same of g_⊥.
        B_s: mean ‖g_s‖² of a batch.
        B_b: the same of the grown network.
        trap: 1 - R², see :func:`~lightning_sop.growth.trap.trap`.
        gain: decrease of the loss per FLOP in the rollout, grown over small; infinite where only the grown one decreases.
        small_decrease: by how much the rollout lowers the loss on held-out batches, small network.
        grown_decrease: grown network, likewise, from the small network's loss before.
        advantage: grown_decrease/(1 + phi) - small_decrease, positive where gain > 1.
        advantage_se: its standard error over the held-out batches.
        rate: h.
        new_rate: h_⊥.
        speed_rate: the one rate with which the grown network would be as fast, h U_s/U_b.
        igr_rate: the same by implicit regularization, h B_s/B_b.
        batches: that the gradients were of.
        steps: of the rollout, 0 without one.
        small_flops: FLOPs of the small network on one batch.
        grown_flops: FLOPs of the grown one.
        flops: that this check has taken.
        duplication: whether the growth is copies and nothing else.
        grow: the decision.
    """

    nu: float = math.nan
    phi: float = math.nan
    T: float = math.nan
    se: float = math.nan
    U_s: float = math.nan
    U_b: float = math.nan
    U_perp: float = math.nan
    B_s: float = math.nan
    B_b: float = math.nan
    trap: float = math.nan
    gain: float = math.nan
    small_decrease: float = math.nan
    grown_decrease: float = math.nan
    advantage: float = math.nan
    advantage_se: float = math.nan
    rate: float = math.nan
    new_rate: float = math.nan
    speed_rate: float = math.nan
    igr_rate: float = math.nan
    batches: int = 0
    steps: int = 0
    small_flops: float = math.nan
    grown_flops: float = math.nan
    flops: float = 0.0
    duplication: bool = False
    grow: bool = False

    def metrics(self) -> dict[str, float]:
        """For loggers: ``growth/nu`` and so on, what was measured."""
        found = {entry.name: float(getattr(self, entry.name)) for entry in fields(self)}
        return {f"growth/{name}": value for name, value in found.items() if not math.isnan(value)}


@dataclass(frozen=True)
class Growth:
    """A grown network, made on copies.

    Attributes:
        fusion: how it was made.
        network: the grown network.
        sources: the distinct networks it was made of, in the order of the operator; default the copy that was given alone.
        remembered: by optimizer and by source, the optimizer state of the sources by name; default the optimizers' own.
        probe: inputs as for :func:`~lightning_sop.growth.fuse.fuse`, for the trap test; without them there is none.
    """

    fusion: Fusion
    network: nn.Module
    sources: Sequence[nn.Module] = ()
    remembered: Sequence[Sequence[Mapping[str, Mapping[str, Any]]]] = ()
    probe: Any = None


def held_out(batches: int) -> int:
    """How many batches a rollout is judged by, where a check has so many."""
    return max(1, min(8, batches // 4))


@dataclass(frozen=True)
class Laboratory:
    """What a run offers for trying a growth out.

    Attributes:
        small: the live network; not modified.
        grow: makes a :class:`Growth` out of a copy of it.
        loss: of ``(network, batch)``, a scalar with a graph.
        batches: training batches; unless these were drawn independently of the network as it is, T has a bias.
        optimizers: the live ones, holding the live network's parameters; not modified.
        factor: what multiplies the learning rates after growth; None: matched, tensor by tensor.
        factors: what multiplies single learning rates now, by name.
        batches_per_step: that the run accumulates gradients over.
        warm_up: steps after growth in which the new directions are opened, see :mod:`lightning_sop.growth.warm_up`.
        duplicate: copies a network.
        mean: of a tensor over the ranks of a distributed run, None where there is one.
        clip: limits the gradients of parameters as the run does.
        held_out: further batches, that rollouts are judged by and not trained on; default the last of ``batches``.
        progress: told what is being done, how much of it is, and how much there is.
    """

    small: nn.Module
    grow: Callable[[nn.Module], Growth]
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Sequence[Any]
    optimizers: Sequence[Optimizer]
    factor: float | None = None
    factors: Mapping[str, float] = field(default_factory=dict)
    batches_per_step: int = 1
    warm_up: int = 0
    duplicate: Callable[[nn.Module], nn.Module] = copy.deepcopy
    mean: Callable[[Tensor], Tensor] | None = None
    clip: Callable[[Sequence[nn.Parameter]], None] | None = None
    held_out: Sequence[Any] = ()
    progress: Callable[[str, int, int], None] = lambda *_: None
