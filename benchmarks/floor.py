"""How much of the step time is the optimizer's own: the plain network, with k times the converted weights to update.

Below this no training form with k kernels can go, whatever composing and pulling back cost: the same fused AdamW moves the
same number of values, whose gradients are simply there.

    python benchmarks/floor.py [models …]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from measures.subjects import WORKLOADS, Subject
from torch import nn

FACTOR = 4
THREADS = 2


def extra_parameters(model: nn.Module) -> list[nn.Parameter]:
    """k - 1 further parameters for every matrix, each with a gradient."""
    extra = []
    for weight in model.parameters():
        for _ in range((FACTOR - 1) * (weight.dim() > 1)):
            parameter = nn.Parameter(weight.detach().clone())
            parameter.grad = 0.01 * torch.randn_like(weight)
            extra.append(parameter)
    return extra


def seconds(step: Callable[[], object]) -> float:
    """Time of one call."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main(models: list[str]) -> None:
    """Print one line per network."""
    torch.set_num_threads(THREADS)
    for name in models:
        plain = Subject(name, "plain")
        optimizer = torch.optim.AdamW(extra_parameters(plain.net), fused=True)
        rounds = 3 * WORKLOADS[name].rounds
        for _ in range(3):
            plain.step()
            optimizer.step()
        steps, updates = [], []
        for _ in range(rounds):
            steps.append(seconds(plain.step))
            updates.append(seconds(optimizer.step))
        share = median(updates) / median(steps)
        plain_ms, update_ms = 1000 * median(steps), 1000 * median(updates)
        print(
            f"{name}: plain {plain_ms:.2f} ms, {FACTOR - 1} more kernels' update {update_ms:.2f} ms, floor {1 + share:.3f}"
        )


if __name__ == "__main__":
    main(sys.argv[1:] or list(WORKLOADS))
