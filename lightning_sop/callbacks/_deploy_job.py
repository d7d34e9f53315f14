"""The content of a deploy file, proven while the Trainer saves, and the job that writes it afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_sop.callbacks._plain_copy import load_as_lightning_does, plain_copy
from lightning_sop.callbacks._probe import ProbeRecorder
from lightning_sop.deploy import files, store
from lightning_sop.deploy.content import AVERAGED, DeployContent, dumps, from_checkpoint, loads
from lightning_sop.deploy.names import Format
from lightning_sop.deploy.own_names import OwnNames, with_names
from lightning_sop.deploy.prove import prove
from lightning_sop.deploy.receipt import make_receipt
from lightning_sop.deploy.tolerance import Tolerance
from lightning_sop.deploy.weights import State, plain_name, shared_names


@dataclass(frozen=True)
class Export:
    """How one deploy file is to be written."""

    target: str
    format: Format
    dtype: torch.dtype | None
    tolerance: float | None
    own_names: OwnNames


@dataclass(frozen=True)
class WriteJob:
    """Writes a deploy file once its training file is there, unless that was removed again in the meantime."""

    path: str
    content: DeployContent
    export: Export
    keep_training_file: bool
    wanted: Callable[[], bool]

    def __call__(self) -> bool:
        """Do it; says whether the file is there."""
        written = self._write()
        if not self.keep_training_file:
            files.remove(self.path)
        return written

    def _write(self) -> bool:
        if not self.wanted():
            return False
        store.write(self.export.target, self.content, self.export.format)
        if not self.wanted():  # it was removed before it was there
            files.remove(self.export.target)
            return False
        sibling, local = files.local_path(self.path), files.local_path(self.export.target)
        if sibling is not None and local is not None:
            # fit(ckpt_path="last") takes the youngest file whose name starts with "last", and must not take this one.
            with contextlib.suppress(FileNotFoundError):  # another thread may have removed one, no longer best or last
                moment = os.stat(sibling).st_mtime - 1.0
                os.utime(local, (moment, moment))
        return True


def proven_content(
    trainer: pl.Trainer,
    checkpoint: Mapping[str, Any],
    path: str,
    export: Export,
    probe: ProbeRecorder,
    foreign: frozenset[str],
) -> DeployContent:
    """Take the plain model out of a checkpoint that is being saved, and measure it.

    Args:
        trainer: Its callbacks' ``collapsed_weights(module)`` are one side of the measurement.
        checkpoint: What Lightning dumped; it is not changed.
        path: Where the training file goes.
        export: How the deploy file is written; its bytes, read back, are the other side.
        probe: Calls to compare outputs on.
        foreign: Top-level entries of the checkpoint that are not the module's own.

    Raises:
        CollapseError: The two sides differ by more than the tolerance, or the plain model cannot load the content.
    """
    module = trainer.lightning_module
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is not None:
        foreign |= {type(datamodule).__qualname__}
    content = from_checkpoint(
        checkpoint, format=export.format, dtype=export.dtype, ties=shared_names(module), ignore=foreign
    )
    # The receipt goes into the file that it is about: what is measured is the file without it, and write() checks by the
    # hash that the final file holds the same weights.
    deployed = loads(dumps(content, export.format), export.target)
    averaged = AVERAGED in checkpoint
    recomputed = {} if averaged else _recomputed_weights(trainer)
    reference = replace(content, state_dict=_reference_state(checkpoint["state_dict"], recomputed))
    parameters = {plain_name(name) for name, _ in module.named_parameters()}
    tolerance = Tolerance(export.tolerance, reference.state_dict, deployed.state_dict, parameters=parameters)
    proof = prove(
        partial(plain_copy, module),
        load_as_lightning_does,
        reference=reference,
        recomputed=recomputed,
        deployed=deployed,
        calls=probe.calls,
        tolerance=tolerance,
        note=probe.missed,
    )
    proof.check(tolerance, export.target)
    names, remark = export.own_names.of(module, checkpoint["state_dict"], content)
    content = with_names(content, names)
    proof = replace(proof, note="; ".join(filter(None, (proof.note, remark))))
    receipt = make_receipt(
        content,
        proof,
        source="averaged" if averaged else "kernels" if recomputed else "plain",
        training_file=os.path.basename(path),
        step=checkpoint.get("global_step"),
        epoch=checkpoint.get("epoch"),
        tolerance=tolerance,
    )
    return replace(content, receipt=receipt)


def _recomputed_weights(trainer: pl.Trainer) -> dict[str, Tensor]:
    """Collapsed weights, by plain name, from the own tensors of every callback that trains through others."""
    weights: dict[str, Tensor] = {}
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        recompute = getattr(callback, "collapsed_weights", None)
        if recompute is not None:
            weights.update(
                {plain_name(name): weight.detach() for name, weight in recompute(trainer.lightning_module).items()}
            )
    return weights


def _reference_state(state: Mapping[str, Any], recomputed: Mapping[str, Tensor]) -> State:
    """The state as it is being saved (not its copy in the file), with every recomputed weight in the saved one's place."""
    reference = {plain_name(name): value for name, value in state.items()}
    for name, weight in recomputed.items():
        if name in reference:
            reference[name] = weight.to(reference[name].dtype)
    return reference
