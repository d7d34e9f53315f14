"""Methods of single objects that do something more for a while."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


class Patch:
    """Stands in the place of a method of one object until it is taken out.

    What it has put around the method is picklable if the function and what it is bound to are.

    Args:
        owner: the object.
        name: of the method.
        around: called in its place with the method itself, then the arguments.
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self.owner, self.name, self.around = owner, name, around
        self.own = owner.__dict__.get(name)  # an attribute of the object itself, which some libraries set
        self.original = getattr(owner, name)
        self.active = True
        functools.update_wrapper(self, inspect.unwrap(self.original), updated=())  # Lightning asks whose code it is
        owner.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.original, *args, **kwargs) if self.active else self.original(*args, **kwargs)

    def remove(self) -> None:
        """Leave the method as it was; also where somebody has put something around this in the meantime."""
        self.active = False
        own = self.own
        while isinstance(own, Patch) and not own.active:  # they are not always removed in the order of a stack
            own = own.own
        if self.owner.__dict__.get(self.name) is not self:
            return
        if own is None:
            del self.owner.__dict__[self.name]
        else:
            self.owner.__dict__[self.name] = own
