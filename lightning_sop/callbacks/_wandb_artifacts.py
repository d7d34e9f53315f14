"""Deploy files as artifacts of W&B, with their receipts as metadata."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_sop.callbacks._deploy_job import WriteJob
from lightning_sop.callbacks._deploy_links import is_best
from lightning_sop.callbacks._wandb_runs import wandb_loggers
from lightning_sop.deploy import files, store
from lightning_sop.deploy.names import Format, deploy_path, format_of


@dataclass(frozen=True)
class WriteAndUpload:
    """Writes a deploy file and hands it to W&B at once, before it may be removed again."""

    write: WriteJob
    trainer: Trainer
    best: bool  # when it was saved: another thread may write it when the next one is the best already

    def __call__(self) -> None:
        if self.write():
            upload(self.trainer, self.write.export.target, self.write.content.receipt, best=self.best)


def job_of(write: WriteJob, trainer: Trainer, when: object) -> Callable[[], object]:
    """What is to be done once a training checkpoint is written.

    Args:
        write: writes its deploy file.
        trainer: of the run.
        when: the option ``log_artifact``.
    """
    return WriteAndUpload(write, trainer, is_best(trainer, write.path)) if when == "all" else write


def upload_remaining(trainer: Trainer, paths: Iterable[str], format: Format) -> None:
    """Hand W&B those deploy files that are still there at the end, the youngest last.

    Args:
        trainer: of the run.
        paths: of training checkpoints beside which deploy files were written.
        format: of these.
    """
    best = {deploy_path(path, format): is_best(trainer, path) for path in paths}
    for target in sorted((target for target in best if files.exists(target)), key=_age):
        upload(trainer, target, store.read(target).receipt, best=best[target])


def upload(trainer: Trainer, path: str, receipt: Mapping[str, Any], *, best: bool) -> None:
    """Log a deploy file in every run of W&B; what goes wrong is told and does not stop the training.

    Args:
        trainer: of the run.
        path: of the deploy file.
        receipt: that it holds.
        best: whether it is the best of a ModelCheckpoint.
    """
    format, local = format_of(path), files.local_path(path)
    try:
        if local is None:
            raise ValueError("W&B takes local files")
        import wandb  # only where there is a WandbLogger

        for logger in wandb_loggers(trainer):
            run = logger.experiment
            name = f"deploy-{run.id}" if format == "ckpt" else f"deploy-{run.id}-{format}"
            artifact = wandb.Artifact(name, type="model", metadata={**receipt, "original_filename": os.path.basename(path)})
            artifact.add_file(local, name=f"deploy.{format}")
            run.log_artifact(artifact, aliases=["latest", "best"] if best else ["latest"])
    except Exception as error:
        rank_zero_warn(f"CollapseOnSave: {path} is no artifact of W&B ({type(error).__name__}: {error}). The file is there.")


def _age(path: str) -> float:
    local = files.local_path(path)
    return 0.0 if local is None else os.path.getmtime(local)
