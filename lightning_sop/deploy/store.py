"""Write, read and check deploy files, and make them of training checkpoints after the fact."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_sop.deploy.content import AVERAGED, RECEIPT, DeployContent, dumps, from_checkpoint, load_plain, loads
from lightning_sop.deploy.errors import DeployFileError
from lightning_sop.deploy.files import Path, read_bytes, write_atomically
from lightning_sop.deploy.names import Format, format_of
from lightning_sop.deploy.own_names import STRIPPED, compiled_names, with_names
from lightning_sop.deploy.receipt import FORMAT_VERSION, Proof, make_receipt
from lightning_sop.deploy.replay import NO_DIFFERENCE
from lightning_sop.deploy.tolerance import Tolerance, compare_weights
from lightning_sop.deploy.weights import equal_names, export_dtype, plain_name, sha256


def write(path: Path, content: DeployContent, format: Format | None = None) -> None:
    """Write a deploy file, atomically; it is read back and its weights hashed before it takes its name.

    Args:
        path: Path or fsspec URL; missing folders are made.
        content: What to write, receipt included.
        format: ``"ckpt"`` or ``"safetensors"``; by the file's name if None.

    Raises:
        DeployFileError: What was read back is not what was written.
        CollapseError: The format cannot carry the content.
    """
    write_atomically(path, dumps(content, format or format_of(path)), verify)


def read(path: Path) -> DeployContent:
    """Read a deploy file of either format, running no code of it.

    Args:
        path: A local file or an fsspec URL.

    Raises:
        FileNotFoundError: There is no such file.
        DeployFileError: The file is corrupt, truncated, of a later format, or no deploy file.
    """
    name = os.fspath(path)
    content = loads(read_bytes(path), name)
    version = content.receipt.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise DeployFileError(f"{name} has format version {version}, this lightning_sop reads {FORMAT_VERSION}; update it.")
    return content


def verify(path: Path) -> dict[str, Any]:
    """Check that a deploy file's weights are those of its receipt, and return the receipt.

    Args:
        path: A deploy file of either format.

    Raises:
        FileNotFoundError: There is no such file.
        DeployFileError: The file cannot be read, or its weights were changed after they were measured.
    """
    content = read(path)
    if sha256(content.state_dict) != content.receipt.get("sha256"):
        raise DeployFileError(
            f"{os.fspath(path)} was changed after it was written: its weights do not have the hash of its receipt. "
            "Copy it again, or write it anew from the training checkpoint with `lightning-sop collapse`."
        )
    return content.receipt


def load_into(module: nn.Module, path: Path, strict: bool = True) -> dict[str, Any]:
    """Load a deploy file into a module, compiled in parts or not, and return the receipt.

    Args:
        module: The plain model.
        path: A deploy file of either format.
        strict: Whether names that are missing or unexpected are an error.

    Raises:
        FileNotFoundError, DeployFileError: As :func:`read`.
        RuntimeError: The names (if strict) or shapes are not the module's.
    """
    content = read(path)
    names = {plain_name(name): name for name in module.state_dict()}
    state = {names.get(plain_name(name), name): value for name, value in content.state_dict.items()}
    module.load_state_dict(state, strict=strict)
    return content.receipt


def collapse_file(source: Path, target: Path, dtype: str | None = None, keep_compiled_names: bool = False) -> dict[str, Any]:
    """Make a deploy file of a training checkpoint and return its receipt.

    No model is built, so weights are compared and outputs are not: with the method's own tensors, where the checkpoint
    has them.

    Args:
        source: A checkpoint that Lightning wrote, with or without SimulatedOverparam.
        target: The deploy file; its suffix decides the format.
        dtype: ``"bfloat16"``, ``"float16"``, ``"float32"``, or None to keep each tensor's own.
        keep_compiled_names: Names lose the ``_orig_mod.`` that ``torch.compile`` gives them. True keeps it, as it must be
            for a class that compiles parts in its own ``__init__`` and so has such names in its plain form, too.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        DeployFileError: The source is corrupt, truncated, a deploy file already, or no Lightning checkpoint.
        CollapseError: The weights are not the collapse of the method's tensors; nothing is written.
    """
    name, format = os.fspath(source), format_of(target)
    checkpoint = load_plain(read_bytes(source), name)
    if RECEIPT in checkpoint:
        raise DeployFileError(f"{name} is a deploy file already.")
    if not isinstance(checkpoint.get("state_dict"), Mapping):
        raise DeployFileError(f"{name} is no Lightning checkpoint: it has no 'state_dict'.")
    ties = equal_names(checkpoint["state_dict"])
    content = from_checkpoint(checkpoint, format=format, dtype=export_dtype(dtype), ties=ties)
    averaged, forms = AVERAGED in checkpoint, _collapsed_from_callbacks(checkpoint)
    trained = {plain_name(key): value for key, value in checkpoint["state_dict"].items()}
    tolerance = Tolerance(None, trained, content.state_dict)
    weights = NO_DIFFERENCE if averaged else compare_weights(forms, content.state_dict, tolerance)
    compiled = compiled_names(checkpoint["state_dict"])
    stripped = f"; {STRIPPED}" if compiled and not keep_compiled_names else ""
    proof = Proof(weights, note=f"made from a training checkpoint: no forward was replayed{stripped}")
    proof.check(tolerance, os.fspath(target))
    if keep_compiled_names:
        content = with_names(content, compiled)
    receipt = make_receipt(
        content,
        proof,
        source="averaged" if averaged else "kernels" if forms else "plain",
        training_file=os.path.basename(name),
        step=checkpoint.get("global_step"),
        epoch=checkpoint.get("epoch"),
        tolerance=tolerance,
    )
    write(target, replace(content, receipt=receipt), format)
    return receipt


def _collapsed_from_callbacks(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights recomputed from the tensors that SimulatedOverparam keeps in its callback state, by plain name."""
    weights: dict[str, Tensor] = {}
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, Mapping) and "forms" in state:
            from lightning_sop.reparam import collapsed_from_state  # here: plain files need no methods

            weights.update({plain_name(name): weight for name, weight in collapsed_from_state(state).items()})
    return weights
