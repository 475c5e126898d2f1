"""The catalogue: it spares reads, and hides nothing whatever its age, its writers or what became of the store."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.queries import TABLES, selective
from benchmarks.stores import Made, write_store
from pipeline import catalogue as room
from pipeline.catalogue import FOLDER, RUNS, published_runs, read_catalogue, write_catalogue
from pipeline.cli import cli
from pipeline.errors import StoreError
from pipeline.manifest import committed_runs, manifest_key
from pipeline.published import PublishedFiles
from pipeline.query import ask, connect
from pipeline.store import MissingObject, Store, open_store
from tests.handmade import model_id, write_run
from tests.operating import call, refused

QUESTIONS = (
    "FROM runs",
    "FROM models_all ORDER BY ALL",
    "FROM neurons ORDER BY ALL",
    f"SELECT unit, z_mean FROM neurons WHERE model = '{model_id('mlp-1')}' AND site = 'head' ORDER BY ALL",
    "SELECT unit, z_mean FROM neurons JOIN models USING (model) WHERE name = 'mlp-1' AND site = 'head' ORDER BY ALL",
    "FROM patterns ORDER BY model, site, unit",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs that share models."""
    folder = tmp_path_factory.mktemp("written")
    for number in range(3):
        names = (f"mlp-{number}", f"mlp-{number + 1}")
        write_run(open_store(str(folder)), f"run-{number}", names, tables=("models", "neurons", "patterns"))
    return folder


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Store:
    """A store of one's own with those runs."""
    shutil.copytree(written, tmp_path / "store")
    return open_store(str(tmp_path / "store"))


def answers(store: Store, *questions: str) -> str:
    with closing(connect(store)) as con:
        return repr([list(ask(con, question).rows) for question in questions or QUESTIONS])


def ids(store: Store) -> list[str]:
    return [manifest.run for manifest, _ in published_runs(store, read_catalogue(store))]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every range that is asked of the store while it is queried."""
    found: list[tuple[str, int, int]] = []
    read = PublishedFiles._read

    def counting(files: PublishedFiles, key: str, start: int, end: int) -> bytes:
        found.append((key, start, end))
        return read(files, key, start, end)

    monkeypatch.setattr(PublishedFiles, "_read", counting)
    return found


def test_answers_are_the_same(store: Store) -> None:
    before = answers(store)
    written = write_catalogue(store)
    assert [manifest.run for manifest, _ in written.runs] == ["run-0", "run-1", "run-2"]
    assert read_catalogue(store) == written
    assert answers(store) == before


def test_they_are_the_same_on_a_bucket(store: Store, s3_url: str) -> None:
    bucket = open_store(s3_url)
    for key in sorted(store.keys(), key=lambda key: (store.modified(key)[key], key)):
        bucket.put_once(key, store.get(key))
    before = answers(bucket, *QUESTIONS[1:])
    write_catalogue(bucket)
    assert answers(bucket, *QUESTIONS[1:]) == before == answers(store, *QUESTIONS[1:])
    write_run(bucket, "later", ("mlp-9",))
    # a bucket tells times in whole seconds, so which of the two was last is open
    assert set(ids(bucket)) == {*ids(store), "later"}


def test_what_was_committed_since_is_found(store: Store) -> None:
    write_catalogue(store)
    write_run(store, "later", ("mlp-9",), change={"z_mean": 7.0})
    store.put_once("runs/open/_claims.json", b"{}")
    assert ids(store) == ["run-0", "run-1", "run-2", "later"]
    question = f"SELECT DISTINCT z_mean FROM neurons WHERE model = '{model_id('mlp-9')}'"
    assert answers(store, question) == "[[(7.0,)]]"


def test_a_run_that_was_removed_is_gone(store: Store) -> None:
    write_catalogue(store)
    for key in store.keys("runs/run-1/"):
        store.remove(key)
    Path(store.url, "runs/run-1/tables").rename(Path(store.url, "elsewhere"))
    Path(store.url, "runs/run-1").rmdir()
    assert ids(store) == ["run-0", "run-2"]


def test_a_run_whose_manifest_alone_was_removed_is_gone(store: Store) -> None:
    write_catalogue(store)
    key = manifest_key("run-1")
    manifest = store.get(key)
    store.remove(key)
    assert ids(store) == ["run-0", "run-2"]
    store.put_once(key, manifest)
    assert ids(store) == ["run-0", "run-2", "run-1"], "committed anew"


def test_a_run_that_was_committed_anew_is_read_as_it_is_now(store: Store) -> None:
    write_catalogue(store)
    for key in store.keys("runs/run-2/"):
        store.remove(key)
    write_run(store, "run-2", ("mlp-2",), change={"z_mean": 7.25})
    # what the old catalogue knows of the parts is not theirs
    fresh = {file.key: file for manifest, _ in committed_runs(store) for file in manifest.files}
    old = read_catalogue(store)
    assert old is not None
    assert not old.pieces(fresh["runs/run-2/tables/neurons/part-00000.parquet"])
    assert old.pieces(fresh["runs/run-1/tables/neurons/part-00000.parquet"])
    write_catalogue(store)
    assert answers(store, "SELECT DISTINCT z_mean FROM neurons WHERE run = 'run-2'") == "[[(7.25,)]]"


def test_the_same_runs_give_the_same_bytes(store: Store) -> None:
    write_catalogue(store)
    first = {key: store.get(key) for key in store.keys(FOLDER)}
    write_catalogue(store)
    assert {key: store.get(key) for key in store.keys(FOLDER)} == first
    for key in first:
        store.remove(key)
    write_catalogue(store)
    assert {key: store.get(key) for key in store.keys(FOLDER)} == first


def test_a_new_one_takes_the_place_of_the_old_and_reads_only_what_is_new(
    store: Store, reads: list[tuple[str, int, int]]
) -> None:
    write_catalogue(store)
    old = store.keys(FOLDER)
    write_run(store, "later", ("mlp-9",))
    reads.clear()
    write_catalogue(store)
    assert {key.split("/")[1] for key, _, _ in reads} == {"later"}
    assert len(store.keys(RUNS)) == 1
    assert not set(old) & set(store.keys(FOLDER))


def test_writers_at_the_same_time_hide_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that listed the runs before the last was committed finishes after one that knows them all."""
    behind = committed_runs(store)
    write_run(store, "later", ("mlp-9",))
    before = answers(store, *QUESTIONS[1:])
    write_catalogue(store)
    monkeypatch.setattr(room, "committed_runs", lambda _: behind)
    write_catalogue(store)
    catalogue = read_catalogue(store)
    assert catalogue is not None
    assert [manifest.run for manifest, _ in catalogue.runs] == ["run-0", "run-1", "run-2"]
    assert ids(store) == ["run-0", "run-1", "run-2", "later"]
    assert answers(store, *QUESTIONS[1:]) == before


