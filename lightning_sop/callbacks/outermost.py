"""The calls with which a LightningModule's steps enter its networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Sink = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None]


class OutermostCalls:
    """Tells of every outermost call of a root module or one of its direct children, with its arguments.

    A LightningModule's ``training_step`` may call ``self(x)``, ``self.net(x)`` or several networks: each call that is not
    made inside another one is reported. Within a compiled region nothing is reported, at no cost.

    Args:
        root: the module whose calls to watch.
        sink: called with the module's path (``""`` for the root), the module, its arguments and keyword arguments.
    """

    def __init__(self, root: nn.Module, sink: Sink) -> None:
        self._sink = sink
        self._depth = 0
        self._hooks = []
        for path, module in [("", root), *root.named_children()]:
            self._hooks.append(module.register_forward_pre_hook(_Enter(self, path), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A watched module is called."""
        if torch.compiler.is_compiling():
            return
        self._depth += 1
        if self._depth == 1:
            self._depth_guard(path, module, args, kwargs)

    def _depth_guard(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._sink(path, module, args, kwargs)
        except BaseException:
            self._depth = 0  # the call does not take place, nor will its end be reported
            raise

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._depth = max(0, self._depth - 1)


class _Enter:
    """A picklable hook that knows the path of its module."""

    def __init__(self, calls: OutermostCalls, path: str) -> None:
        self.calls = calls
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.enter(self.path, module, args, kwargs)
