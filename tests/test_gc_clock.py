"""Ages are judged by the store's clock, whatever the machine's says where garbage is looked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.filesystems import filesystem
from pipeline.gc import clock, find_garbage
from pipeline.store import DirectoryStore, open_store
from tests.operating import call, committed, refused


def set_clock(monkeypatch: pytest.MonkeyPatch, ahead: timedelta) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + ahead

    monkeypatch.setattr("pipeline.gc.datetime", Clock)


@pytest.mark.parametrize(
    ("days", "said"),
    [
        (8, "the clock of this machine is 192.0 hours ahead of the store's, by which ages are judged\n"),
        (-8, "the clock of this machine is 192.0 hours behind the store's, by which ages are judged\n"),
        (0, ""),
    ],
)
def test_a_wrong_clock_makes_no_garbage_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int, said: str
) -> None:
    store = committed(tmp_path)
    set_clock(monkeypatch, timedelta(days=days))
    for arguments in ([], ["--delete"]):
        done = call("gc", "--store", str(store), *arguments)
        assert (done.stdout, done.stderr) == (
            "0 objects, 0 B to remove\n".replace("to remove", "removed" if arguments else "to remove"),
            said,
        )
    assert find_garbage(open_store(str(store))) == []
    old = sorted(store.glob("runs/*/reduced/*/*"))
    for path in [*old, *store.glob("runs/*/_manifest.json")]:
        os.utime(path, (0, 0))
    assert len(find_garbage(open_store(str(store)))) == len(old) > 0
    assert not list(store.glob("probe-*"))


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self, key, *_):
        raise PermissionError(13, "Permission denied", key)

    monkeypatch.setattr(DirectoryStore, "_create", refuse)
    monkeypatch.setattr(DirectoryStore, "_delete", refuse)


def test_a_store_that_can_only_be_read_is_looked_through_by_the_machines_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = committed(tmp_path)
    read_only(monkeypatch)
    done = call("gc", "--store", str(store))
    assert (done.exit_code, done.stdout) == (0, "0 objects, 0 B to remove\n")
    assert done.stderr == "the store cannot be written: ages are by the clock of this machine\n"
    set_clock(monkeypatch, timedelta(days=8))
    assert "would be removed" in call("gc", "--store", str(store)).stdout
    refused(call("gc", "--store", str(store), "--delete"), "access denied")


def with_times(find: Callable[..., dict[str, Any]], created: float) -> Callable[..., dict[str, Any]]:
    return lambda *asked, **how: {name: one | {"created": created} for name, one in find(*asked, **how).items()}


def test_the_clock_of_a_bucket_is_that_of_its_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("memory://clock")
    store.put_once("runs/x", b"1")
    fs, _ = filesystem(store.url)
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(type(fs), "find", with_times(type(fs).find, long_ago.timestamp()))
    told = clock(store, removes=True)
    assert told.now == long_ago
    assert "ahead of the store's" in (told.remark or "")
    assert store.keys("") == ["runs/x"]
