"""The receipt: plain data in every deploy file about where its weights come from and what was measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import torch

from lightning_sop.deploy.content import LIGHTNING_VERSION, DeployContent
from lightning_sop.deploy.errors import CollapseError
from lightning_sop.deploy.replay import NO_DIFFERENCE, Call, Difference
from lightning_sop.deploy.tolerance import Tolerance
from lightning_sop.deploy.weights import coarsest_dtype, sha256, size

FORMAT_VERSION = 1

Source = Literal["kernels", "averaged", "plain"]


@dataclass(frozen=True)
class Proof:
    """What was measured: file against reference.

    Attributes:
        weights: Largest difference between a weight of the file and the same weight recomputed by the method.
        outputs: Largest difference between outputs on the probe; None where no forward could be replayed.
        calls: The probe.
        note: Why outputs were not compared, or which calls were left out.
    """

    weights: Difference = NO_DIFFERENCE
    outputs: Difference | None = None
    calls: Sequence[Call] = ()
    note: str = ""

    def check(self, tolerance: Tolerance, name: str) -> None:
        """Refuse a file whose weights or outputs are too far from the reference.

        Raises:
            CollapseError: A relative difference is above the tolerance.
        """
        outputs = self.outputs or NO_DIFFERENCE
        of_weights = tolerance.of(self.weights.name)
        wrong = self.weights.exceeds(of_weights)
        if wrong or outputs.exceeds(tolerance.outputs):
            what = (
                "its weights are not those that were trained"
                if wrong
                else "with its weights, which are those that were trained up to rounding, the model gives other outputs"
            )
            raise CollapseError(
                f"{name} was refused: {what}. Largest output difference "
                f"{outputs.absolute:.3g} (relative {outputs.relative:.3g}, tolerance {tolerance.outputs:.3g}); "
                f"largest weight difference {self.weights.absolute:.3g} (relative {self.weights.relative:.3g}, tolerance "
                f"{of_weights:.3g}) in {self.weights.name or 'no tensor'!r}."
                + (" If rounding explains it, allow it with a larger tolerance." if not wrong else "")
            )


def make_receipt(
    content: DeployContent,
    proof: Proof,
    *,
    source: Source,
    training_file: str,
    step: int | None,
    epoch: int | None,
    tolerance: Tolerance,
) -> dict[str, Any]:
    """Put the receipt together (its entries are described in docs/deploy.md)."""
    outputs = proof.outputs
    values, size_in_bytes = size(content.state_dict)
    return {
        "format_version": FORMAT_VERSION,
        "source": source,
        "training_file": training_file,
        "global_step": step,
        "epoch": epoch,
        "sha256": sha256(content.state_dict),
        "dtype": str(coarsest_dtype(content.state_dict)).removeprefix("torch."),
        "values": values,
        "bytes": size_in_bytes,
        "output_difference": None if outputs is None else outputs.absolute,
        "output_difference_relative": None if outputs is None else outputs.relative,
        "weight_difference": proof.weights.absolute,
        "weight_difference_relative": proof.weights.relative,
        "weight_difference_name": proof.weights.name,
        "tolerance": tolerance.outputs,
        "weight_tolerance": tolerance.of(proof.weights.name),
        "probe": [{"module": call.module, "shapes": call.shapes} for call in proof.calls],
        "note": proof.note,
        "omitted": list(content.omitted),
        "versions": {
            "torch": str(torch.__version__),
            "lightning": content.extras.get(LIGHTNING_VERSION),
            "lightning_sop": _own_version(),
        },
    }


def _own_version() -> str:
    try:
        return metadata.version("lightning_sop")
    except metadata.PackageNotFoundError:  # imported from a source tree that is not installed
        return "unknown"
