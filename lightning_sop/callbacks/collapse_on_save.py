"""CollapseOnSave: beside every checkpoint the small plain one, with a proof."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_sop.callbacks import _deploy_links as links
from lightning_sop.callbacks._deploy_job import Export, WriteJob, proven_content
from lightning_sop.callbacks._deploy_table import deploy_table
from lightning_sop.callbacks._probe import ProbeRecorder
from lightning_sop.callbacks._strategies import SHARDING, refuse_other_lightning
from lightning_sop.callbacks._terminal import show
from lightning_sop.callbacks._wandb_artifacts import job_of, upload_remaining
from lightning_sop.callbacks._wandb_runs import wandb_loggers
from lightning_sop.deploy import files
from lightning_sop.deploy.errors import CollapseError
from lightning_sop.deploy.names import Format, deploy_path
from lightning_sop.deploy.own_names import OwnNames
from lightning_sop.deploy.weights import export_dtype
from lightning_sop.plugins import install

Only = Literal["all", "best", "last"]
OnMismatch = Literal["raise", "warn"]

_TEMPORARY = (".lr_find_", ".scale_batch_size_")  # what the tuners save and remove again
_ANOTHER_TRAINER = (
    "CollapseOnSave has been set up by another Trainer since, and makes deploy files for that one only. To have them for "
    "what an earlier Trainer saves later, give each a callback of its own."
)


class CollapseOnSave(Callback):
    """Write a plain deploy file beside every checkpoint that the Trainer saves.

    ``best.ckpt`` gets a ``best.deploy.ckpt``: the model's own architecture, hyper-parameters and weights and nothing of
    the training, to be loaded strictly with ``Model.load_from_checkpoint`` where this package is not installed. Before
    it takes its name it is read back and compared with weights recomputed from the training method's own tensors; what
    was measured stands in its receipt (``lightning_sop.deploy.read(path).receipt``).

    Args:
        format: ``"ckpt"``, or ``"safetensors"`` with hyper-parameters and receipt as JSON metadata. Two callbacks of
            different formats may be in one Trainer.
        dtype: Cast floating point tensors of the deploy file to ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        only: Write for ``"all"`` checkpoints, or only for a ModelCheckpoint's ``"best"`` or ``"last"``; deploy files
            that are no longer best or last are removed.
        keep_training_file: False removes the training checkpoint once its deploy file is written; training cannot
            resume from it then.
        tolerance: Largest relative difference of outputs and weights that is accepted; None takes 1e-4, for weights in
            float16 2e-2 and in bfloat16 1e-1, and for outputs what the coarsest of the parameters has.
        on_mismatch: ``"raise"`` a :class:`~lightning_sop.deploy.CollapseError` where it is exceeded, or ``"warn"``. The
            training checkpoint is kept and no deploy file is written either way.
        log_artifact: With a WandbLogger, log deploy files as artifacts of W&B, with their receipts as metadata: True those
            that are there when the run ends, ``"all"`` each as soon as it is written. As the logger's own ``log_model``
            does with training checkpoints, and independent of it.
        verbose: Print a table of the deploy files when training ends; default on a terminal or in a notebook.

    Raises:
        ValueError: An option is unknown, or does not fit the Trainer (at the start of ``fit``).
    """

    def __init__(
        self,
        format: Format = "ckpt",
        dtype: Literal["bfloat16", "float16", "float32"] | None = None,
        only: Only = "all",
        keep_training_file: bool = True,
        tolerance: float | None = None,
        on_mismatch: OnMismatch = "raise",
        log_artifact: bool | Literal["all"] = False,
        verbose: bool | None = None,
    ) -> None:
        deploy_path("", format)  # raises if the format is unknown
        export_dtype(dtype)
        for name, value, allowed in (("only", only, Only), ("on_mismatch", on_mismatch, OnMismatch)):
            if value not in get_args(allowed):
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, get_args(allowed)))}.")
        if log_artifact not in (True, False, "all"):
            raise ValueError(f"log_artifact={log_artifact!r} is unknown; choose True, False or 'all'.")
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"tolerance={tolerance} must be a number of at least 0, or None.")
        self.format, self.dtype, self.only = format, dtype, only
        self.keep_training_file, self.tolerance, self.on_mismatch = keep_training_file, tolerance, on_mismatch
        self.log_artifact, self.verbose = log_artifact, verbose
        self._trainer: pl.Trainer | None = None
        self._probe = ProbeRecorder()
        self._own_names = OwnNames()
        self._foreign_keys: frozenset[str] = frozenset()
        self._written: dict[str, dict[str, Any]] = {}  # receipts by training file
        self._earlier: set[str] = set()  # training files of the runs that this one resumes
        self._links: set[str] = set()
        self._unsynced = False

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_other_lightning(pl_module, "CollapseOnSave")
            self._check(trainer)
        if trainer is not self._trainer:
            # Files of another run are not ours to remove.
            self._trainer, self._written, self._earlier, self._links = trainer, {}, set(), set()
        install(trainer.strategy, _Writer(self, trainer))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._probe.attach(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._earlier = links.known_paths(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._unsynced:
            self.sync()
        self._probe.open()

    def on_train_batch_end(self, *_: Any) -> None:
        self._probe.close()

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._probe.open()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._probe.close()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        # The module's own hook comes after the callbacks': what is there now is not the module's.
        self._foreign_keys = frozenset(checkpoint)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.sync()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.sync()
        chosen = [path for path in self._written if self._chosen(trainer, path)]
        kept = {deploy_path(path, self.format): self._written[path] for path in chosen}
        if kept:
            show(trainer, self.verbose, deploy_table(kept))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._probe.close()
        self.sync()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.sync()
        self._probe.detach()
        if stage == "fit" and self.log_artifact is True and trainer.is_global_zero:
            upload_remaining(trainer, self._written, self.format)

    def __getstate__(self) -> dict[str, Any]:
        # Pickled with the Trainer by launchers, and copied by users: both begin anew.
        return {**self.__dict__, "_trainer": None, "_probe": ProbeRecorder(), "_own_names": OwnNames()}

    # ------------------------------------------------------------------ what DeployCheckpointIO asks for

    def prepare(self, checkpoint: dict[str, Any], path: str) -> Callable[[], object] | None:
        """Make the content of the deploy file and prove it; the job that is returned writes it."""
        foreign, self._foreign_keys = self._foreign_keys, frozenset()
        assert self._trainer is not None
        if not self._wanted(checkpoint, path):
            return None
        target = deploy_path(path, self.format)
        options = Export(target, self.format, export_dtype(self.dtype), self.tolerance, self._own_names)
        try:
            content = proven_content(self._trainer, checkpoint, path, options, self._probe, foreign)
        except CollapseError as error:
            self._written.pop(path, None)
            files.remove(target)  # of an earlier save under the same name: no longer what the checkpoint holds
            if self.on_mismatch == "raise":
                raise
            warnings.warn(str(error), stacklevel=2)  # only one process writes
            return None
        namesake = next((p for p in self._written if p != path and deploy_path(p, self.format) == target), None)
        if namesake is not None:
            del self._written[namesake]
            warnings.warn(f"{target} is that of {path} from now on, no longer that of {namesake}.", stacklevel=2)
        self._written[path] = content.receipt
        self._unsynced = True
        write = WriteJob(path, content, options, self.keep_training_file, wanted=lambda: path in self._written)
        return job_of(write, self._trainer, self.log_artifact)

    def remove(self, path: str) -> None:
        """The Trainer has removed a checkpoint."""
        self._written.pop(path, None)  # first: another thread that is about to write the file asks for it afterwards
        files.remove(deploy_path(path, self.format))
        self._links.discard(deploy_path(path, self.format))
        self._unsynced = True

    def sync(self) -> None:
        """Bring links, and the choice of best or last, up to what the ModelCheckpoints hold now."""
        trainer = self._trainer
        if trainer is None or not trainer.is_global_zero:
            return
        self._unsynced = False
        pairs = {}
        for callback in links.model_checkpoints(trainer):
            link = links.last_link(callback)
            if link is not None:
                pairs[deploy_path(link[0], self.format)] = deploy_path(link[1], self.format)
        for path in self._earlier | self._written.keys():
            if not self._chosen(trainer, path):
                files.remove(deploy_path(path, self.format))
        for name in self._links - pairs.keys():
            if os.path.islink(name) and not os.path.exists(name):
                files.remove(name)
        self._links |= pairs.keys()
        for name, target in pairs.items():
            if not links.mirror(name, target):
                self._unsynced = True  # another thread may not have written it yet

    # ------------------------------------------------------------------ inside

    def _chosen(self, trainer: pl.Trainer, path: str) -> bool:
        """Whether a checkpoint is one of those that are deployed."""
        return self.only == "all" or (links.is_best if self.only == "best" else links.is_last)(trainer, path)

    def _check(self, trainer: pl.Trainer) -> None:
        """Refuse what cannot work in this Trainer."""
        strategy = type(trainer.strategy).__name__
        if strategy in SHARDING:
            raise ValueError(f"CollapseOnSave needs the whole model in one process, which {strategy} does not offer.")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        twins = [c for c in callbacks if isinstance(c, CollapseOnSave) and c.format == self.format]
        if len(twins) > 1:
            raise ValueError(
                f"Two CollapseOnSave callbacks would write the same files; give them formats besides {self.format!r}."
            )
        checkpoints = links.model_checkpoints(trainer)
        if self.only == "best" and not checkpoints:
            raise ValueError("CollapseOnSave(only='best') needs a ModelCheckpoint in the Trainer.")
        if self.only == "last" and not any(callback.save_last for callback in checkpoints):
            raise ValueError("CollapseOnSave(only='last') needs a ModelCheckpoint(save_last=True) in the Trainer.")
        if self.log_artifact and not wandb_loggers(trainer):
            raise ValueError(f"CollapseOnSave(log_artifact={self.log_artifact!r}) needs a WandbLogger in the Trainer.")
        if not self.keep_training_file and any(map(links.links_last, checkpoints)):
            raise ValueError("ModelCheckpoint(save_last='link') would link to a file that keep_training_file=False removes.")

    def _wanted(self, checkpoint: dict[str, Any], path: str) -> bool:
        assert self._trainer is not None
        if os.path.basename(path).startswith(_TEMPORARY) or "state_dict" not in checkpoint:
            return False  # without that entry it is what spawning launchers pass between processes
        if self.only == "best":
            return links.is_best(self._trainer, path)
        return self.only == "all" or links.is_last(self._trainer, path) or links.may_become_last(self._trainer, path)


class _Writer:
    """A callback as the writer of one Trainer's strategy; equal to any other one of the callback.

    Args:
        callback: that prepares the files.
        trainer: that saves; None after unpickling, until ``setup`` puts another writer in the place of this one.
    """

    def __init__(self, callback: CollapseOnSave, trainer: pl.Trainer | None = None) -> None:
        self.callback = callback
        self._trainer = None if trainer is None else weakref.ref(trainer)
        self.remove, self.sync = callback.remove, callback.sync

    def prepare(self, checkpoint: dict[str, Any], path: str) -> Callable[[], object] | None:
        """Nothing for a Trainer whose callback is another one's by now: module, calls and kernels are that one's."""
        if self._trainer is None or self._trainer() is not self.callback._trainer:
            warnings.warn(f"{_ANOTHER_TRAINER} None is written beside {path}.", stacklevel=2)
            return None
        return self.callback.prepare(checkpoint, path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Writer) and self.callback is other.callback

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Writer, (self.callback,)
