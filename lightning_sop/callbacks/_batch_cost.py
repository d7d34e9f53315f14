"""What a batch of a run costs in FLOPs: counted on copies, once for each shape of network and batch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_sop.callbacks._growing_run import silent
from lightning_sop.callbacks._plain_copy import plain_copy
from lightning_sop.callbacks._probe import _callable_parts
from lightning_sop.callbacks._strategies import refuse_sharding
from lightning_sop.callbacks._training_step import knowing, loss_of
from lightning_sop.callbacks.outermost import OutermostCalls
from lightning_sop.deploy.replay import Call, first_floating, isolated_random_state, map_tensors, tensors_in
from lightning_sop.dynamics.cost import COUNTING, Clock, Phase
from lightning_sop.dynamics.flops import estimated_flops, flops_of

Shapes = tuple[tuple[int, ...], ...]
_MOST_SHAPES = 16  # of batches, that are counted for a network; those of others are scaled


class Cost(NamedTuple):
    """FLOPs of a batch, forward and backward, on one rank; NaN where they cannot be told."""

    flops: float
    estimated: bool = False


UNKNOWN = Cost(math.nan)


class BatchCost:
    """Counts a training step on a copy of the module, or from its calls where it works in its Trainer only.

    Args:
        clock: what counting takes is entered there.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[int, dict[Shapes, Cost]] = {}  # by network
        self._listener: _Listener | None = None
        self._alone = True  # whether a step works on a copy, outside of its Trainer
        self._told = False
        self.renew()

    def renew(self) -> None:
        """The network may be another one now."""
        self._network: int | None = None

    def close(self) -> None:
        """Leave nothing on the module."""
        if self._listener is not None:
            self._listener.remove()
        self._listener = None

    def before(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        """A batch is to come: see to it that its cost can be told when it is done."""
        # Lazy layers get their shapes in the first batch: whether its cost can be counted on a copy is seen afterwards.
        unknown = (self._network is None and _lazy(module)) or self.of(trainer, module, batch, index) is None
        if unknown and self._listener is None and _whole(trainer):
            self._listener = _Listener(module)

    def after(self, trainer: Trainer, module: LightningModule, batch: Any, index: int, passes: int = 1) -> Cost:
        """The cost of the batch that is done, of each forward and backward if there were several."""
        listener = self._listener
        self.close()
        found = self.of(trainer, module, batch, index)
        if found is None:
            with self._clock.within(COUNTING):
                found = listener.cost(trainer, module, batch, passes) if listener is not None else UNKNOWN
            self._known_of(module)[shapes_of(batch)] = found
        if math.isnan(found.flops) and not self._told:
            self._told = True
            rank_zero_info(
                "FLOPs of training are not counted: training_step works on no copy of the module (which may be sharded) "
                f"and no call of a network was heard in it. {listener.missed if listener else ''}"
            )
        return found

    def of(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> Cost | None:
        """The cost of a batch, counted now if it is not known; None where the step does not work on a copy."""
        known, shapes = self._known_of(module), shapes_of(batch)
        if shapes in known:
            return known[shapes]
        if known and (trainer.world_size > 1 or len(known) >= _MOST_SHAPES):  # ranks count at the same steps
            near = min(known, key=lambda other: abs(elements(other) - elements(shapes)))
            cost = known[near].flops * elements(shapes) / elements(near) if elements(near) else known[near].flops
            return Cost(cost, True)
        found = self.counted(trainer, module, batch, index) if self._alone else None
        if found is None:
            self._alone = False
        else:
            known[shapes] = found
        return found

    def counted(self, trainer: Trainer, network: LightningModule, batch: Any, index: int) -> Cost | None:
        """The cost of a batch in any network of the module's class, counted now; None where that does not work."""
        module = trainer.lightning_module
        # Steps that call their optimizers themselves might reach those of the run.
        if not (_whole(trainer) and module.automatic_optimization):
            return None
        with self._clock.within(COUNTING):
            try:
                subject = plain_copy(network)
                if network is not module:
                    like = first_floating(module)
                    subject = subject.to(like.device, like.dtype)
                with silent(), isolated_random_state(), torch.enable_grad(), trainer.precision_plugin.train_step_context():
                    inputs = map_tensors(torch.Tensor.clone, batch)
                    total, forward = flops_of(lambda: loss_of(trainer, subject, inputs, index), subject.backward)
            except Exception:  # the user's step, outside of its Trainer: anything may happen
                return None
            self._clock.ledger.add(COUNTING, Phase(flops=total))
        return Cost(total) if forward else _estimated(network, batch)

    def _known_of(self, module: nn.Module) -> dict[Shapes, Cost]:
        if self._network is None:
            self._network = hash(tuple((tuple(p.shape), p.requires_grad) for p in _initialized(module)))
        return self._known.setdefault(self._network, {})


class _Listener:
    """Hears the calls with which a step enters its networks; their FLOPs are counted afterwards."""

    def __init__(self, module: LightningModule) -> None:
        self._calls: list[Call] = []
        self.missed = ""
        self._watched = OutermostCalls([("", module), *_callable_parts(module)], self._keep)

    def remove(self) -> None:
        self._watched.remove()

    def _keep(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._calls.append(Call(path, *map_tensors(torch.Tensor.detach, (args, kwargs))))
        except Exception:  # an argument of the user's own class may fail in any way
            self.missed = f"The inputs of {path or 'forward'} cannot be kept."

    def cost(self, trainer: Trainer, module: LightningModule, batch: Any, passes: int) -> Cost:
        """Three times the forwards of all calls: backward is taken to be twice as much."""
        if self.missed or not self._calls:
            return UNKNOWN
        try:
            subject = plain_copy(module)
            with (
                silent(),
                isolated_random_state(),
                torch.no_grad(),
                knowing(trainer, subject),
                trainer.precision_plugin.train_step_context(),
            ):
                forward = sum(flops_of(lambda call=call: _answer(subject, call)).forward for call in self._calls)  # type: ignore[misc]
        except Exception as error:  # the user's own code
            self.missed = f"{type(error).__name__}: {error}"
            return UNKNOWN
        return Cost(3 * forward / passes, True) if forward else _estimated(module, batch)


def shapes_of(batch: Any) -> Shapes:
    """What batches of equal cost have in common."""
    return tuple(tuple(tensor.shape) for tensor in tensors_in(batch))


def elements(shapes: Shapes) -> int:
    """How large a batch is."""
    return sum(math.prod(shape) for shape in shapes)


def _whole(trainer: Trainer) -> bool:
    """Whether each rank has the whole network."""
    try:
        refuse_sharding(trainer, "", "")
    except MisconfigurationException:
        return False
    return True


def _lazy(module: nn.Module) -> bool:
    return any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _initialized(module: nn.Module) -> list[nn.Parameter]:
    """Its parameters, but for those of lazy layers that have not been called yet."""
    return [parameter for parameter in module.parameters() if not is_lazy(parameter)]


def _answer(network: LightningModule, call: Call) -> Any:
    args, kwargs = map_tensors(torch.Tensor.clone, (call.args, call.kwargs))
    return network.get_submodule(call.module)(*args, **kwargs)


def _estimated(network: nn.Module, batch: Any) -> Cost:
    samples = next((tensor.shape[0] for tensor in tensors_in(batch) if tensor.dim()), 1)
    return Cost(estimated_flops(sum(p.numel() for p in _initialized(network)), samples).total, True)