def test_a_reader_goes_on_while_a_catalogue_is_replaced(store: Store) -> None:
    before = answers(store)
    write_catalogue(store)
    catalogue = read_catalogue(store)
    assert catalogue is not None
    for key in store.keys(FOLDER):
        if not key.startswith(RUNS):
            store.remove(key)
    assert answers(store) == before
    gone = store.keys(RUNS)
    for key in gone:
        store.remove(key)
    assert read_catalogue(store) is None


def test_one_that_vanishes_between_listing_and_reading_is_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_catalogue(store)

    def get(key: str) -> bytes:
        raise MissingObject(key)

    monkeypatch.setattr(store, "get", get)
    assert read_catalogue(store) is None


def test_a_damaged_one_is_an_error_that_says_what_to_do(store: Store) -> None:
    write_catalogue(store)
    for kind in (RUNS, f"{FOLDER}neurons-"):
        (key,) = store.keys(kind)
        whole = store.get(key)
        Path(store.url, key).write_bytes(whole[:-1] + b"x")
        with pytest.raises(StoreError, match=r"is damaged; `neuron-census catalogue` writes it anew"):
            answers(store)
        # the name is that of the bytes: what is there must go before it can be written again
        store.remove(key)
        write_catalogue(store)
        assert store.get(key) == whole


def test_one_of_a_newer_format_is_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = answers(store)
    monkeypatch.setattr(room, "FORMAT", 2)
    write_catalogue(store)
    monkeypatch.undo()
    assert read_catalogue(store) is None
    assert answers(store) == before


def test_only_the_parts_that_hold_the_rows_are_read(tmp_path: Path, reads: list[tuple[str, int, int]]) -> None:
    store, made = open_store(str(tmp_path)), Made(runs=4, models=2, sites=2, units=40)
    assert len(list(write_store(store, made))) == 4
    write_catalogue(store)
    for sql in selective(made).values():
        reads.clear()
        with closing(connect(store, tables=TABLES)) as con:
            assert reads == []
            assert len(list(ask(con, sql).rows)) == 40
        assert {key.split("/")[1] for key, _, _ in reads} == {made.run(2)}


def test_the_command(store: Store) -> None:
    done = CliRunner().invoke(cli, ["catalogue", "--store", store.url])
    assert done.exit_code == 0, done.output
    assert f"in the catalogue of {store.url}: 3 runs with 9 files of 3 tables" in done.output
    assert ids(store) == ["run-0", "run-1", "run-2"]


def test_of_a_store_without_runs_it_is_empty(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "empty"))
    assert write_catalogue(store).runs == ()
    assert ids(store) == []


def test_a_part_that_was_changed_or_is_missing_is_named(store: Store) -> None:
    key = "runs/run-1/tables/neurons/part-00000.parquet"
    content = store.get(key)
    for change in (content[:-4] + b"nope", content[:-1], content + b"1", b""):
        Path(store.url, key).write_bytes(change)
        with pytest.raises(StoreError, match=rf"{key} cannot be read .*; run `neuron-census verify`"):
            write_catalogue(store)
    store.remove(key)
    with pytest.raises(StoreError, match=rf"{key} is missing; run `neuron-census verify`"):
        write_catalogue(store)
    assert store.keys(FOLDER) == []


def test_folders_are_the_runs(store: Store, s3_url: str) -> None:
    bucket: Any
    for bucket in (store, open_store(s3_url), open_store("memory://folders-of-a-store")):
        bucket.put_once("runs/a/x/y", b"1")
        bucket.put_once("runs/loose", b"1")
        bucket.put_once("running/c/x", b"1")
        assert "a" in bucket.folders("runs/")
        assert not {"loose", "c", "x"} & set(bucket.folders("runs/"))
        assert bucket.folders("nothing/") == []


def test_where_there_is_no_run_it_is_refused(tmp_path: Path) -> None:
    refused(call("catalogue", "--store", str(tmp_path / "nothing")), "holds no run; `neuron-census run JOB.toml")
    assert not (tmp_path / "nothing").exists()
