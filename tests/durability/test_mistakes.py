"""Mistakes planted in what the schedules guard: each is found by one of the first schedules, which names its seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipeline.measuring.chunk
import pipeline.measuring.run
import pipeline.measuring.storing
import pipeline.run
from pipeline.store import Store
from tests.durability.schedules import tiny_job, undisturbed
from tests.durability.test_schedules import test_schedule as play_and_check
from tests.durability.world import Crash, FaultyStore, World

SEEDS = 40


def a_manifest_that_tells_drivers_apart(patch: pytest.MonkeyPatch) -> None:
    """As if it held the time, or the process."""
    sound, count = pipeline.run._manifest, itertools.count()

    def made(*given: Any) -> Any:
        manifest = sound(*given)
        return replace(manifest, versions={**manifest.versions, "driver": str(next(count))})

    patch.setattr(pipeline.run, "_manifest", made)


def a_state_that_outlives_its_task(patch: pytest.MonkeyPatch) -> None:
    """As an actor that accumulates across calls: what is repeated after a death is counted twice."""
    sound, kept = pipeline.measuring.run.measure_chunk, dict[tuple[str, str], Any]()
    due = iter(list[tuple[str, str]]())

    class Resident(pipeline.measuring.chunk.Running):
        def __new__(cls, *_: Any) -> Any:
            return kept.setdefault(next(due), super().__new__(cls))

        def __post_init__(self) -> None:
            if not hasattr(self, "_sums"):
                super().__post_init__()

    def measured(setup: Any, rows: Any, cells: Any) -> Any:
        nonlocal due
        due = iter([(cell.model.id, rows.chunk.id) for cell in cells])
        return sound(setup, rows, cells)

    patch.setattr(pipeline.measuring.chunk, "Running", Resident)
    patch.setattr(pipeline.measuring.run, "measure_chunk", measured)


def half_an_object_where_a_writer_died(patch: pytest.MonkeyPatch) -> None:
    """As a store that streams: what was written until the crash is there."""
    sound = FaultyStore._create

    def create(store: FaultyStore, key: str, content: bytes) -> bool:
        try:
            return sound(store, key, content)
        except Crash:
            store.world.create(key, content[: len(content) // 2])
            raise

    patch.setattr(FaultyStore, "_create", create)


def a_write_that_replaces(patch: pytest.MonkeyPatch) -> None:
    """As a store that ignores If-None-Match, and whose probe was left out."""

    def create(world: World, key: str, content: bytes) -> bool:
        world.objects[key] = content
        world.commits[key] += 1
        return True

    patch.setattr(World, "create", create)
    patch.setattr(Store, "probe", lambda store: None)


def a_taken_key_that_is_an_error(patch: pytest.MonkeyPatch) -> None:
    """As a writer that does not know its own object again after a lost acknowledgement."""

    def create(store: FaultyStore, key: str, content: bytes, sound: Any = FaultyStore._create) -> bool:
        if not sound(store, key, content) and not key.startswith("probe-"):
            raise PermissionError(key)
        return True

    patch.setattr(FaultyStore, "_create", create)
    patch.setattr(Store, "probe", lambda store: None)


def a_cell_that_is_skipped(patch: pytest.MonkeyPatch) -> None:
    sound = pipeline.measuring.storing._store_cells

    def store_cells(task: Any, cell: Any, *more: Any) -> None:
        if cell.chunk.start != 2:
            sound(task, cell, *more)

    patch.setattr(pipeline.measuring.storing, "_store_cells", store_cells)


MISTAKES = (
    a_manifest_that_tells_drivers_apart,
    a_state_that_outlives_its_task,
    half_an_object_where_a_writer_died,
    a_write_that_replaces,
    a_taken_key_that_is_an_error,
    a_cell_that_is_skipped,
)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda one: one.__name__)
def test_a_schedule_finds_it(
    mistake: Callable[[pytest.MonkeyPatch], None], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_job(directory)
    undisturbed(directory)
    mistake(monkeypatch)
    with pytest.raises(AssertionError, match=r"^seed \d+ replays this:\ndriver 0"):
        play_all(directory)


def play_all(directory: Path) -> None:
    for seed in range(SEEDS):
        play_and_check(seed, directory)
