"""SimulatedOverparam: train a LightningModule's weights in a larger form, keep its own small one."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_sop.callbacks._overparam_run import anneals, averages, part_done, take_out_copies
from lightning_sop.callbacks._patches import Patch
from lightning_sop.callbacks._plain_copy import without_forms
from lightning_sop.callbacks._strategies import refuse_other_lightning, refuse_sharding
from lightning_sop.callbacks._terminal import LateBar, show
from lightning_sop.callbacks._wandb_runs import describe_run
from lightning_sop.callbacks.batchnorm import BatchNormReestimation
from lightning_sop.reparam.base import Method
from lightning_sop.reparam.engine import Engine
from lightning_sop.reparam.functional import resolve_rules, resolve_seed
from lightning_sop.reparam.select import Plan, Rule, make_plan
from lightning_sop.reparam.table import plan_table

_WEIGHTS_ONLY = (
    "SimulatedOverparam: a weights-only checkpoint has no optimizer state to resume from. Begin a new run from its weights: "
    "Model.load_from_checkpoint(path), then fit without ckpt_path, and not with init='independent'."
)
_ANOTHER_MODEL = (
    "SimulatedOverparam: the checkpoint has the trained weights but no larger tensors, for this callback trained another "
    "module since. To resume from what a Trainer saves later, give it a callback of its own."
)


class SimulatedOverparam(Callback):
    """Train the weights of any LightningModule in a larger form (arXiv 2402.05033), without touching the model's code.

    The layers keep their own parameters. Before each training forward they hold a mix of the larger tensors; for
    validation, testing, saving and averaging they hold the collapsed weight. Parameters, optimizer groups, gradients and
    state_dicts are at every moment those of the plain model; the larger tensors take their place for the length of
    ``optimizer.step()`` only, and are saved in this callback's own state.

    Args:
        method: how each weight is trained; default ``MajorityKernels()``.
        rules: several methods for several parts of the model; the first rule that matches a weight has its way. Instead of
            ``method``, ``include``, ``exclude`` and ``layers``.
        include: patterns of names to convert, default all. ``"encoder"`` stands for everything in ``encoder``.
        exclude: patterns of names to leave plain, for example ``["*.head"]``.
        layers: layer types by class name; default Linear, convolutions, Bilinear, MultiheadAttention, RNNs and
            transformers' Conv1D (:data:`lightning_sop.reparam.DEFAULT_LAYERS`).
        seed: of the mixes and the initial differences; default: the seed of torch (``seed_everything``), which is read but
            not used up. No global random state is touched.
        reestimate_batchnorm: number of recent training batches with which BatchNorm statistics are estimated anew for the
            collapsed weights, before each validation and save; 0 keeps the statistics that training collected under mixes.
        verbose: print the table of what is converted when training starts; default on a terminal or in a notebook.
        name: tells two callbacks of this class apart in checkpoints; only needed where their selections look the same.

    Raises:
        ValueError: at the start of fit, when a pattern matches nothing, nothing is converted, or two callbacks of this
            class select the same weight; the message says which.
        MisconfigurationException: at the start of fit under a strategy that shards parameters.
    """

    def __init__(
        self,
        method: Method | None = None,
        *,
        rules: list[Rule] | None = None,
        include: list[str] | None = None,
        exclude: Sequence[str] = (),
        layers: list[str] | None = None,
        seed: int | None = None,
        reestimate_batchnorm: int = 0,
        verbose: bool | None = None,
        name: str | None = None,
    ) -> None:
        self.rules = resolve_rules(method, include, exclude, layers, rules)
        self.seed = seed
        self.verbose = verbose
        self.name = name
        self.engine: Engine | None = None
        self.batchnorm = BatchNormReestimation(reestimate_batchnorm)
        self._model: LightningModule | None = None
        self._patches: list[Patch] = []
        self._state: Mapping[str, Any] | None = None  # loaded before there is an engine

    @property
    def state_key(self) -> str:
        """Tells apart the callbacks of this class in a checkpoint, by what they select."""
        if self.name is not None:
            return f"{type(self).__qualname__}[{self.name}]"
        parts = [(r.include, tuple(r.exclude), r.layers) for r in self.rules]
        return self._generate_state_key(select=parts)

    def plan(self, model: torch.nn.Module) -> Plan:
        """What would become of every parameter of the model, without changing anything; print it with rich."""
        return make_plan(model, self.rules)

    def collapsed_weights(self, model: torch.nn.Module | None = None) -> dict[str, Tensor]:
        """The deployable weights recomputed from the method's own tensors in float64, by every name they have.

        Args:
            model: whose weights they have to be; none, if this callback has trained another one since.
        """
        others = model is not None and model is not self._model
        return {} if self.engine is None or others else self.engine.collapsed_weights()

    # ------------------------------------------------------------------ attach and detach

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the training forms, as soon as the layers exist and before weights are loaded."""
        if stage != "fit":
            return
        refuse_other_lightning(pl_module, "SimulatedOverparam")
        refuse_sharding(trainer, "SimulatedOverparam", "Use a single device or DDP, or leave the callback out.")
        self._precede_averaging(trainer)
        # Layers may be made in the module's own hooks, which run after this one: then follow on the last of them.
        for hook in ("configure_model", "setup"):
            if is_overridden(hook, pl_module):
                self._patches.append(Patch(pl_module, hook, functools.partial(self._attach_after, trainer, pl_module)))
                return
        self._attach(trainer, pl_module)

    def _attach_after(
        self, trainer: Trainer, pl_module: LightningModule, hook: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        self._take_out_patches()
        hook(*args, **kwargs)
        self._attach(trainer, pl_module)

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self.engine if self._model is pl_module else None
        plan = make_plan(pl_module, self.rules)
        if before is None or not before.fits(pl_module, plan):  # layers were replaced, perhaps
            # By default two callbacks in one Trainer draw differently.
            seed = resolve_seed(None) ^ zlib.crc32(self.state_key.encode()) if self.seed is None else self.seed
            seed = trainer.strategy.broadcast(seed)
            self.engine = Engine(pl_module, plan, seed, before)
            self._model = pl_module
        self._running().attach()
        self._patches.append(Patch(trainer, "save_checkpoint", self._save))
        self._patches.append(Patch(trainer.strategy, "save_checkpoint", _write))

    def _save(self, save: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Collapsed weights also for modules and callbacks that put parameters into a checkpoint by themselves."""
        with self._running().collapsed():
            save(*args, **kwargs)

    def _precede_averaging(self, trainer: Trainer) -> None:
        """Stand before callbacks that average weights in their hooks, so that they find the collapsed weights."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        mine = callbacks.index(self)
        first = next((i for i, callback in enumerate(callbacks[:mine]) if averages(callback)), mine)
        callbacks.insert(first, callbacks.pop(mine))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the plain model behind; this callback keeps the larger tensors for saving and a later fit."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the plain model and the plain optimizers behind, whatever was going on."""
        self._detach()
        if isinstance(exception, KeyError) and "contains only the model" in str(exception):
            rank_zero_info(_WEIGHTS_ONLY)  # Lightning tells why it cannot resume, and no hook comes before

    def _take_out_patches(self) -> None:
        while self._patches:
            self._patches.pop().remove()

    def _detach(self) -> None:
        self._take_out_patches()
        if self.engine is not None and self.engine.attached:
            self.engine.detach()
            take_out_copies(self._model)
        self.batchnorm.detach()

    # ------------------------------------------------------------------ training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch for BatchNorm layers' inputs; every layer exists by now, and is the one that is trained."""
        self.batchnorm.attach(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the larger tensors around the weights as they are now, and show the table."""
        engine = self._running()
        engine.progress = self._progress(trainer)
        engine.start(trainer.optimizers)
        show(trainer, self.verbose, plan_table(engine.plan, brief=True))
        describe_run(trainer, self)
        if anneals(self.rules) and part_done(trainer) is None:
            rank_zero_warn(
                "SimulatedOverparam: annealing needs to know the length of the training; set max_steps, or max_epochs with "
                "a data loader of known length, or anneal=0 in the method. The mix is not annealed."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Mixed weights for the training forward."""
        engine = self._running()
        self.batchnorm.begin_step()
        engine.progress = self._progress(trainer)
        renewed = list(map(id, engine.optimizers)) != list(map(id, trainer.optimizers))
        if renewed or not all(form.built for form in engine.forms.values()):  # unfrozen since, perhaps
            engine.start(trainer.optimizers)
        if getattr(trainer.fit_loop, "_skip_backward", False):
            engine.mean_in()  # StochasticWeightAveraging's pass for the BatchNorm statistics of its average
        else:
            engine.mix_in()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collapsed weights where a callback is about to average them."""
        if any(averages(callback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            self._running().mean_in()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collapsed weights between epochs, for whoever reads or writes them there."""
        self._running().check_layers(pl_module)
        self._reestimate(trainer, pl_module)
        self._running().mean_in()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collapsed weights; ``eval()`` has seen to it, except in modules that are in eval mode all the time."""
        if self.engine is not None and self.engine.attached:
            self.engine.hold(True)
            self._reestimate(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on ``train()`` brings the mix back; in between a network in training mode has the collapsed weights."""
        if self.engine is not None:
            self.engine.hold(False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The collapsed weights are the result; from here on weights are what anybody makes them."""
        self._running().release()
        self._reestimate(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """BatchNorm statistics for the collapsed weights; the checkpoint's entries are the buffers themselves."""
        if self._model is not None and self._model is not pl_module:  # saved by an earlier Trainer
            checkpoint.get("callbacks", {}).pop(self.state_key, None)
            rank_zero_warn(_ANOTHER_MODEL)
            return
        if self.engine is not None:
            self.engine.check_layers(pl_module)
        self._reestimate(trainer, pl_module)

    def _reestimate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with LateBar(trainer, "BatchNorm statistics of the collapsed weights") as bar:
            self.batchnorm.run(pl_module, trainer.precision_plugin.forward_context(), bar.show)

    def _progress(self, trainer: Trainer) -> float:
        return (part_done(trainer) or 0.0) if anneals(self.rules) else 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_patches": []}  # a copy has changed no methods

    def _running(self) -> Engine:
        if self.engine is None:
            raise RuntimeError("SimulatedOverparam: training has begun without Callback.setup having been called")
        return self.engine

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The larger tensors, their optimizer moments, mixes and random generator, as plain data."""
        return {} if self.engine is None else self.engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, bitwise; its weights are loaded already."""
        if state_dict and self.engine is not None:
            self.engine.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Recognize checkpoints that hold nothing for this callback, or something for one that selects otherwise."""
        if self.engine is None or not self.engine.attached:
            return
        states = checkpoint.get("callbacks", {})
        if self.state_key in states:
            return
        others = [key for key in states if key.startswith(type(self).__qualname__)]
        if others and not any(isinstance(c, SimulatedOverparam) and c.state_key in others for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                f"The checkpoint was trained with {', '.join(others)}, this run has {self.state_key}. Resume with the same "
                "include, exclude, layers and rules, or start a new run from the checkpoint's weights."
            )
        self.engine.near = True
        rank_zero_info(
            "SimulatedOverparam: the checkpoint is one of the plain model. Its weights are kept; the larger tensors are "
            "made close around them."
        )


def _write(save: Callable[..., Any], checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """Save a checkpoint in which the modules, such as those among hyper-parameters, are plain."""
    save(without_forms(checkpoint), *args, **kwargs)
