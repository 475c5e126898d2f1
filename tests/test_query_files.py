"""What a question reads of the files of runs, on any store, and what it says where they are not as they were."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StoreError
from pipeline.manifest import Coverage, File, Manifest, encode, manifest_key
from pipeline.published import PublishedFiles
from pipeline.query import ask
from pipeline.store import Store, open_store
from tests.asked import answers, opened, two_runs
from tests.handmade import write_run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return two_runs(str(tmp_path_factory.mktemp("store")))


def test_object_storage_gives_the_same_answers(store: Store, s3_url: str) -> None:
    bucket = open_store(s3_url)
    write_run(bucket, "old", ("mlp-0", "mlp-0-init", "cnn-0", "cnn-0-init"))
    write_run(bucket, "young", change={"z_mean": 1.0})
    for sql in ("FROM neurons ORDER BY ALL", "FROM patterns ORDER BY model, site, unit", "FROM sites_all ORDER BY ALL"):
        assert repr(answers(bucket, sql)) == repr(answers(store, sql))


def test_an_interruption_while_a_file_is_read_is_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(PublishedFiles, "_range", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers(store, "SELECT avg(z_mean) FROM neurons")


def test_a_lost_file_is_the_stores_fault(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a")
    store.remove("runs/a/tables/neurons/part-00000.parquet")
    with pytest.raises(StoreError, match=r"a table cannot be read: .*neurons.*run `neuron-census verify`"):
        answers(store, "FROM neurons")
    assert len(answers(store, "FROM models", tables={"models"})) == 2


CHANGES = {
    "shorter": lambda content: content[:-10],
    "longer": lambda content: content + b"1",
    "other data": lambda content: content[:40] + bytes(1000) + content[1040:],
    "other footer": lambda content: content[:-4008] + b"?" * 4000 + content[-8:],
    "no Parquet": lambda content: bytes(len(content)),
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_file_that_was_changed_is_the_stores_fault(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a")
    part = Path(store.url, "runs/a/tables/neurons/part-00000.parquet")
    part.write_bytes(change(part.read_bytes()))
    with pytest.raises(StoreError, match=r"a table cannot be read: .*run `neuron-census verify`, which says what"):
        answers(store, "FROM neurons")


class Counted:
    """What is asked of a store while it is queried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: list[tuple[str, int]] = []
        made = PublishedFiles.__init__

        def counting(files: PublishedFiles, *arguments: Any) -> None:
            made(files, *arguments)
            files._files = self

        monkeypatch.setattr(PublishedFiles, "__init__", counting)

    def cat_file(self, path: str, *, start: int, end: int) -> bytes:
        self.reads.append((path, end - start))
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


def test_views_of_many_runs_read_one_footer_of_each_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    for number in range(12):
        write_run(store, f"run-{number:02}", (f"mlp-{number}",), tables=("models", "sites", "neurons", "receipts"))
    counted = Counted(monkeypatch)
    with opened(store, tables=("models", "sites", "neurons", "receipts")) as con:
        assert len({path for path, _ in counted.reads}) == 4
        assert list(ask(con, "SELECT count(DISTINCT run) FROM neurons").rows) == [(12,)]


def test_a_run_that_is_the_latest_of_nothing_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    for run in ("a", "b", "c"):
        write_run(store, run)
    counted = Counted(monkeypatch)
    assert answers(store, "SELECT count(*), min(run) FROM neurons", tables={"neurons"}) == [(14, "c")]
    assert {path for path, _ in counted.reads} == {f"{store.url}/runs/c/tables/neurons/part-00000.parquet"}


def _wide_run(store: Store, *, rows: int, groups: int) -> None:
    """A run whose neurons are one file of many row groups, each of one model."""
    models = np.repeat([f"{number:032x}" for number in range(groups)], rows)
    values = np.random.default_rng(0).random((rows * groups, 8))
    columns: dict[str, Any] = {"run": ["wide"] * len(models), "model": models, "data": ["d"] * len(models)}
    table = pa.table(columns | {f"c{number}": values[:, number] for number in range(8)})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=rows, compression="zstd")
    key = "runs/wide/tables/neurons/part-00000.parquet"
    stored = store.put_once(key, sink.getvalue())
    file = File("neurons", key, stored, len(sink.getvalue()), table.num_rows, models[0], models[-1])
    coverage = {"d/test": Coverage(total=1, read=1)}
    manifest = Manifest("wide", "wide", {}, tuple(models[::rows]), (), coverage, {}, {}, (file,))
    store.put_once(manifest_key("wide"), encode(manifest))


def test_threads_that_share_a_file_read_their_own_bytes(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_once("a", bytes(range(100)))
    file = PublishedFiles(store, {"a": 100}).open("census://a", "rb")

    def read(place: int) -> bytes:
        file.seek(place)
        everyone_has_sought.wait()
        return file.read(3)

    everyone_has_sought = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, [0, 30, 60, 90]))
    assert found == [bytes(range(place, place + 3)) for place in (0, 30, 60, 90)]


def test_a_selective_question_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    _wide_run(store, rows=10_000, groups=20)
    size = sum(Path(store.url, key).stat().st_size for key in store.keys("runs/wide/tables/"))
    counted = Counted(monkeypatch)
    with opened(store, tables={"neurons"}) as con:
        assert list(ask(con, f"SELECT count(c1) FROM neurons WHERE model = '{7:032x}'").rows) == [(10_000,)]
    assert sum(length for _, length in counted.reads) < size / 10
