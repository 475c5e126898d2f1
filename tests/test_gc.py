"""Garbage: what is named, what never is, and what a run does whose cells were removed under it."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.claims import claims_key
from pipeline.cli import cli
from pipeline.errors import StoreError, Unfinished
from pipeline.executor import InlineExecutor
from pipeline.gc import Garbage, find_garbage, remove_garbage
from pipeline.manifest import manifest_key
from pipeline.run import run
from pipeline.store import Store, open_store
from pipeline.verify import verify_runs
from tests.durability.schedules import tiny_job
from tests.operating import call as operate
from tests.operating import refused
from tests.test_store_directory import unreadable

LATER = datetime.now(UTC) + timedelta(days=30)
# a cell that no run has claimed
STRAY = f"states/{'c' * 32}/x-{'d' * 12}-{'0' * 8}/{'f' * 32}.safetensors"


@pytest.fixture
def committed(tmp_path: Path) -> tuple[Store, str]:
    store = open_store(str(tmp_path / "store"))
    return store, run(tiny_job(tmp_path), store, InlineExecutor()).run


def keys(found: list[Garbage]) -> list[str]:
    return [one.key for one in found]


def test_rows_of_single_models_go_once_they_are_in_the_tables(committed: tuple[Store, str]) -> None:
    store, run_id = committed
    assert find_garbage(store) == [], "too young"
    found = find_garbage(store, now=LATER)
    assert keys(found) == store.keys(f"runs/{run_id}/reduced/")
    assert {one.reason for one in found} == {"its rows are in the tables of the committed run"}
    assert all(store.get(one.key) for one in found), "finding removes nothing"
    assert list(remove_garbage(store, found)) == found
    assert find_garbage(store, now=LATER) == []
    assert all(report.problems == () for report in verify_runs(store, deep=True))


def test_what_a_committed_run_was_made_from_stays(committed: tuple[Store, str]) -> None:
    store, run_id = committed
    store.remove(claims_key(run_id))
    assert keys(find_garbage(store, now=LATER)) == store.keys(f"runs/{run_id}/reduced/")


def test_nothing_is_garbage_while_a_run_cannot_be_read(
    committed: tuple[Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run_id = committed
    unreadable(monkeypatch, Path(store.url, "runs", run_id))
    with pytest.raises(StoreError, match="cannot be listed"):
        find_garbage(store, now=LATER)


def test_an_open_run_keeps_what_it_claims_until_it_is_left(committed: tuple[Store, str]) -> None:
    store, run_id = committed
    store.remove(manifest_key(run_id))
    parts = [*store.keys("models/"), *store.keys("states/")]
    assert find_garbage(store, age=timedelta(hours=1)) == []
    left = find_garbage(store, now=LATER)
    assert keys(left) == sorted([*parts, *store.keys("runs/")])
    assert {one.reason for one in left if one.key.startswith("runs/")} == {
        f"of a run that was left unfinished on {datetime.now(UTC):%Y-%m-%d}"
    }
    assert {one.reason for one in left if one.key in parts} == {"no run needs it"}


def test_an_open_run_that_never_said_what_it_needs_keeps_everything(committed: tuple[Store, str]) -> None:
    store, _ = committed
    store.put_once(STRAY, b"1")
    os.utime(Path(store.url, STRAY), (0, 0))
    assert keys(find_garbage(store)) == [STRAY]
    store.put_once(f"runs/{'b' * 16}/reduced/x", b"1")
    assert find_garbage(store) == []


def test_what_no_run_needs_and_what_the_dead_left_behind_goes(committed: tuple[Store, str]) -> None:
    store, _ = committed
    stray = [f"models/{'e' * 32}.safetensors", STRAY, f"probe-{'1' * 32}"]
    for key in stray:
        store.put_once(key, b"1")
    store.put_once("data/digits/train.parquet", b"1")
    draft = Path(store.url, "models", f".{'0' * 32}")
    draft.write_bytes(b"half")
    Path(store.url, ".gitignore").write_text("not ours")
    found = [one for one in find_garbage(store, now=LATER) if "/reduced/" not in one.key]
    assert keys(found) == sorted([*stray, f"models/.{'0' * 32}"])
    list(remove_garbage(store, found))
    assert not draft.exists()
    assert store.keys("data/")
    assert not set(stray) & store.modified().keys()


@pytest.mark.parametrize("holds_a_run", [True, False])
def test_what_is_not_called_as_a_census_calls_its_own_is_nobodys_garbage(
    committed: tuple[Store, str], tmp_path: Path, holds_a_run: bool
) -> None:
    store = committed[0] if holds_a_run else open_store(str(tmp_path / "other"))
    theirs = [
        "models/mine.pt",
        "models/stray.safetensors",
        "states/mine/x-1/y.safetensors",
        "training/exp1/100.safetensors",
        "runs/exp1/events.out",
        "runs/exp1/_claims.json",
        "probe-1.txt",
        "data.parquet",
    ]
    for key in theirs:
        store.put_once(key, b"mine")
        os.utime(Path(store.url, key), (0, 0))
    found = find_garbage(store, now=LATER)
    assert not set(theirs) & set(keys(found))
    list(remove_garbage(store, found))
    assert set(theirs) <= set(store.keys())


def test_what_a_run_has_claimed_since_is_not_removed(committed: tuple[Store, str]) -> None:
    store, run_id = committed
    claims = store.get(claims_key(run_id))
    store.remove(manifest_key(run_id))
    store.remove(claims_key(run_id))
    for key in store.keys("runs/"):
        store.remove(key)
    found = find_garbage(store, now=LATER)
    assert len(found) == 8
    store.put_once(claims_key(run_id), claims)
    assert list(remove_garbage(store, found)) == []


def test_a_run_that_was_left_and_goes_on_meanwhile_keeps_what_its_commit_names(
    committed: tuple[Store, str], tmp_path: Path
) -> None:
    store, run_id = committed
    store.remove(manifest_key(run_id))
    found = find_garbage(store, now=LATER)
    assert any("/tables/" in key for key in keys(found))
    assert run(tiny_job(tmp_path), store, InlineExecutor()).new
    assert list(remove_garbage(store, found)) == []
    assert all(report.problems == () for report in verify_runs(store, deep=True))


class Interrupted(InlineExecutor):
    """Of a driver that is killed before its first task."""

    def map(self, function, tasks):
        raise KeyboardInterrupt


def take_up(store: Store, directory: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny_job(directory), store, Interrupted())


def test_a_run_that_was_left_is_open_as_soon_as_it_is_taken_up(committed: tuple[Store, str], tmp_path: Path) -> None:
    store, run_id = committed
    store.remove(manifest_key(run_id))
    everything = store.keys("")
    for key in everything:
        os.utime(Path(store.url, key), (0, 0))
    assert keys(find_garbage(store)) == everything
    take_up(store, tmp_path)
    assert find_garbage(store) == []


def test_the_removal_of_a_run_ends_where_it_is_taken_up(committed: tuple[Store, str], tmp_path: Path) -> None:
    store, run_id = committed
    store.remove(manifest_key(run_id))
    removing = remove_garbage(store, find_garbage(store, now=LATER))
    while not next(removing).key.startswith(f"runs/{run_id}/"):
        pass
    there = store.keys(f"runs/{run_id}/")
    assert any("/tables/" in key for key in there)
    take_up(store, tmp_path)
    assert all(not one.key.startswith("runs/") for one in removing)
    assert set(there) <= set(store.keys(f"runs/{run_id}/"))


def test_no_checkpoint_goes_before_its_cells(committed: tuple[Store, str]) -> None:
    store, _ = committed
    for key in store.keys("runs/"):
        store.remove(key)
    for key in store.keys("models/"):
        os.utime(Path(store.url, key), (0, 0))
    assert find_garbage(store) == [], "its cells are young"
    kinds = [one.key.split("/")[0] for one in remove_garbage(store, find_garbage(store, now=LATER))]
    assert kinds == ["states"] * 6 + ["models"] * 2


def test_cells_removed_under_a_run_are_measured_again(tmp_path: Path) -> None:
    class Removing(InlineExecutor):
        """Removes the cells of one model before they are reduced."""

        def map(self, function, tasks):
            for key in store.keys("states/")[:1]:
                if type(tasks[0]).__name__ == "ReduceTask":
                    store.remove(key)
            return super().map(function, tasks)

    store = open_store(str(tmp_path / "store"))
    with pytest.raises(Unfinished, match="there is no such object"):
        run(tiny_job(tmp_path), store, Removing())
    outcome = run(tiny_job(tmp_path), store, InlineExecutor())
    assert (outcome.cells, outcome.new) == (1, True)
    assert all(report.problems == () for report in verify_runs(store, deep=True))


def test_trainings_that_were_left_go(committed: tuple[Store, str]) -> None:
    store, _ = committed
    store.put_once(f"training/{'a' * 32}/100.safetensors", b"")
    assert find_garbage(store) == []
    (left,) = [one for one in find_garbage(store, now=LATER) if one.key.startswith("training/")]
    assert left.reason == f"of a training that was left unfinished on {datetime.now(UTC):%Y-%m-%d}"


def test_the_command_lists_before_it_removes(committed: tuple[Store, str]) -> None:
    store, run_id = committed

    def call(*arguments: str) -> str:
        done = CliRunner().invoke(cli, ["gc", "--store", store.url, *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    reduced = store.keys(f"runs/{run_id}/reduced/")
    assert call().endswith("0 objects, 0 B to remove\n")
    dry = call("--age", "0s")
    assert re.findall(r"  (\S+/\S+): ", dry) == reduced
    assert re.search(rf"^{len(reduced)} objects, [\d.]+ \w+ would be removed; --delete does it$", dry, re.M)
    assert store.keys(f"runs/{run_id}/reduced/") == reduced
    assert call("--age", "0s", "--delete").endswith("removed\n")
    assert store.keys(f"runs/{run_id}/reduced/") == []


def test_a_store_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for url in (str(tmp_path / "typo"), str(tmp_path / "empty"), "memory://typo"):
        refused(operate("gc", "--store", url), f"{url}: holds nothing; `neuron-census run JOB.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    # all that a run left may have been removed
    open_store(str(tmp_path / "empty")).put_once("data/vocabularies/x.json", b"{}")
    assert operate("gc", "--store", str(tmp_path / "empty")).output == "0 objects, 0 B to remove\n"


def test_an_age_has_a_unit(committed: tuple[Store, str]) -> None:
    done = CliRunner().invoke(cli, ["gc", "--store", committed[0].url, "--age", "7"])
    assert done.exit_code == 2
    assert "'7': expected a number and a unit: 90m, 12h, 7d" in done.output
