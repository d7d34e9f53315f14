"""Running a part of the code in one process of several, where whatever waits for the others would wait for ever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# All of torch's collectives, and what sends to another process, are operations of these: also those that objects are sent
# with, functional ones, barriers, and those in layers such as SyncBatchNorm.
_NAMESPACES = {"c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd"}


def alone() -> AbstractContextManager[Any]:
    """Meanwhile collectives raise a RuntimeError, where there are other processes."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return _NoCollectives() if several else nullcontext()  # type: ignore[no-untyped-call]


class _NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace in _NAMESPACES:
            raise RuntimeError(f"{func.name()} waits for other processes, which take no part here")
        return func(*args, **(kwargs or {}))
