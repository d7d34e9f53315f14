"""Optimizer state of φ, and the plain network's image of it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning_sop.reparam.form import TrainingForm

State = dict[str, Any]


class PlainState(dict[str, Any]):
    """The optimizer state that stands for a weight outside ``step()``: computed from φ's state when somebody looks."""

    def __init__(self, source: Callable[[], State] | Mapping[str, Any]) -> None:
        super().__init__()
        self._source: Callable[[], State] | None = None
        self._as_filled: dict[str, tuple[Any, int]] = {}
        if callable(source):
            self._source = source
        else:
            super().update(source)

    def _filled(self) -> None:
        if self._source is not None:
            source, self._source = self._source, None
            super().update(source())
            self._as_filled = {key: (value, _version(value)) for key, value in super().items()}

    @property
    def edited(self) -> bool:
        """Whether somebody has changed an entry, or written into one's tensor."""
        if self._source is not None:
            return False
        now = {key: (value, _version(value)) for key, value in super().items()}
        return now.keys() != self._as_filled.keys() or any(
            now[key][0] is not value or now[key][1] != version for key, (value, version) in self._as_filled.items()
        )

    def __setitem__(self, key: str, value: Any) -> None:
        self._filled()
        super().__setitem__(key, value)

    def __getitem__(self, key: str) -> Any:
        self._filled()
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._filled()
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self._filled()
        return super().__iter__()

    def __len__(self) -> int:
        self._filled()
        return super().__len__()

    def __bool__(self) -> bool:  # asked at every step: there is a state, whatever it is
        return True

    def get(self, key: str, default: Any = None) -> Any:
        self._filled()
        return super().get(key, default)

    def keys(self) -> Any:
        self._filled()
        return super().keys()

    def values(self) -> Any:
        self._filled()
        return super().values()

    def items(self) -> Any:
        self._filled()
        return super().items()

    def __eq__(self, other: object) -> bool:
        self._filled()
        return super().__eq__(other)

    def __repr__(self) -> str:
        self._filled()
        return super().__repr__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (list(self.items()),)  # which torch.load(weights_only=True) accepts by name


def plain_dicts(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """What is saved holds ordinary dictionaries."""
    for key, entry in state_dict["state"].items():
        if isinstance(entry, PlainState):
            state_dict["state"][key] = dict(entry)


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


@torch.no_grad()
def plain_state(form: TrainingForm, states: list[State]) -> State:
    """The weight's optimizer state from its φ's: tensors of the weight's shape averaged, other entries the first's.

    For Majority Kernels the mean of the kernels' first moments is exactly the plain network's, by linearity. Empty where no
    such image exists (φ of other shapes than the weight; LBFGS, which keeps everything with its first parameter).
    """
    shape = form.site.shape
    if not all(states) or any(phi.shape != shape for phi in form.phi):
        return {}
    image: State = {}
    for key, first in states[0].items():
        if isinstance(first, Tensor) and first.dim() > 0:
            image[key] = torch.stack([state[key] for state in states]).mean(0) if len(states) > 1 else first
        else:
            image[key] = copy.deepcopy(first)
    return image


def on_device(state: State, device: torch.device) -> State:
    """Move moments after φ when the module has been moved; step counts stay where their optimizer put them."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.device != device and (value.dim() > 0 or value.device.type != "cpu"):
            state[key] = value.to(device)
    return state
