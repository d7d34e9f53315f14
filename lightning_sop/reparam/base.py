"""The interface of a method: how one weight is trained through a larger set of tensors.

A method is pure torch and keeps no state: it says how the larger tensors are built from a weight, how a *mix* of them
makes the weight of one training step, and what single weight they collapse to. When and where is the engine's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Site:
    """Where a training form sits.

    Attributes:
        name: the parameter's path in the model, for example ``"encoder.0.weight"``.
        shape: the weight's shape.
        out_axis: the axis of the weight that indexes output units (0 for Linear and Conv, 1 for ConvTranspose).
    """

    name: str
    shape: tuple[int, ...]
    out_axis: int = 0

    def per_output(self, values: Tensor) -> Tensor:
        """Reshape one value per output unit, shape ``(shape[out_axis],)``, so that it broadcasts over the weight."""
        return values.reshape([-1 if axis == self.out_axis else 1 for axis in range(len(self.shape))])


class Method(ABC):
    """How a weight W is trained through larger tensors φ.

    The engine calls, for every weight, ``build`` once; then at each optimizer step ``draw`` a mix, ``compose`` the weight
    from φ and the mix, run the plain network, and ``pull_back`` the weight's gradient onto φ. ``collapse`` gives the weight
    that is evaluated, saved and deployed.

    Subclasses are plain classes whose constructor arguments are kept in :attr:`settings`, so that a checkpoint can say
    which method made it.
    """

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What has to agree between a checkpoint and the run that resumes it (plain data)."""

    @abstractmethod
    def build(self, weight: Tensor, site: Site, generator: torch.Generator, *, near: bool = False) -> list[Tensor]:
        """Make the tensors that hold φ, such that ``collapse(φ)`` equals ``weight`` to rounding.

        Args:
            weight: the plain weight, any shape, dtype and device; not modified.
            site: where it sits.
            generator: the only source of randomness allowed (a CPU generator).
            near: the weight was trained already, so φ must stay close to it whatever the method's own initialization.
        """

    def parameters(self, storage: Sequence[Tensor]) -> list[Tensor]:
        """Views of ``storage`` that the optimizer treats as separate parameters (default: the tensors themselves)."""
        return list(storage)

    @abstractmethod
    def draw(self, sites: Sequence[Site], generator: torch.Generator, progress: float) -> list[Tensor]:
        """One mix for each site, small float64 CPU tensors; ``progress`` in [0, 1] is the part of the training done."""

    @abstractmethod
    def compose(self, phi: Sequence[Tensor], mix: Tensor, site: Site) -> Tensor:
        """The weight of a training step, differentiable in φ."""

    @abstractmethod
    def collapse(self, phi: Sequence[Tensor], site: Site) -> Tensor:
        """The weight that is evaluated and deployed, differentiable in φ, of the weight's shape."""

    @abstractmethod
    def shift(self, phi: Sequence[Tensor], before: Tensor, after: Tensor, site: Site) -> None:
        """Move φ in place as the weight was moved by others, so that ``compose`` (any mix) and ``collapse`` move alike."""

    def write(self, weight: Tensor, phi: Sequence[Tensor], mix: Tensor | None, site: Site) -> None:
        """Write the composed weight (``mix`` given) or the collapsed one (``mix`` None) into ``weight``, under no_grad."""
        weight.copy_(self.collapse(phi, site) if mix is None else self.compose(phi, mix, site))

    def pull_back(
        self, phi: Sequence[Tensor], mix: Tensor | None, grad: Tensor, site: Site, out: Sequence[Tensor]
    ) -> Sequence[Tensor | None] | None:
        """Gradient of each φ from the gradient of the weight: the vector-Jacobian product of ``compose`` or ``collapse``.

        Args:
            phi: leaf tensors that require gradients.
            mix: the mix with which the weight was written, None when it was collapsed.
            grad: ∂L/∂W, of the weight's shape.
            site: where the weight sits.
            out: buffers like the storage of φ, which may be used.

        Returns:
            The gradients in the order of ``phi``, or None where ``out`` holds them all, as storage holds φ.
        """
        with torch.enable_grad():
            weight = self.collapse(phi, site) if mix is None else self.compose(phi, mix, site)
        return torch.autograd.grad(weight, list(phi), grad, allow_unused=True)

    def unsuitable(self, weight: Tensor, site: Site) -> str | None:
        """Why this weight cannot be trained by this method, or None."""
        return None

    def expanded_numel(self, site: Site) -> int:
        """Number of trained values that stand for the weight; shown in the table."""
        generator = torch.Generator("cpu").manual_seed(0)
        return sum(tensor.numel() for tensor in self.build(torch.zeros(site.shape, device="cpu"), site, generator))

    def describe(self) -> str:
        """The method and its settings on one line, for tables and ``print(model)``."""
        return f"{type(self).__name__}({', '.join(f'{key}={value}' for key, value in self.settings.items())})"

    def __repr__(self) -> str:
        return self.describe()
