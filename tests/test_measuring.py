"""The measure task: what it reads ahead, and what it need not read."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipeline.measuring.chunk
import pipeline.measuring.run
import pipeline.measuring.storing
import pipeline.task
from pipeline import allocator
from pipeline.errors import ModelError, StoreError
from pipeline.flow.forwards import Forwards
from pipeline.manifest import read_manifest
from pipeline.measuring.run import run_measure
from pipeline.plan import all_measure_tasks
from pipeline.resolve import resolve
from pipeline.sources.base import RowGroupSource
from pipeline.store import open_store
from pipeline.verify import verify_runs
from tests.census import published, run_inline, small_job


def test_the_next_chunk_is_read_while_one_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, plain = run_inline(small_job(tmp_path), str(tmp_path / "plain"))
    order: list[tuple[str, str]] = []
    opened: dict[str, threading.Event] = {}
    fetched, store_cells = RowGroupSource._groups, pipeline.measuring.storing._store_cells

    def begun(source: Any, chunk: Any, rows: Any) -> Any:
        order.append(("opened", chunk.id))
        opened.setdefault(chunk.id, threading.Event()).set()
        return fetched(source, chunk, rows)

    def stored(task: Any, cell: Any, cells: Any, store: Any) -> None:
        ids = [chunk.id for chunk, _ in task.by_chunk()]
        for following in ids[ids.index(cell.chunk.id) + 1 :][:1]:
            assert opened.setdefault(following, threading.Event()).wait(timeout=60)
        order.append(("stored", cell.chunk.id))
        store_cells(task, cell, cells, store)

    monkeypatch.setattr(RowGroupSource, "_groups", begun)
    monkeypatch.setattr(pipeline.measuring.storing, "_store_cells", stored)
    outcome, store = run_inline(small_job(tmp_path), str(tmp_path / "watched"))
    chunks = [chunk for what, chunk in order if what == "opened"]
    assert len(set(chunks)) == 5
    assert {chunk for what, chunk in order if what == "stored"} == set(chunks)
    assert published(store, outcome.run) == published(plain, expected.run)


def test_no_chunk_is_read_for_models_none_of_which_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[Any]] = []
    read_in_turn = pipeline.measuring.run.batches_in_turn

    def counted(readings: Any) -> Any:
        for batches in read_in_turn(readings):
            made.append([])
            yield kept(batches, made[-1])

    def kept(batches: Any, some: list[Any]) -> Any:
        for batch in batches:
            some.append(batch)
            yield batch

    def loads(model: Any, *_: Any) -> Any:
        raise ModelError(f"model {model.name} does not load")

    monkeypatch.setattr(pipeline.measuring.chunk, "load", loads)
    monkeypatch.setattr(pipeline.measuring.run, "batches_in_turn", counted)
    outcome, store = run_inline(small_job(tmp_path), str(tmp_path / "store"))
    manifest = read_manifest(store, outcome.run)
    assert {one.model for one in manifest.failed} == set(manifest.models)
    assert all("does not load" in one.reason for one in manifest.failed)
    # the first batch of a chunk is made while models are loaded
    assert max(len(one) for one in made) == 1
    assert all(report.problems == () for report in verify_runs(store, deep=True))


def test_a_chunk_is_measured_on_its_own_rows_where_those_before_it_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small_job(tmp_path, seeds="0, 1")
    _, store = run_inline(job, str(tmp_path / "store"))
    tasks = [one for one in all_measure_tasks(resolve(job, store)) if one.cells[0].chunk.split == "train"]
    task = replace(tasks[0], cells=tuple(cell for one in tasks for cell in one.cells))
    bad, good = task.models[:2]
    chunks = [chunk.id for chunk, _ in task.by_chunk()]
    assert len(chunks) > 2
    some = [cell for cell in task.cells if cell.model.id == (good if cell.chunk.id == chunks[-1] else bad)]
    states = {path: path.read_bytes() for path in (tmp_path / "store" / "states" / good).rglob(f"{chunks[-1]}.*")}
    assert states
    for path in states:
        path.unlink()

    def loads(model: Any, *others: Any) -> Any:
        if model.id == bad:
            raise ModelError("it does not load")
        return load(model, *others)

    load = pipeline.measuring.chunk.load
    monkeypatch.setattr(pipeline.measuring.chunk, "load", loads)
    assert set(run_measure(replace(task, cells=tuple(some)), store).failed) == {bad}
    assert {path: path.read_bytes() for path in states} == states


def test_states_are_stored_while_the_next_chunk_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, plain = run_inline(small_job(tmp_path), str(tmp_path / "plain"))
    store_cells, begin = pipeline.measuring.storing._store_cells, pipeline.measuring.run.measure_chunk
    measured: dict[str, threading.Event] = {}

    def started(setup: Any, rows: Any, *more: Any) -> Any:
        measured.setdefault(rows.chunk.id, threading.Event()).set()
        return begin(setup, rows, *more)

    def stored(task: Any, cell: Any, cells: Any, store: Any) -> None:
        ids = [chunk.id for chunk, _ in task.by_chunk()]
        for following in ids[ids.index(cell.chunk.id) + 1 :][:1]:
            assert measured.setdefault(following, threading.Event()).wait(timeout=60)
        store_cells(task, cell, cells, store)

    monkeypatch.setattr(pipeline.measuring.run, "measure_chunk", started)
    monkeypatch.setattr(pipeline.measuring.storing, "_store_cells", stored)
    outcome, store = run_inline(small_job(tmp_path), str(tmp_path / "watched"))
    assert published(store, outcome.run) == published(plain, expected.run)


def test_a_task_ends_no_sooner_than_its_cells_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_measure, store_cells = pipeline.measuring.run.run_measure, pipeline.measuring.storing._store_cells
    done: list[tuple[str, str]] = []

    def slow(task: Any, cell: Any, cells: Any, store: Any) -> None:
        time.sleep(0.05)
        store_cells(task, cell, cells, store)
        done.append((cell.model.id, cell.chunk.id))

    def all_there(task: Any, store: Any) -> Any:
        found = run_measure(task, store)
        assert {(cell.model.id, cell.chunk.id) for cell in task.cells} <= set(done)
        return found

    monkeypatch.setattr(pipeline.measuring.storing, "_store_cells", slow)
    monkeypatch.setattr(pipeline.task, "run_measure", all_there)
    run_inline(small_job(tmp_path), str(tmp_path / "store"))
    assert done


@pytest.mark.parametrize("broken", [0, -1], ids=["the first chunk", "the last chunk"])
def test_a_store_that_refuses_a_state_stops_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    store_cells = pipeline.measuring.storing._store_cells

    def refused(task: Any, cell: Any, cells: Any, store: Any) -> None:
        if cell.chunk.id == [chunk.id for chunk, _ in task.by_chunk()][broken]:
            raise StoreError("the disk is full")
        store_cells(task, cell, cells, store)

    monkeypatch.setattr(pipeline.measuring.storing, "_store_cells", refused)
    with pytest.raises(StoreError, match="the disk is full"):
        run_inline(small_job(tmp_path), str(tmp_path / "store"))


def test_how_a_model_computes_is_found_out_once_for_all_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[Any] = []
    record = Forwards._record

    def counted(forwards: Forwards, model: Any, batch: Any, *more: Any) -> Any:
        recorded.append((id(model), batch.rows))
        return record(forwards, model, batch, *more)

    monkeypatch.setattr(Forwards, "_record", counted)
    job = small_job(tmp_path)
    tasks = all_measure_tasks(resolve(job, open_store(str(tmp_path / "store"))))
    assert len({chunk.id for task in tasks for chunk, _ in task.by_chunk()}) > 1
    _, store = run_inline(job, str(tmp_path / "store"))
    # of batches of one length
    assert len(recorded) == len(set(recorded)) > 0
    assert all(report.problems == () for report in verify_runs(store, deep=True))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_that_a_task_frees_is_kept_for_the_next_one_and_not_behind_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []

    def begun(task: Any, store: Any) -> Any:
        kept.append(allocator._keeping)
        return run_measure(task, store)

    monkeypatch.setattr(pipeline.task, "run_measure", begun)
    run_inline(small_job(tmp_path), str(tmp_path / "store"))
    assert len(kept) > 1
    assert kept == [False] + [True] * (len(kept) - 1)
    assert not allocator._keeping
