"""What training k kernels per weight costs at least, by the memory that has to be moved, on this machine and at this hour.

Beside the plain network's step it times the three things that no training form of k separate parameters can leave out, each
as one bare torch operation per weight, with no step cycle around it:

- update: the same fused AdamW on k - 1 further parameters of every weight's shape, whose gradients are simply there;
- pull back: one gradient read, k gradients written;
- compose: k kernels read, one weight written.

    python benchmarks/floor.py [models …]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from measures.subjects import WORKLOADS, Subject, converted_weights
from torch import Tensor, nn

FACTOR = 4
THREADS = 2


class Kernels:
    """k parameters for one weight, as views of one buffer, and their gradients."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach().clone()
        self.grad = 0.01 * torch.randn_like(weight)
        self.stack = torch.stack([self.weight] * FACTOR)
        self.gradients = torch.stack([self.grad] * FACTOR)
        self.shares = torch.rand(FACTOR, *[1] * weight.dim())
        self.extra = [nn.Parameter(kernel) for kernel in self.stack.unbind(0)[1:]]
        for parameter, gradient in zip(self.extra, self.gradients.unbind(0)[1:], strict=True):
            parameter.grad = gradient

    @torch.no_grad()
    def pull_back(self) -> None:
        """Every kernel's gradient, in one operation."""
        torch.mul(self.grad.unsqueeze(0), self.shares, out=self.gradients)

    @torch.no_grad()
    def compose(self) -> None:
        """The mix, by the operations that were measured to be fastest."""
        mean = self.stack[0]
        for kernel in self.stack[1:]:
            mean = torch.lerp(mean, kernel, 0.5, out=self.weight)


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
        kernels = [Kernels(weight) for weight in converted_weights(plain.net, FACTOR).values()]
        optimizer = torch.optim.AdamW([parameter for k in kernels for parameter in k.extra], fused=True)
        parts = {
            "plain step": plain.step,
            "pull back": lambda kernels=kernels: [k.pull_back() for k in kernels],
            "update": optimizer.step,
            "compose": lambda kernels=kernels: [k.compose() for k in kernels],
        }
        for _ in range(3):
            for part in parts.values():
                part()
        times = {label: [] for label in parts}
        for _ in range(4 * WORKLOADS[name].rounds):
            for label, part in parts.items():
                times[label].append(seconds(part))
        milliseconds = {label: 1000 * median(values) for label, values in times.items()}
        plain_ms = milliseconds["plain step"]
        shares = ", ".join(f"{label} {value:.2f} ms" for label, value in milliseconds.items())
        print(f"{name}, k={FACTOR}: {shares}; at least {sum(milliseconds.values()) / plain_ms:.3f} of the plain step")


if __name__ == "__main__":
    main(sys.argv[1:] or list(WORKLOADS))
