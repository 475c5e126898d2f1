"""A driver that dies at every single write, and a chunk that kills whoever touches it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.claims import log_prefix
from pipeline.errors import DataError, Unfinished
from pipeline.executor import InlineExecutor, Lost
from pipeline.measuring.task import MeasureTask
from pipeline.report.status import print_status
from pipeline.run import run
from pipeline.store import Store
from tests.durability.schedules import Finished, calm, check, tiny_job, undisturbed
from tests.durability.world import Crash, FaultyStore, Weather, World


class Mortal(FaultyStore):
    """Kills its driver before or after the first write of every object."""

    def __init__(self, world: World, seen: set[str], *, after: bool) -> None:
        super().__init__(world, Weather(0, "mortal", 0.0))
        self.seen = seen
        self.after = after

    def _create(self, key: str, content: bytes) -> bool:
        # of a log no driver writes another one's key
        first = key not in self.seen and not key.startswith("probe-") and "/log/" not in key
        self.seen.add(key)
        created = self.after and super()._create(key, content)
        if first:
            raise Crash
        return created if self.after else super()._create(key, content)


@pytest.mark.parametrize("after", [False, True])
def test_a_driver_dies_at_every_write(after: bool, directory: Path) -> None:
    world, seen, deaths = World(), set[str](), 0
    while True:
        try:
            outcome = run(tiny_job(directory), Mortal(world, seen, after=after), InlineExecutor())
            break
        except Crash:
            deaths += 1
    assert deaths == len(undisturbed(directory)[1])
    check(Finished(world, (outcome,)), directory)


class Poisoned:
    """Loses every task that touches one chunk, as if it killed its workers; `touched` are the sizes of those tasks."""

    workers = 1

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.touched: list[int] = []

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for number, task in enumerate(tasks):
            chunks = [cell.chunk.start for cell in task.cells] if isinstance(task, MeasureTask) else []
            if self.chunk in chunks:
                self.touched.append(len(chunks))
                yield number, Lost("its worker died")
            else:
                yield number, function(task)


def status(store: Store, run_id: str) -> str:
    """What is said of a run that is not finished."""
    console = Console(file=io.StringIO(), width=1000)
    print_status(store, console, run_id)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_poisoned_chunk_is_lost_alone_and_the_next_run_goes_on_there(directory: Path) -> None:
    world, executor = World(), Poisoned(1)
    with pytest.raises(
        Unfinished, match=r"run \w+ is not finished; the rest of it is done:\n.*its worker died"
    ) as lost:
        run(tiny_job(directory), calm(world), executor)
    assert lost.value.exit_code == 1
    run_id, _ = undisturbed(directory)
    said = status(calm(world), run_id)
    assert "not yet: run its job again" in said
    assert re.search(rf"^{run_id}: mlp-0, mlp-0-init: .*its worker died$", said, re.MULTILINE)
    assert executor.touched == [2, 1, 1], "the task of two models, then each model's own"
    assert len([key for key in world.objects if key.startswith("states/")]) == 4
    outcome = run(tiny_job(directory), calm(world), InlineExecutor())
    assert (outcome.cells, outcome.reused_cells) == (2, 4)
    check(Finished(world, (outcome,)), directory)


def test_rows_that_cannot_be_read_cost_nothing_else(directory: Path, tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    path = tmp_path / "rows" / "0.parquet"
    sound = path.read_bytes()
    world = World()
    store = calm(world)
    run_id, _ = undisturbed(directory)

    class Damaged:
        """Damages the file between the plan and the last chunk."""

        workers = 1

        def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
            for number, task in enumerate(tasks):
                if isinstance(task, MeasureTask) and task.cells[0].chunk.start == 2:
                    path.write_bytes(sound[:-1])
                yield number, function(task)

    with pytest.raises(
        DataError, match=r"is not finished; the rest of it is done:\nmlp-0, mlp-0-init: .*0.parquet"
    ) as unread:
        run(job, store, Damaged())
    assert unread.value.exit_code == 2
    said = status(store, run_id)
    assert "not yet: mend its data, then run its job again" in said
    assert re.search(rf"^{run_id}: mlp-0, mlp-0-init: .*0.parquet", said, re.MULTILINE)
    # a driver that is at work, or was killed, has said nothing
    store.put_once(f"{log_prefix(run_id)}3000.begun", b"{}")
    said = status(store, run_id)
    assert "not yet: run its job again" in said
    assert "0.parquet" not in said
    assert len([key for key in world.objects if key.startswith("states/")]) == 4
    path.write_bytes(sound)
    outcome = run(job, store, InlineExecutor())
    assert (outcome.run, outcome.cells, outcome.reused_cells) == (run_id, 2, 4)
    check(Finished(world, (outcome,)), directory)
