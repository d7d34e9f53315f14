"""The calls with which a LightningModule's steps enter its networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Sink = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None]


class OutermostCalls:
    """Tells of every call of a watched module that is not made inside the call of another one.

    A ``training_step`` may call ``self(x)``, ``self.net(x)`` or several networks. Inside a wrapper like DDP the step itself
    runs as the root's forward; that call is none of the model's and is passed over. Within a compiled region nothing is
    told, at no cost. Hooks stay on the modules until :meth:`remove`: adding or removing one makes ``torch.compile`` compile
    again.

    Args:
        modules: what to watch, by path (``""`` for the root).
        sink: called before each such call with path, module, arguments and keyword arguments.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]], sink: Sink) -> None:
        self._sink = sink
        self._depth = 0
        self._handles: list[RemovableHandle] = []
        for path, module in modules:
            # nn.Module's own: scripted modules refuse hooks, since TorchScript does not save them, and yet call them.
            self._handles.append(nn.Module.register_forward_pre_hook(module, _Before(self, path), with_kwargs=True))
            self._handles.append(nn.Module.register_forward_hook(module, _After(self, path), always_call=True))

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A watched module is called."""
        if _is_step(module):
            return
        self._depth += 1
        if self._depth == 1:
            self._sink(path, module, args, kwargs)

    def leave(self) -> None:
        """A call has returned or failed; that of a step, which was not counted, returns when nothing else is open."""
        self._depth = max(0, self._depth - 1)


class _Before:
    """Forward pre-hook; a copy of it, in a copied or unpickled module, does nothing."""

    def __init__(self, calls: OutermostCalls | None, path: str) -> None:
        self.calls, self.path = calls, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and self.calls is not None:
            self.calls.enter(self.path, module, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Before:
        return type(self)(None, self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None, self.path)


class _After(_Before):
    """Forward hook."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self.calls is not None:
            self.calls.leave()


def _is_step(module: nn.Module) -> bool:
    """Whether Lightning has put a step in the place of the module's forward, to send it through a wrapper."""
    forward = module.__dict__.get("forward")
    return getattr(forward, "__qualname__", "").startswith("_ForwardRedirection.")
