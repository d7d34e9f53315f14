"""Inputs for CollapseOnSave's proof, taken from the model's own forward calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_sop.deploy.replay import Call, record

_MOST_CALLS = 8  # of one step; each is a forward at every save


class ProbeRecorder:
    """Keeps the first outermost call of the root module, or of the parts that its step calls directly.

    The hooks stay on the modules until :meth:`detach`, also when everything is recorded: adding or removing one makes
    ``torch.compile`` compile again. While it traces, they do nothing.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.missed = ""
        self._handles: list[RemovableHandle] = []
        self._open = False
        self._depth = 0
        self._redirected = False

    def attach(self, root: nn.Module) -> None:
        """Listen to a module; what was recorded before is forgotten."""
        self.detach()
        self.calls, self.missed = [], ""
        for path, module in [("", root), *_callable_parts(root)]:
            self._handles.append(module.register_forward_pre_hook(_Before(self, path), with_kwargs=True))
            self._handles.append(module.register_forward_hook(_After(self, path)))

    def detach(self) -> None:
        """Take the hooks off; the calls are kept."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._open = [], False

    def open(self, redirected: bool) -> None:
        """A step begins.

        Args:
            redirected: The step itself runs as the root's forward, as it does inside a wrapper like DDP: that call, the
                first one, has the step's arguments and is none of the model's.
        """
        self._open = bool(self._handles) and not self.calls
        self._depth, self._redirected = 0, redirected

    def close(self) -> None:
        """A step ends."""
        self._open = False

    def before(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call begins."""
        if not self._open:
            return
        if self._redirected and not path:
            self._redirected = False
            return
        self._depth += 1
        if self._depth == 1 and len(self.calls) < _MOST_CALLS and all(call.module != path for call in self.calls):
            call = record(path, args, kwargs)
            if call is None:
                self.missed = f"the inputs of {path or 'forward'} cannot be copied or are too large to keep"
            else:
                self.calls.append(call)

    def after(self) -> None:
        """A call has returned."""
        self._depth = max(0, self._depth - 1)


class _Before:
    """Forward pre-hook; a copy of it, in a copied or unpickled module, does nothing."""

    def __init__(self, recorder: ProbeRecorder | None, path: str) -> None:
        self.recorder, self.path = recorder, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and self.recorder is not None:
            self.recorder.before(self.path, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Before:
        return type(self)(None, self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None, self.path)


class _After(_Before):
    """Forward hook."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self.recorder is not None:
            self.recorder.after()


def _callable_parts(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children with parameters, by path; containers are never called, so their children instead."""
    for name, child in root.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _callable_parts(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield prefix + name, child
