"""A run's log: what its tasks took and what the statistics cost, beside the results and never in them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.claims import log_prefix
from pipeline.cost import Cost, cost_beside
from pipeline.gc import find_garbage
from pipeline.kernels import choose
from pipeline.measuring import watched
from pipeline.measuring.storing import Storing
from pipeline.runlog import RunLog
from pipeline.store import Store
from pipeline.task import Receipt
from pipeline.verify import verify_runs
from tests.census import CNN, published, run_inline, small_job


def logs(store: Store, run_id: str) -> list[str]:
    """The keys of a run's logs, each of which its driver has announced."""
    begun, written = (
        [key.removesuffix(end) for key in store.keys(log_prefix(run_id)) if key.endswith(end)]
        for end in (".begun", ".json")
    )
    assert begun == written
    return [f"{one}.json" for one in written]


def test_the_bare_forward_is_timed_before_anything_is_written_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    begin = Storing.begin

    def timed(*args: Any, **named: Any) -> Cost:
        order.append("timed")
        return cost_beside(*args, **named)

    def begun(storing: Storing, *args: Any) -> None:
        order.append("begun")
        begin(storing, *args)

    monkeypatch.setattr(watched, "cost_beside", timed)
    monkeypatch.setattr(Storing, "begin", begun)
    run_inline(small_job(tmp_path), str(tmp_path / "store"))
    assert order[:2] == ["timed", "begun"]
    assert order.count("timed") == 1


def test_a_log_says_what_the_statistics_cost_and_where_time_went(tmp_path: Path) -> None:
    outcome, store = run_inline(small_job(tmp_path, seeds="0, 1", more=CNN), str(tmp_path / "store"))
    (key,) = logs(store, outcome.run)
    log = json.loads(store.get(key))
    assert (log["run"], log["kernel"], log["workers"], log["device"]) == (outcome.run, choose.name(), 1, "cpu")
    # a model of each shape, once: on the run's first chunk
    assert sorted(one["model"].split("-")[0] for one in log["statistics"]) == ["cnn", "mlp"]
    for one in log["statistics"]:
        assert one["data"] == "digits"
        assert one["rows"] == 128
        assert one["statistics_over_forward"] == one["measured_s"] / one["forward_s"] > 1
    spent = log["seconds"]["measure"]
    assert {"loading", "reading", "measuring", "storing"} < spent.keys()
    assert 0 < sum(seconds for name, seconds in spent.items() if name != "all") <= spent["all"]
    kinds = [task["kind"] for task in log["tasks"]]
    assert set(kinds) == {"train", "measure", "reduce", "pack"}
    assert all(task["host"] and task["seconds"] > 0 for task in log["tasks"])


def test_a_log_is_no_part_of_the_results(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    outcome, store = run_inline(job, str(tmp_path / "one"))
    other, beside = run_inline(job, str(tmp_path / "two"))
    assert published(store, outcome.run) == published(beside, other.run)
    (key,) = logs(store, outcome.run)
    assert key not in store.get(f"runs/{outcome.run}/_manifest.json").decode()
    assert [report.problems for report in verify_runs(store, deep=True)] == [()]
    later = datetime.now(UTC) + timedelta(days=30)
    assert key not in {one.key for one in find_garbage(store, now=later)}
    # nothing was done, nothing is said
    run_inline(job, str(tmp_path / "one"))
    assert logs(store, outcome.run) == [key]


def test_what_keeps_a_run_open_is_the_first_reason_of_each_model() -> None:
    log = RunLog(None, 1)  # type: ignore[arg-type]
    log.receipts = [
        Receipt("measure", 0, unread={"a": "cut", "b": "cut"}),
        Receipt("measure", 0, unread={"a": "gone"}, lost={"b": "died", "c": "died"}),
    ]
    assert log._open({"a": "one", "b": "two"}) == [
        {"why": "lost", "reason": "died", "models": ["c"]},
        {"why": "unread", "reason": "cut", "models": ["one", "two"]},
    ]
