"""What SimulatedOverparam asks of the run that it is in."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_sop.reparam.form import TrainingForm
from lightning_sop.reparam.select import Rule
from lightning_sop.reparam.tied import TiedForm

#: Callbacks that read the weights during training and have to find the collapsed ones.
_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


def averages(callback: Callback) -> bool:
    """Whether a callback averages weights in its hooks."""
    return any(base.__name__ in _AVERAGING for base in type(callback).__mro__)


def anneals(rules: Sequence[Rule]) -> bool:
    """Whether a method has to know how much of the training is done."""
    methods = [rule.method for rule in rules]
    return any(getattr(method, "anneal", 0) and getattr(method, "factor", 2) > 1 for method in methods)


def take_out_copies(model: nn.Module | None) -> None:
    """Take forms out of layers that were copied during the training, which no engine trains: averages, teachers."""
    for part in [] if model is None else list(model.modules()):
        for name, child in list(part._modules.items()):
            form = child.form if isinstance(child, TiedForm) else child
            if isinstance(form, TrainingForm) and not form.live:
                del part._modules[name]


def part_done(trainer: Trainer) -> float | None:
    """Part of the training that is done, in [0, 1]; None where its length is not known."""
    parts = []
    if trainer.max_steps > 0:
        parts.append(trainer.global_step / trainer.max_steps)
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is not None and epochs > 0 and 0 < batches < float("inf"):
        # not those that were begun: a batch that a run was interrupted in is begun again
        parts.append(trainer.fit_loop.epoch_loop.batch_progress.total.completed / (epochs * batches))
    return min(1.0, max(parts)) if parts else None
