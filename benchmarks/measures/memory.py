"""Exact count of the memory that live tensors hold, on any device, independent of the allocator."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from measures.subjects import FORMS, WORKLOADS, Subject, converted_weights

STEPS = 3
ADAMW_MOMENTS = 2
SLACK = 1.05


class LiveTensors(TorchDispatchMode):
    """Follows every storage that an operation returns while the mode is on, until the storage is freed.

    Attributes:
        live: bytes alive now.
        peak: the most there has been at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: int = 0
        self.peak: int = 0
        self._seen: set[weakref.ref[Any]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._follow(value.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def freed(reference: weakref.ref[Any]) -> None:
            self._seen.discard(reference)
            self.live -= size

        reference = weakref.ref(storage, freed)
        if reference not in self._seen:  # compared by the storage, as long as that lives
            self._seen.add(reference)
            self.live += size
            self.peak = max(self.peak, self.live)


def peak_bytes(workload: str, form: str, factor: int, device: str) -> int:
    """The most that tensors hold from making the network to the end of a few training steps."""
    with LiveTensors() as tensors:
        subject = Subject(workload, form, factor, device)
        for _ in range(STEPS):
            subject.step()
    return int(tensors.peak)


def measure_memory(workload: str, factors: Sequence[int], device: str) -> list[dict[str, Any]]:
    """One row for each number of kernels: peak of each form, and the bound for ours.

    The bound is 1.05 times the plain peak with k kernels, their gradients and their AdamW moments.
    """
    plain = peak_bytes(workload, "plain", 1, device)
    weights = converted_weights(WORKLOADS[workload].make_net(), 1).values()
    one_kernel = sum(weight.numel() * weight.element_size() for weight in weights)
    rows = []
    for factor in factors:
        peaks = {form: peak_bytes(workload, form, factor, device) for form in FORMS if form != "plain"}
        bound = SLACK * (plain + factor * one_kernel * (2 + ADAMW_MOMENTS))
        rows.append({"model": workload, "factor": factor, "peak": {"plain": plain, **peaks}, "bound": bound})
    return rows
