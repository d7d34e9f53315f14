"""The library's source text: real, ordered, split by file."""

import sysconfig
from pathlib import Path

import pytest
import torch

from lightning_sop.zoo import DataError, PythonSource
from lightning_sop.zoo.python_source import source_files

STDLIB = Path(sysconfig.get_path("stdlib"))
LIMIT = 150_000


def texts(data):
    data.setup("fit")
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    return {split: bytes(loader.dataset.text.tolist()) for split, loader in loaders.items()}


def test_the_text_is_that_of_the_library_up_to_the_limit():
    parts = texts(PythonSource(max_bytes=LIMIT))
    assert sum(map(len, parts.values())) == LIMIT
    files = [file for part in parts.values() for file in part.split(b"\0") if file]
    library = {path.read_bytes() for path in source_files(STDLIB)[: len(files) + 5]}
    assert sum(file in library for file in files) >= len(files) - 1  # the last one is cut at the limit


def test_no_file_is_in_two_splits():
    parts = {split: set(text.split(b"\0")) - {b""} for split, text in texts(PythonSource(max_bytes=LIMIT)).items()}
    assert not parts["train"] & parts["val"]
    assert not parts["train"] & parts["test"]
    assert not parts["val"] & parts["test"]


def test_the_text_is_the_same_every_time():
    assert texts(PythonSource(max_bytes=LIMIT)) == texts(PythonSource(max_bytes=LIMIT))


def test_files_come_in_order_without_packages_and_tests(tmp_path):
    for name in ("b.py", "a/z.py", "a/b/c.py", "a.txt", "site-packages/x.py", "a/test/y.py", "a/__pycache__/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in source_files(tmp_path)]
    assert found == ["a/b/c.py", "a/z.py", "b.py"]


def test_targets_are_the_following_bytes():
    data = PythonSource(context=32, batch_size=5, max_bytes=LIMIT)
    text = texts(data)["test"]
    batches = list(data.test_dataloader())
    tokens, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert tokens.shape == targets.shape == ((len(text) - 1) // 32, 32)
    assert bytes(tokens.flatten().tolist()) == text[: tokens.numel()]
    assert bytes(targets.flatten().tolist()) == text[1 : targets.numel() + 1]
    assert tokens.dtype == targets.dtype == torch.int64


def test_one_window_is_a_batch_of_one():
    data = PythonSource(context=32, max_bytes=LIMIT)
    data.setup()
    dataset = data.train_dataloader().dataset
    assert torch.equal(dataset[7][0], dataset.__getitems__([7])[0][0])


def test_too_small_a_text_is_refused():
    with pytest.raises(DataError, match=r"max_bytes=1000 leaves no window of 128 for \w+: raise it"):
        PythonSource(max_bytes=1000).setup()


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"no readable \.py files"):
        PythonSource().setup()
