"""Where runs are performed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PATHS = ("path", "root")
"""Arguments of data modules that are paths below the data's folder."""


@dataclass(frozen=True)
class Place:
    """Where runs are performed.

    Attributes:
        data: folder that the paths of tasks are relative to.
        networks: folder that keeps the networks of final runs.
        accelerator: of the Trainer.
        commit: of the code.
    """

    data: str | None
    networks: str
    accelerator: str = "auto"
    commit: str | None = None

    def network(self, key: str) -> Path:
        """Where the network of a run is kept."""
        return Path(self.networks, f"{key}.safetensors")
