"""Inputs for CollapseOnSave's proof, taken from the model's own forward calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_sop.callbacks.outermost import OutermostCalls
from lightning_sop.deploy.replay import Call, record

_MOST_CALLS = 8  # of one step; each is a forward at every save


class ProbeRecorder:
    """Keeps the first outermost call of the root module, or of the parts that its step calls directly."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.missed = ""
        self._watched: OutermostCalls | None = None
        self._open = self._compiled = False

    def attach(self, root: nn.Module) -> None:
        """Listen to a module; what was recorded before is forgotten."""
        self.detach()
        self.calls, self.missed = [], ""
        self._watched = OutermostCalls([("", root), *_callable_parts(root)], self._keep)
        # taking hooks away would make torch.compile compile again
        self._compiled = any("_orig_mod" in part._modules or part._compiled_call_impl for part in root.modules())

    def detach(self) -> None:
        """Listen no longer; the calls are kept."""
        if self._watched is not None:
            self._watched.remove()
        self._watched, self._open = None, False

    def open(self) -> None:
        """A step begins."""
        self._open = not self.calls

    def close(self) -> None:
        """A step ends; once there are calls the listening does, too: torch has no fast paths for layers with hooks."""
        self._open = False
        if self.calls and self._watched is not None and not self._compiled:
            self._watched.remove()

    def _keep(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open and len(self.calls) < _MOST_CALLS and all(call.module != path for call in self.calls):
            call = record(path, args, kwargs)
            if call is None:
                self.missed = f"the inputs of {path or 'forward'} cannot be copied or are too large to keep"
            else:
                self.calls.append(call)


def _callable_parts(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children with parameters, by path; containers are never called, so their children instead."""
    for name, child in root.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _callable_parts(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield prefix + name, child
