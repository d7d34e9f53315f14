"""The source text of the installed standard library, byte by byte."""

import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_sop.zoo.loading import DataError, SplitDataModule

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
"""Other people's packages, caches, and tests, which some distributions leave out."""

HELD_OUT_EVERY = 10
"""Of every ten files the ninth is for validation and the tenth for the test."""


class TokenWindows(Dataset[tuple[Tensor, Tensor]]):
    """Consecutive windows of a byte text, each with the bytes that follow its own by one.

    Args:
        text: uint8 (n,).
        length: tokens per window.
    """

    def __init__(self, text: Tensor, length: int) -> None:
        self.text = text
        self.length = length

    def __len__(self) -> int:
        return max(0, (len(self.text) - 1) // self.length)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens, targets = self.__getitems__([index])
        return tokens[0], targets[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch: tokens and targets, both int64 (len(indices), length)."""
        starts = torch.tensor(indices).unsqueeze(1) * self.length
        windows = self.text[starts + torch.arange(self.length + 1)].long()
        return windows[:, :-1], windows[:, 1:]


class PythonSource(SplitDataModule):
    """Bytes of the running Python's standard library as a language-modelling text (256 tokens); nothing is downloaded.

    Files are taken whole, in the order of their names, until ``max_bytes`` are reached; validation and test consist of
    files of their own. The text depends on nothing but the installed Python: its version, and how it was packaged.

    Args:
        context: tokens per window.
        batch_size: windows per batch and process.
        max_bytes: size of the text, all splits together; the last file is cut there.
        num_workers: reading processes per loader.

    Raises:
        DataError: in ``setup``, when no source files are installed or the text is shorter than a window per split.
    """

    def __init__(self, context: int = 128, batch_size: int = 16, max_bytes: int = 2_000_000, num_workers: int = 0) -> None:
        super().__init__()
        self.context = context
        self.batch_size = batch_size
        self.max_bytes = max_bytes
        self.num_workers = num_workers
        self._splits: dict[str, TokenWindows] = {}

    def setup(self, stage: str | None = None) -> None:
        if self._splits:
            return
        root = Path(sysconfig.get_path("stdlib"))
        texts = list(take_bytes(source_files(root), self.max_bytes))
        if not texts:
            raise DataError(f"{root}: no readable .py files; install Python with its library's sources")
        parts: dict[str, list[bytes]] = {"train": [], "val": [], "test": []}
        for index, text in enumerate(texts):
            held_out = {HELD_OUT_EVERY - 2: "val", HELD_OUT_EVERY - 1: "test"}
            parts[held_out.get(index % HELD_OUT_EVERY, "train")].append(text)
        for split, part in parts.items():
            windows = TokenWindows(torch.frombuffer(bytearray(b"".join(part) or b"\0"), dtype=torch.uint8), self.context)
            if not len(windows):
                raise DataError(f"max_bytes={self.max_bytes} leaves no window of {self.context} for {split}: raise it")
            self._splits[split] = windows


def source_files(root: Path) -> list[Path]:
    """The .py files under a folder, without tests and installed packages, ordered by their path below it."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]  # os.walk reads the edited list
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def take_bytes(paths: Iterable[Path], limit: int) -> Iterator[bytes]:
    """Contents of the files, in order, each followed by a zero byte, until ``limit`` bytes in all."""
    for path in paths:
        if limit <= 0:
            return
        content = (path.read_bytes() + b"\0")[:limit]
        limit -= len(content)
        yield content
