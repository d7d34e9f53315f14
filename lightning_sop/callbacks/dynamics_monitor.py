"""DynamicsMonitor: what happens in a run, in its logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sop.callbacks._monitor_draws import Draws
from lightning_sop.callbacks._monitor_growth import Seams
from lightning_sop.callbacks._monitor_layers import Target, engines_of, targets_of
from lightning_sop.callbacks._monitor_loggers import Media, Outlets
from lightning_sop.callbacks._monitor_losses import Losses
from lightning_sop.callbacks._monitor_measure import Measurement
from lightning_sop.callbacks._monitor_names import MOST_LAYERS, Album, numbers_of, rows_of
from lightning_sop.callbacks._strategies import refuse_other_lightning, refuse_sharding
from lightning_sop.callbacks._wandb_runs import describe_run
from lightning_sop.dynamics.quantities import MONITOR, TABLE, matching
from lightning_sop.dynamics.quantity import LARGEST

FORMAT = 1


class DynamicsMonitor(Callback):
    """Measure what happens in a run, and log it: kernels, weights, updates, gradients, losses, optimizer state, growth.

    Everything is in the table of docs/reference/quantities.md. The run is left as it is, bit for bit, and no failure to
    measure or to log stops it: what fails is told once and then left out. Between two measurements no device is waited for;
    a measurement fetches its numbers together. What is logged bears the step of Lightning's own logging.

    Works with any number of loggers, devices (DDP) and optimizers, with accumulation and manual optimization, with and
    without :class:`~lightning_sop.SimulatedOverparam` and :class:`~lightning_sop.DeepFusionGrow`. Losses on copies
    (``loss/…``, and those of a growth) need a ``training_step`` that works outside of its Trainer, and automatic
    optimization. Spectra are left out for matrices whose smaller side is above 2048.

    Args:
        quantities: names or shell-style patterns of the table; default the rows that it marks. ``["*"]`` is everything.
        every: optimizer steps between two measurements; the first step is measured.
        slow: measurements between two that take the slow rows in, too.
        layers: patterns of names of layers, or of modules around them. Default: the weights that ``SimulatedOverparam``
            trains in a larger form; without it those of all linear, convolutional and recurrent layers.
        per_layer: log each layer besides the means. ``"auto"``: where there are at most 30, or where ``layers`` is given.
        media: histograms, and pictures of tables. ``"auto"``: where the logger takes them, which are those of W&B and of
            TensorBoard; True also warns where none does.
        name: tells two callbacks of this class apart in checkpoints.

    Raises:
        ValueError: an argument is outside its range; at the start of fit, a pattern of layers matches nothing.
    """

    def __init__(
        self,
        quantities: list[str] | None = None,
        every: int = 50,
        slow: int = 25,
        layers: list[str] | None = None,
        per_layer: bool | Literal["auto"] = "auto",
        media: bool | Literal["auto"] = "auto",
        name: str | None = None,
    ) -> None:
        for option, value in (("every", every), ("slow", slow)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"DynamicsMonitor: {option} must be a whole number, at least 1, not {value!r}")
        for option, patterns in (("quantities", quantities), ("layers", layers)):
            if isinstance(patterns, str):
                raise ValueError(f"DynamicsMonitor: {option} takes a list, not the single string {patterns!r}")
        for option, switch in (("per_layer", per_layer), ("media", media)):
            if switch not in (True, False, "auto"):
                raise ValueError(f"DynamicsMonitor: {option} must be True, False or 'auto', not {switch!r}")
        self.rows = rows_of(quantities)
        self.quantities, self.layers = quantities, layers
        self.every, self.slow = every, slow
        self.per_layer, self.media, self.name = per_layer, media, name
        self._forget()

    @property
    def state_key(self) -> str:
        """Tells apart the monitors of a run in a checkpoint."""
        return type(self).__qualname__ if self.name is None else f"{type(self).__qualname__}[{self.name}]"

    def _forget(self) -> None:
        """What lasts for one call of fit."""
        self._draws, self._album, self._losses = Draws(), Album(), Losses()
        self._latest, self._failed = -1, False
        self._outlets: Outlets | None = None
        self._seams: Seams | None = None
        self._hooks: list[RemovableHandle] = []
        self._measurement: Measurement | None = None
        self._module: LightningModule | None = None
        self._trainer: Trainer | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickled ones begin a run of their own.
        kept = ("rows", "quantities", "layers", "every", "slow", "per_layer", "media", "name")
        names = [row.name for row in self.rows]
        return {name: getattr(self, name) for name in kept} | {"rows": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rows = [row for row in TABLE if row.name in state["rows"]]
        self._forget()

    # ------------------------------------------------------------------ begin and end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing of an earlier run."""
        if stage == "fit":
            refuse_other_lightning(pl_module, "DynamicsMonitor")
            self._leave()
            self._forget()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what there is to measure and who takes it."""
        if not trainer.loggers:
            rank_zero_warn("DynamicsMonitor: the Trainer has no logger, so nothing is measured.")
            return
        try:
            refuse_sharding(trainer, "DynamicsMonitor", "Nothing is measured.")
        except MisconfigurationException as error:
            rank_zero_warn(str(error))
            return
        describe_run(trainer, self)
        targets = targets_of(trainer, pl_module, self.layers)
        self._say_what_is_missing(trainer, pl_module, targets)
        self._outlets = Outlets(trainer, self.media)
        self._trainer, self._module = trainer, pl_module
        self._seams = Seams(trainer, {row.name for row in self.rows}, self._losses, self._guarded, self._grown)

    def _say_what_is_missing(self, trainer: Trainer, module: LightningModule, targets: Sequence[Target]) -> None:
        missing = set() if engines_of(trainer) else {"kernels", "loss"}
        missing |= set() if module.automatic_optimization else {"loss"}
        for pattern in self.quantities or ():
            if {row.section for row in matching([pattern]) if row.logged_by == MONITOR} <= missing:
                rank_zero_warn(
                    f"DynamicsMonitor: there is no {pattern} in this run. It takes SimulatedOverparam, and loss/… automatic "
                    "optimization."
                )
        large = [target.name for target in targets if min(target.matrix_shape) > LARGEST]
        if large and any(row.name.endswith(("rank", "ranks", "spectrum")) for row in self.rows):
            rank_zero_info(f"DynamicsMonitor: no spectra of {', '.join(large)}: their smaller side is above {LARGEST}.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind; no teardown follows."""
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._leave()

    def _listen(self, trainer: Trainer) -> None:
        """Hear of the optimizers' steps, after everybody else who changes what a step has done."""
        self._hear_nothing()
        hookable = [optimizer for optimizer in trainer.optimizers if hasattr(optimizer, "register_step_post_hook")]
        self._hooks = [optimizer.register_step_post_hook(self._after_step) for optimizer in hookable]

    def _hear_nothing(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _leave(self) -> None:
        self._hear_nothing()
        if self._seams is not None:
            self._seams.close()
        self._seams, self._outlets, self._measurement = None, None, None
        self._module = self._trainer = None

    # ------------------------------------------------------------------ training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a measurement where one is due."""
        if self._outlets is not None:
            self._guarded(lambda: self._begin(trainer, pl_module, batch, batch_idx))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The gradients, unscaled and not yet clipped."""
        measurement = self._measurement
        if measurement is not None:
            self._guarded(lambda: measurement.gradients(trainer, pl_module, optimizer))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        measurement, trainer, module = self._measurement, self._trainer, self._module
        if measurement is not None and trainer is not None and module is not None:
            self._guarded(lambda: measurement.gradients(trainer, module, optimizer))  # of a step that Lightning did not see
            self._guarded(lambda: measurement.stepped(optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was measured, when the step is complete."""
        measurement = self._measurement
        if measurement is not None and not trainer.fit_loop._should_accumulate():
            self._measurement = None
            self._hear_nothing()
            self._guarded(lambda: self._log(trainer, measurement))

    def _begin(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        engines = engines_of(trainer)
        if trainer.is_global_zero and not self._failed:
            self._draws.collect(engines)
        step = _step(trainer)
        if step % self.every or step == self._latest:
            return
        self._latest, self._measurement = step, None
        slow, media = step // self.every % self.slow == 0, self._outlets is not None and self._outlets.media
        rows = [row for row in self.rows if (slow or not row.slow) and (media or row.kind == "scalar")]
        losses = None
        if any(row.section == "loss" for row in rows):
            losses = self._losses.gap(trainer, module, batch, index)
        if not trainer.is_global_zero or self._failed:
            return
        measurement = Measurement(rows, targets_of(trainer, module, self.layers), step)
        if losses is not None:
            mixed, collapsed = losses
            for name, value in (("mixed", mixed), ("collapsed", collapsed), ("gap", mixed - collapsed)):
                measurement.add(f"loss/{name}", "", value)
        known = {target.name for target in measurement.targets}
        for layer, (squares, entropy) in self._draws.take(engines).items():
            if layer in known:
                measurement.add("kernels/amplification", layer, squares)
                measurement.add("kernels/entropy", layer, entropy)
        measurement.start()
        self._measurement = measurement
        self._listen(trainer)

    def _log(self, trainer: Trainer, measurement: Measurement) -> None:
        measurement.remembered(trainer.optimizers)
        values = measurement.finish()
        each = self._each(len(measurement.targets))
        media = []
        if self._outlets is not None and self._outlets.media:
            media = self._album.media_of(values, measurement.step, per_layer=each)
        self._send(numbers_of(values, per_layer=each), media, measurement.step)

    def _grown(self, trainer: Trainer, found: dict[str, float]) -> None:
        if trainer.is_global_zero and found and not self._failed:
            text = [Media("growth/event", "text", "The network grows.")] if "growth/event" in found else []
            self._send(found, text, _step(trainer))

    def _send(self, numbers: dict[str, float], media: Sequence[Media], step: int) -> None:
        assert self._outlets is not None
        self._outlets.send(numbers, media, step)
        if not self._outlets.open:  # all have failed, and said so
            self._stop()

    def _each(self, layers: int) -> bool:
        if self.per_layer == "auto":
            return layers <= MOST_LAYERS or self.layers is not None
        return self.per_layer

    def _guarded(self, act: Callable[[], None]) -> None:
        """Nothing that goes wrong here is the run's business."""
        try:
            act()
        except Exception as error:
            rank_zero_warn(
                f"DynamicsMonitor: measuring failed ({type(error).__name__}: {error}). Nothing more is measured; the run "
                "goes on."
            )
            self._stop()

    def _stop(self) -> None:
        """Measure nothing more. Other ranks, which may wait for this one, learn of it when losses are due again."""
        self._measurement, self._failed, self._losses.wanted = None, True, False

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What has been gathered since the last measurement, and the tables that grow with time; plain data."""
        return {
            "format": FORMAT,
            "latest": self._latest,
            "draws": self._draws.state_dict(),
            "history": self._album.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run was saved; a state of another format is left aside."""
        if state_dict.get("format") != FORMAT:
            rank_zero_warn(f"DynamicsMonitor: the checkpoint's state has format {state_dict.get('format')}, not {FORMAT}.")
            return
        self._latest = state_dict["latest"]
        self._draws.load_state_dict(state_dict["draws"])
        self._album.load_state_dict(state_dict["history"])


def _step(trainer: Trainer) -> int:
    """Where Lightning's own logging is: batches after which an optimizer stepped."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
