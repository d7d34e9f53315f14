"""What the suite needs to know of an architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Any]
Call = Callable[..., Any]


def towards_a_pattern(output: Tensor) -> Tensor:
    """Mean squared distance to a fixed pattern: a loss that any real output has, with gradients everywhere."""
    pattern = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).reshape(output.shape)
    return (output - pattern).square().mean()


def next_token(logits: Tensor) -> Tensor:
    """Cross-entropy against fixed tokens; the vocabulary is the last axis."""
    tokens = torch.arange(logits[..., 0].numel()) * 5 % logits.shape[-1]
    return nn.functional.cross_entropy(logits.flatten(0, -2), tokens)


def tensor_of(output: Any) -> Tensor:
    """The tensor that is looked at: the output itself, its logits, its last hidden state, or its first item."""
    for name in ("logits", "last_hidden_state"):
        if hasattr(output, name):
            return getattr(output, name)
    return output if isinstance(output, Tensor) else tensor_of(output[0])


@dataclass(frozen=True)
class Architecture:
    """A network that nobody here wrote, with a batch, a loss, and what of it should be converted.

    Attributes:
        name: shown in the test's id.
        build: makes it with random weights; called under a fixed seed.
        batch: keyword arguments of its forward.
        plain: patterns of the names that should stay plain; every other parameter should be converted.
        share: how many values should be converted, and how many there are, counted by hand from the layers' sizes.
        loss: of the output tensor.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    plain: tuple[str, ...]
    share: tuple[int, int]
    loss: Callable[[Tensor], Tensor] = towards_a_pattern

    def __str__(self) -> str:
        return self.name

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The network, the same one each time; float64, where an equation holds to the last digits."""
        torch.manual_seed(1)
        return self.build().to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float64) -> Batch:
        """The batch, the same one each time."""
        torch.manual_seed(2)
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in self.batch().items()}

    def output(self, model: Call, dtype: torch.dtype = torch.float64) -> Tensor:
        """What the network (or a function that stands for it) makes of the batch."""
        return tensor_of(model(**self.inputs(dtype)))

    def loss_at(self, model: Call, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """The training loss; ``step`` fixes the dropout masks."""
        inputs = self.inputs(dtype)
        torch.manual_seed(100 + step)
        return self.loss(tensor_of(model(**inputs)))

    def stays_plain(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.plain)
