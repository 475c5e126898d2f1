"""A gc beside runs that need what it found: whatever commits names nothing that is removed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline import marks
from pipeline.claims import claims_key
from pipeline.errors import Unfinished
from pipeline.executor import InlineExecutor
from pipeline.gc import Garbage, find_garbage, remove_garbage
from pipeline.manifest import manifest_key
from pipeline.run import Outcome, run
from pipeline.store import DirectoryStore, Store, Stored, open_store
from pipeline.verify import verify_runs
from tests.durability.schedules import tiny_job


def left(directory: Path, *, begun: bool) -> tuple[Store, str, dict[str, bytes]]:
    """An old store of checkpoints and cells that no run needs, or of a run that was left; and its bytes before."""
    store = open_store(str(directory / "store"))
    run_id = run(tiny_job(directory), store, InlineExecutor()).run
    expected = contents(store)
    for key in [manifest_key(run_id)] if begun else store.keys("runs/"):
        store.remove(key)
    for key in store.keys(""):
        os.utime(Path(store.url, key), (0, 0))
    return store, run_id, expected


def contents(store: Store) -> dict[str, bytes]:
    return {key: store.get(key) for key in store.keys("") if "/log/" not in key and "/reduced/" not in key}


def go(store: Store, directory: Path) -> Outcome:
    return run(tiny_job(directory), store, InlineExecutor())


def expect_sound(store: Store, expected: dict[str, bytes]) -> None:
    (report,) = verify_runs(store, deep=True)
    assert report.problems == ()
    assert contents(store) == expected


class Pausing(DirectoryStore):
    """Does something else before its n-th removal of what runs need."""

    def __init__(self, url: str, number: int, meanwhile: Callable[[], None]) -> None:
        super().__init__(url)
        self._left, self._meanwhile = number, meanwhile

    def _delete(self, key: str) -> None:
        if not key.startswith(("gc-", "probe-")):
            self._left -= 1
            if self._left == 0:
                self._meanwhile()
        super()._delete(key)


class Beside(DirectoryStore):
    """Lets a gc remove one more object whenever its marks are asked for."""

    def __init__(self, url: str, removing: Iterator[Garbage]) -> None:
        super().__init__(url)
        self._removing = removing

    def _list(self, prefix: str) -> dict[str, Stored]:
        found = super()._list(prefix)
        if prefix == marks.PREFIX:
            next(self._removing, None)
        return found


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("number", [1, 2, 6, 7, 8])
def test_a_run_does_not_commit_beside_a_gc_that_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool, number: int
) -> None:
    monkeypatch.setattr(marks, "WAIT_S", 0.0)
    store, run_id, expected = left(tmp_path, begun=begun)

    def meanwhile() -> None:
        with pytest.raises(Unfinished, match="a gc is at work there and does not go on"):
            go(store, tmp_path)

    removed = list(remove_garbage(Pausing(store.url, number, meanwhile), find_garbage(store)))
    assert removed
    assert not store.keys(manifest_key(run_id))
    assert not store.keys(marks.PREFIX)
    if begun and number >= 6:
        # what the gc had in hand was of the run's own rows, whose record had been written anew
        with pytest.raises(Unfinished, match=r"\.arrow\.zst was removed; the same command makes it again"):
            go(store, tmp_path)
    outcome = go(store, tmp_path)
    assert outcome.new
    expect_sound(store, expected)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("number", range(1, 9))
def test_a_run_commits_beside_a_gc_once_that_has_seen_its_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool, number: int
) -> None:
    monkeypatch.setattr(marks, "LOOK_S", 0.0)
    monkeypatch.setattr(marks, "POLL_S", 0.0)
    store, _, expected = left(tmp_path, begun=begun)
    removing = remove_garbage(store, find_garbage(store))
    for _ in range(number):
        next(removing)
    outcome = go(Beside(store.url, removing), tmp_path)
    assert outcome.new
    states = [one.key for one in removing if one.key.startswith(("models/", "states/"))]
    assert states == [], "it has claimed them"
    expect_sound(store, expected)


def test_what_is_removed_before_the_claims_are_seen_keeps_the_run_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run_id, expected = left(tmp_path, begun=False)
    await_looks = marks.await_looks

    def removed_meanwhile(of: Store, note: Callable[[str], None]) -> None:
        await_looks(of, note)
        for key in (store.keys("states/")[0], store.keys("models/")[0], store.keys(f"runs/{run_id}/tables/")[0]):
            store.remove(key)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.run.await_looks", removed_meanwhile)
        with pytest.raises(Unfinished, match=r"file runs/\S+, cells or the checkpoint of .*: removed while it was at"):
            go(store, tmp_path)
    assert not store.keys(manifest_key(run_id))
    outcome = go(store, tmp_path)
    assert (outcome.new, outcome.cells) == (True, 1)
    expect_sound(store, expected)


def test_rows_removed_under_a_run_keep_it_open(tmp_path: Path) -> None:
    class Removing(InlineExecutor):
        """Removes a model's record once all are there."""

        def map(self, function, tasks):
            yield from super().map(function, tasks)
            for key in [key for key in store.keys("runs/") if key.endswith("_done.json")][:1]:
                store.remove(key)

    store, run_id, expected = left(tmp_path, begun=False)
    with pytest.raises(Unfinished, match=r"_done\.json: there is no such object; the same command"):
        run(tiny_job(tmp_path), store, Removing())
    assert not store.keys(manifest_key(run_id))
    assert go(store, tmp_path).new
    expect_sound(store, expected)


