"""A directory as a store: what is on the disk whenever a write ends, and what a file system may refuse."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StoreError
from pipeline.hashing import sha256
from pipeline.store import MissingObject, open_store


def test_killed_before_the_link_nothing_is_visible(tmp_path: Path):
    code = (
        "import os, signal, sys; from pipeline.store import open_store; "
        "os.link = lambda *a: os.kill(os.getpid(), signal.SIGKILL); "
        "open_store(sys.argv[1]).put_once('runs/x', b'1' * 100_000)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    store = open_store(str(tmp_path))
    assert len(list((tmp_path / "runs").iterdir())) == 1, "the draft is there"
    assert store.keys("") == []
    with pytest.raises(MissingObject):
        store.get("runs/x")
    assert store.put_once("runs/x", b"2") == sha256(b"2")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is done to the disk, in order: "safe" for a file or directory, "named" for a file, each by its inode."""
    done: list[tuple[str, int]] = []
    fsync, link, mkdir = os.fsync, os.link, Path.mkdir

    def synced(handle: int) -> None:
        fsync(handle)
        done.append(("safe", os.fstat(handle).st_ino))

    def linked(draft: Path, target: Path) -> None:
        link(draft, target)
        done.append(("named", os.stat(target).st_ino))

    def made(path: Path, **options: Any) -> None:
        mkdir(path, **options)
        done.append(("named", os.stat(path).st_ino))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    monkeypatch.setattr(Path, "mkdir", made)
    return done


def is_safe(path: Path, done: list[tuple[str, int]]) -> bool:
    """Whether a file's content was safe before it was named, and its name, and those of its folders, are now."""
    named = done.index(("named", path.stat().st_ino))
    content = path.is_dir() or ("safe", path.stat().st_ino) in done[:named]
    return content and ("safe", path.parent.stat().st_ino) in done[named:]


def test_what_is_stored_is_safe(tmp_path: Path, disk: list[tuple[str, int]]):
    store = open_store(str(tmp_path / "census"))
    store.put_once("runs/a/x", b"1")
    assert all(is_safe(path, disk) for path in tmp_path.rglob("*"))
    before = len(disk)
    store.put_all([("states/m/r/0", b"1"), ("states/m/t/0", b"2"), ("runs/a/y", b"3"), ("runs/a/x", b"4")])
    assert len(list(tmp_path.rglob("*"))) == 11
    assert all(is_safe(path, disk) for path in tmp_path.rglob("*"))
    # two folders of one object each, the two that these are in, the root, and one of two objects: each once
    folders = [one for one in disk[before:] if one[0] == "safe"]
    assert len(folders) == 4 + 6
    assert [store.get(f"runs/a/{name}") for name in "xy"] == [b"1", b"3"]


def test_what_was_stored_before_a_failure_is_safe(tmp_path: Path, disk: list[tuple[str, int]]):
    store = open_store(str(tmp_path))
    with pytest.raises(ValueError, match="is no key"):
        store.put_all([("a/x", b"1"), ("a/../y", b"2")])
    assert is_safe(tmp_path / "a" / "x", disk)
    assert is_safe(tmp_path / "a", disk)


def test_a_failed_write_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write a/b: No space left on device: free space"):
        open_store(str(tmp_path)).put_once("a/b", b"1")
    monkeypatch.undo()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StoreError, match="must support hard links"):
        open_store(str(tmp_path)).probe()


def unreadable(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let one folder be refused to this process, which may be root and read everything."""
    real = os.scandir

    def scandir(path):
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = open_store(str(tmp_path))
    store.put_once("runs/a/claims", b"")
    unreadable(monkeypatch, tmp_path / "runs/a")
    for prefix in ("", "runs/", "runs/a/"):
        with pytest.raises(StoreError, match=r"runs/a: cannot be listed: access denied \(PermissionError\)"):
            store.keys(prefix)
    with pytest.raises(StoreError, match="access denied"):
        store.folders("runs/a/")
    assert store.keys("models/") == store.keys("runs/b/") == []


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StoreError, match="taken"):
        open_store(str(tmp_path / "taken")).probe()
