"""What a deploy file holds, and its two encodings."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lightning_sop.deploy.errors import CollapseError, DeployFileError
from lightning_sop.deploy.names import Format
from lightning_sop.deploy.plain import keep_plain
from lightning_sop.deploy.weights import State, export_state

RECEIPT = "lightning_sop_receipt"
LIGHTNING_VERSION = "pytorch-lightning_version"
AVERAGED = "current_model_state"  # where WeightAveraging keeps the weights it has put its averages in place of

# Top-level entries of a Lightning checkpoint that are of use to training alone.
_TRAINING = {"callbacks", "loops", "optimizer_states", "lr_schedulers", "epoch", "global_step", AVERAGED}
_TRAINING |= {"averaging_state", "MixedPrecision"}
_TRAINING |= {"datamodule_hparams_name", "datamodule_hyper_parameters", "datamodule_hparams_type"}
_MODEL = {"state_dict", "hyper_parameters", "hparams_name", "hparams_type", LIGHTNING_VERSION}


@dataclass(frozen=True)
class DeployContent:
    """A plain model: everything that a deploy file holds.

    Attributes:
        state_dict: Plain names and CPU tensors (shape and dtype as deployed).
        hyper_parameters: Those that are plain data.
        extras: Further top-level entries: Lightning's version, and what the module's ``on_save_checkpoint`` added.
        omitted: Names of the hyper-parameters and entries that are not plain data and were left out.
        receipt: Plain data about where the weights come from and what was measured on them.
    """

    state_dict: State
    hyper_parameters: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    omitted: tuple[str, ...] = ()
    receipt: dict[str, Any] = field(default_factory=dict)

    def as_checkpoint(self) -> dict[str, Any]:
        """The content as a Lightning checkpoint."""
        checkpoint = {**self.extras, "state_dict": self.state_dict, RECEIPT: self.receipt}
        if self.hyper_parameters:
            checkpoint["hyper_parameters"] = self.hyper_parameters
        return checkpoint


def from_checkpoint(
    checkpoint: Mapping[str, Any],
    *,
    format: Format = "ckpt",
    dtype: torch.dtype | None = None,
    ties: Iterable[Sequence[str]] = (),
    ignore: Collection[str] = (),
) -> DeployContent:
    """Take the plain model out of a Lightning training checkpoint (its ``state_dict`` is the collapsed one already).

    Args:
        checkpoint: What Lightning dumps; it is not changed.
        format: What the content must fit into (JSON carries fewer hyper-parameters than a pickle).
        dtype: Cast floating point tensors to it.
        ties: Groups of names that stand for one tensor.
        ignore: Top-level entries known not to be the module's own.
    """
    hyper_parameters, omitted = keep_plain(_without_instantiator(checkpoint.get("hyper_parameters") or {}), format)
    own = {key: checkpoint[key] for key in checkpoint if key not in _TRAINING | _MODEL and key not in ignore}
    extras, left_out = keep_plain(own, format)
    for key in (LIGHTNING_VERSION, "hparams_name"):
        if key in checkpoint:
            extras[key] = checkpoint[key]
    if "hparams_type" in checkpoint:
        extras["hparams_type"] = "AttributeDict"  # any string: Lightning then rebuilds its own type, not OmegaConf's
    state, unfit = _carried(export_state(checkpoint["state_dict"], dtype=dtype, ties=ties), format)
    return DeployContent(state, hyper_parameters, extras, tuple(sorted([*omitted, *left_out, *unfit])))


def dumps(content: DeployContent, format: Format) -> bytes:
    """Encode a content.

    Raises:
        CollapseError: The state_dict has entries that the format cannot carry.
    """
    if format == "ckpt":
        buffer = io.BytesIO()
        torch.save(content.as_checkpoint(), buffer)
        return buffer.getvalue()
    loose = [name for name, value in content.state_dict.items() if not isinstance(value, Tensor)]
    if loose:
        raise CollapseError(f"safetensors holds tensors only, not {loose[0]!r} of the state_dict; use format='ckpt'.")
    metadata = {RECEIPT: content.receipt, "hyper_parameters": content.hyper_parameters, "extras": content.extras}
    texts = {"format": "pt", **{key: json.dumps(value) for key, value in metadata.items()}}
    try:
        return _as_safetensors(content.state_dict, texts)
    except Exception as error:
        raise CollapseError(
            f"safetensors cannot hold {_first_unfit(content.state_dict)} of the state_dict ({type(error).__name__}: "
            f"{_first_line(error)}); use format='ckpt'."
        ) from error


def loads(data: bytes, name: str) -> DeployContent:
    """Decode a deploy file of either format; no code of the file is run.

    Args:
        data: The file's bytes.
        name: The file's name, for the errors.

    Raises:
        DeployFileError: The bytes are corrupt, truncated or something else than a deploy file.
    """
    checkpoint = load_plain(data, name) if data[:2] == b"PK" else _load_safetensors(data, name)
    receipt = checkpoint.get(RECEIPT)
    if not isinstance(receipt, dict) or "state_dict" not in checkpoint:
        raise DeployFileError(
            f"{name} is no deploy file: it has no receipt. If it is a training checkpoint, make one of it with "
            f"`lightning-sop collapse {name} -o <target>` or lightning_sop.deploy.collapse_file."
        )
    known = {"state_dict", "hyper_parameters", RECEIPT}
    return DeployContent(
        checkpoint["state_dict"],
        checkpoint.get("hyper_parameters", {}),
        {key: value for key, value in checkpoint.items() if key not in known},
        tuple(receipt.get("omitted", ())),
        receipt,
    )


def load_plain(data: bytes, name: str) -> dict[str, Any]:
    """Decode a file of ``torch.save`` that holds a dict of plain data, onto the CPU.

    Raises:
        DeployFileError: It is corrupt, truncated, or holds objects of classes.
    """
    try:
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DeployFileError(
            f"{name} is corrupt, or holds objects that plain data does not (a class among the hyper-parameters, say): "
            f"{_first_line(error)}. Allow a class you trust with torch.serialization.add_safe_globals."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise DeployFileError(
            f"{name} is corrupt or truncated: {_first_line(error)}. Copy it again, or write it anew from the training "
            "checkpoint with `lightning-sop collapse`."
        ) from error
    if not isinstance(loaded, dict):
        raise DeployFileError(f"{name} holds a {type(loaded).__name__}, not a checkpoint.")
    return loaded


def _load_safetensors(data: bytes, name: str) -> dict[str, Any]:
    try:
        state = load_safetensors(data)
        (length,) = struct.unpack("<Q", data[:8])
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        entries = {key: json.loads(metadata[key]) for key in (RECEIPT, "hyper_parameters", "extras") if key in metadata}
    except (SafetensorError, struct.error, ValueError) as error:
        raise DeployFileError(
            f"{name} is neither a torch nor a safetensors file, or it is corrupt or truncated: {_first_line(error)}. "
            "Copy it again, or write it anew from the training checkpoint with `lightning-sop collapse`."
        ) from error
    return {**entries.pop("extras", {}), **entries, "state_dict": state}


def _as_safetensors(state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    # safetensors refuses memory that two names share: each tied name gets its own copy.
    return save_safetensors({name: value.clone() for name, value in state.items()}, metadata)


def _first_unfit(state: Mapping[str, Tensor]) -> str:
    for name, value in state.items():
        try:
            _as_safetensors({name: value})
        except Exception:
            return f"{name!r}, a tensor of {value.dtype} in layout {value.layout},".replace("torch.", "")
    return "the tensors"


def _without_instantiator(hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what makes Lightning build the module through jsonargparse, unless a value is nested and so needs it."""
    values = dict(hyper_parameters)
    if not any(_nested(value) for value in values.values()):
        values.pop("_instantiator", None)
        values.pop("_class_path", None)
    return values


def _nested(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_nested(item) for item in value)
    return isinstance(value, Mapping)


def _carried(state: State, format: Format) -> tuple[State, list[str]]:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    plain, omitted = keep_plain({name: value for name, value in state.items() if name not in tensors}, format)
    return {name: tensors.get(name, plain.get(name)) for name in state if name not in omitted}, omitted


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