def test_claims_written_meanwhile_are_seen_by_the_next_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, run_id, expected = left(tmp_path, begun=False)
    now_s = 1000.0
    monkeypatch.setattr("pipeline.marks.time.time", lambda: now_s)
    removing = remove_garbage(store, find_garbage(store))
    next(removing)
    store.put_once(claims_key(run_id), expected[claims_key(run_id)])
    assert next(removing).key.startswith("states/"), "within the time between two looks"
    now_s += marks.LOOK_S
    assert list(removing) == []


@pytest.mark.parametrize("said", ["log/x.begun", "reduced/x"])
def test_a_run_that_has_begun_and_not_yet_claimed_keeps_everything(tmp_path: Path, said: str) -> None:
    store, run_id, _ = left(tmp_path, begun=False)
    found = find_garbage(store)
    store.put_once(f"runs/{run_id}/{said}", b"1")
    assert list(remove_garbage(store, found)) == []


def test_a_bucket_shows_its_clock_marks_and_new_claims(
    tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "LOOK_S", 0.0)
    store = open_store(s3_url)
    run_id = go(store, tmp_path).run
    expected = contents(store)
    assert abs(store.now() - datetime.now(UTC)) < timedelta(minutes=1)
    for key in store.keys("runs/"):
        store.remove(key)
    removing = remove_garbage(store, find_garbage(store, now=datetime.now(UTC) + timedelta(days=30)))
    assert [next(removing).key.split("/")[0] for _ in range(2)] == ["states", "states"]
    assert len(store.keys(marks.PREFIX)) == 1
    store.put_once(claims_key(run_id), expected[claims_key(run_id)])
    assert list(removing) == []
    assert not store.keys(marks.PREFIX)
    outcome = go(store, tmp_path)
    assert (outcome.new, outcome.cells) == (True, 2)
    expect_sound(store, expected)


class Counting(DirectoryStore):
    """Counts the requests that a look takes."""

    looks = 0
    reads = 0

    def _folders(self, prefix: str) -> set[str]:
        self.looks += prefix == "runs/"
        return super()._folders(prefix)

    def _read_range(self, key: str, start: int, stop: int) -> bytes:
        self.reads += key.startswith("runs/")
        return super()._read_range(key, start, stop)


@pytest.mark.parametrize(("look_s", "looks"), [(1e9, 2), (0.0, 301)])
def test_a_look_reads_no_claims_twice_and_there_is_one_in_so_many_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look_s: float, looks: int
) -> None:
    monkeypatch.setattr(marks, "LOOK_S", look_s)
    store = Counting(str(tmp_path / "store"))
    go(store, tmp_path)
    for number in range(300):
        key = f"models/{number:032x}.safetensors"
        store.put_once(key, b"1")
        os.utime(Path(store.url, key), (0, 0))
    found = find_garbage(store)
    store.looks = store.reads = 0
    assert len(list(remove_garbage(store, found))) == 300
    assert (store.looks, store.reads) == (looks, 1)


def test_a_mark_of_a_gc_that_was_killed_holds_nobody_up_for_more_than_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "WAIT_S", 0.0)
    store, _, expected = left(tmp_path, begun=False)
    mark = f"{marks.PREFIX}{'a' * 32}"
    store.put_once(mark, b"at work")
    assert mark not in {one.key for one in find_garbage(store, age=timedelta(0))}, "it may be at work"
    with pytest.raises(Unfinished, match=f"If it was killed, remove {mark}"):
        go(store, tmp_path)
    an_hour_ago = Path(store.url, mark).stat().st_mtime - marks.DEAD.total_seconds() - 1
    os.utime(Path(store.url, mark), (an_hour_ago, an_hour_ago))
    assert go(store, tmp_path).new
    (dead,) = [one for one in find_garbage(store, age=timedelta(0)) if one.key == mark]
    assert dead.reason == "left by a gc that was killed"
    store.remove(mark)
    expect_sound(store, expected)
