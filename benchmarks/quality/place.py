"""Where runs are performed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.quality.config import StudyError
from benchmarks.quality.keys import digest
from benchmarks.quality.plan import Results

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
        digests: of the files of data, by task and path.
    """

    data: str | None
    networks: str
    accelerator: str = "auto"
    commit: str | None = None
    digests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def network(self, key: str) -> Path:
        """Where the network of a run is kept."""
        return Path(self.networks, f"{key}.safetensors")


def digests(folder: Path, path: str) -> dict[str, str]:
    """Of a file of data, or of the files right in a folder, by their paths below the data's folder."""
    whole = folder / path
    files = sorted(file for file in whole.iterdir() if file.is_file()) if whole.is_dir() else [whole]
    return {Path(os.path.relpath(file, folder)).as_posix(): digest(file.read_bytes()) for file in files}


def check_data(task: str, known: Mapping[str, str], results: Results) -> None:
    """That a task's results were made from the files that are there; older results do not say.

    Raises:
        StudyError: a file is another one by now.
    """
    for result in results.values():
        made_from = result["environment"].get("data", {}) if result["task"] == task else {}
        for name in made_from.keys() & known.keys():
            if made_from[name] != known[name]:
                raise StudyError(f"{name} is not the file that there are results of {task} from: another --results, please")
