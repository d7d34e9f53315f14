from __future__ import annotations

import multiprocessing
import os
import signal

import fsspec
import pytest

from lightning_sop.deploy.files import exists, link_atomically, read_bytes, remove, write_atomically


def refuse(path):
    raise RuntimeError("refused")


def test_the_check_sees_the_whole_file_before_it_takes_its_name(tmp_path):
    target, seen = tmp_path / "new" / "x", []

    def check(path):
        seen.append((read_bytes(path), target.exists()))

    write_atomically(target, b"all", check)
    assert seen == [(b"all", False)]
    assert target.read_bytes() == b"all"


def test_a_refused_file_leaves_what_was_there_and_nothing_else(tmp_path):
    write_atomically(tmp_path / "x", b"old", len)
    with pytest.raises(RuntimeError, match="refused"):
        write_atomically(tmp_path / "x", b"new", refuse)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x", b"old")]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "x", b"new", len)
    assert list(tmp_path.iterdir()) == []


def killed_while_writing(path):
    write_atomically(path, b"new" * 1000, lambda staged: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_process_leaves_no_half_file_under_the_name(tmp_path):
    write_atomically(tmp_path / "x.ckpt", b"old", len)
    process = multiprocessing.get_context("fork").Process(target=killed_while_writing, args=(str(tmp_path / "x.ckpt"),))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "x.ckpt").read_bytes() == b"old"
    # What no process can clean up after SIGKILL is hidden and has no checkpoint's suffix.
    assert all(p.name.startswith(".deploy-") and p.suffix == ".tmp" for p in tmp_path.iterdir() if p.name != "x.ckpt")


def test_permissions_follow_the_umask(tmp_path):
    write_atomically(tmp_path / "x", b"", len)
    (tmp_path / "y").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_remote_file_system():
    url = "memory://deploy-test/folder/x.ckpt"
    write_atomically(url, b"all", lambda path: read_bytes(path) == b"all")
    assert read_bytes(url) == b"all"
    with pytest.raises(RuntimeError, match="refused"):
        write_atomically("memory://deploy-test/folder/y.ckpt", b"all", refuse)
    assert [entry["name"] for entry in fsspec.filesystem("memory").ls("/deploy-test/folder")] == [
        "/deploy-test/folder/x.ckpt"
    ]
    remove(url)
    remove(url)
    assert not exists(url)


def test_links_are_relative_and_removed_without_their_target(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    link = tmp_path / "folder" / "last"
    link.parent.mkdir()
    for name in "ab":
        link_atomically(str(tmp_path / name), str(link))
        assert os.readlink(link) == os.path.join("..", name)
    remove(link)
    assert not os.path.lexists(link)
    assert (tmp_path / "b").exists()


def test_writing_over_a_link_replaces_the_link(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    os.symlink("a", tmp_path / "last")
    write_atomically(tmp_path / "last", b"new", len)
    assert (tmp_path / "a").read_bytes() == b"a"
    assert not (tmp_path / "last").is_symlink()
