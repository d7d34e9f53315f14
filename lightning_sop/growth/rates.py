"""Learning rates of single tensors, for the length of ``optimizer.step()`` only.

Fusion multiplies the rates at which different tensors should go on by different factors. The optimizer's groups are the
user's, though, and schedulers, checkpoints and loggers know them: so they are split into finer groups when a step begins,
and are what they were when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class StepRates:
    """Multiplies the learning rate of single parameters of one optimizer.

    Args:
        optimizer: its groups must have an ``"lr"``.
        factors: by parameter; others keep their rate. Weight decay, which optimizers multiply by the rate, is divided by
            the factor, so that weights decay as fast as before.
    """

    def __init__(self, optimizer: Optimizer, factors: Mapping[nn.Parameter, float]) -> None:
        self.optimizer = optimizer
        self.factors = {id(parameter): float(factor) for parameter, factor in factors.items()}
        self._plain: list[dict[str, Any]] | None = None
        self._pieces: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._hooks: tuple[RemovableHandle, RemovableHandle] = (
            optimizer.register_step_pre_hook(self._split),
            optimizer.register_step_post_hook(self.join),
        )

    def remove(self) -> None:
        """Every parameter has its group's rate again."""
        self.join()
        for hook in self._hooks:
            hook.remove()

    def _split(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.join()  # a step that raised has left the finer groups behind
        self._plain = optimizer.param_groups
        finer, self._pieces = [], []
        for group in self._plain:
            by_factor: dict[float, list[Tensor]] = {}
            for parameter in group["params"]:
                by_factor.setdefault(self.factors.get(id(parameter), 1.0), []).append(parameter)
            if set(by_factor) <= {1.0}:
                finer.append(group)
                continue
            for factor, parameters in by_factor.items():
                piece = {**group, "params": parameters, "lr": group["lr"] * factor}
                if group.get("weight_decay"):
                    piece["weight_decay"] = group["weight_decay"] / factor
                finer.append(piece)
                self._pieces.append((group, piece))
        optimizer.param_groups = finer

    def join(self, *_: Any) -> None:
        """The optimizer's own groups again (also after a step that raised)."""
        if self._plain is None:
            return
        self.optimizer.param_groups, self._plain = self._plain, None
        seen: set[int] = set()
        for group, piece in self._pieces:
            if id(group) not in seen:  # what the optimizer keeps in its groups (all pieces got the same)
                seen.add(id(group))
                group.update({key: value for key, value in piece.items() if key not in ("params", "lr", "weight_decay")})
        self._pieces = []
