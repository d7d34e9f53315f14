"""The loss of one batch under several weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LossGap(NamedTuple):
    """Losses of one batch.

    Attributes:
        mixed: under the mix of the step.
        collapsed: under the collapsed weights.
    """

    mixed: Tensor
    collapsed: Tensor

    @property
    def gap(self) -> Tensor:
        """By how much the mix's loss is the larger one."""
        return self.mixed - self.collapsed


@torch.no_grad()
def loss_gap(
    loss: Callable[[nn.Module], Tensor],
    fresh: Callable[[], nn.Module],
    mixed: Mapping[str, Tensor],
    collapsed: Mapping[str, Tensor],
) -> LossGap:
    """Evaluate a network with two sets of weights.

    Args:
        loss: of the network, on one batch; with the same random numbers in both calls, if it draws any.
        fresh: gives a new copy of the network at each call, so that what it keeps from call to call is none of the
            difference.
        mixed: weights of the mix by parameter name.
        collapsed: collapsed weights of the same parameters.

    Returns:
        Both losses, without a graph.
    """

    def under(weights: Mapping[str, Tensor]) -> Tensor:
        subject = fresh()
        for name, weight in weights.items():
            subject.get_parameter(name).copy_(weight)
        return loss(subject).detach()

    return LossGap(under(mixed), under(collapsed))
