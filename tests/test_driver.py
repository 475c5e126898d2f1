"""What a run costs its driver: it grows with the tasks and no faster, and its memory hardly at all."""

from __future__ import annotations

import pytest

from benchmarks.orchestration import driver
from pipeline.cluster.connection import _is_elsewhere
from pipeline.stage import _stage
from pipeline.task import Receipt


def test_a_run_of_nothing_is_committed_and_its_tasks_are_small() -> None:
    few, more = (driver(models=models, chunks=6, workers=2) for models in (8, 32))
    # of what a task carries, nothing grows with the number of models
    assert more.task_bytes / more.tasks < 1.5 * few.task_bytes / few.tasks
    assert few.cells == 8 * 6 * 3
    assert more.tasks > few.tasks > 8


@pytest.mark.slow
def test_ten_thousand_tasks_leave_the_drivers_memory_flat() -> None:
    driver(models=4, chunks=2, workers=1)  # imports
    found = driver(models=1000, chunks=80, workers=64)
    assert found.tasks > 10_000
    assert found.grown_mib < 200
    assert found.per_thousand["seconds"] < 2


def test_of_several_reasons_the_first_in_plan_order_stays() -> None:
    receipts = [Receipt("measure", 1, failed={"m": f"reason {number}"}, lost={"n": str(number)}) for number in range(3)]
    done = _stage([*receipts, Receipt("measure", 1, lost={"o": "task lost"})])
    assert done.failed == {"m": "reason 0"}
    assert done.lost == {"n": "0", "o": "task lost"}


def test_a_driver_on_no_node_is_told_from_a_cluster_that_does_not_answer() -> None:
    # as Ray raises it where no raylet is on the driver's host
    unfound = RuntimeError("No node info found matching attributes: '10.0.0.7' when trying to resolve node")
    failed = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
    assert not _is_elsewhere(failed)
    failed.__cause__ = unfound
    assert _is_elsewhere(failed)
