"""Groups of models: what one worker holds, by count and by bytes, and what a process keeps between its tasks."""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import devices, loading
from pipeline.executor import InlineExecutor
from pipeline.grouping import SHARE, groups
from pipeline.job import load_job
from pipeline.job_sections import Resources
from pipeline.plan import make_plan
from pipeline.resolve import resolve
from pipeline.run import run
from pipeline.store import open_store
from tests.census import published, small_job
from tests.durability.schedules import tiny_job


@given(
    held=st.lists(st.integers(0, 100), max_size=30),
    most=st.integers(1, 8),
    memory=st.one_of(st.none(), st.integers(0, 400)),
)
def test_groups_keep_order_and_fit(held: list[int], most: int, memory: int | None) -> None:
    made = list(groups(range(len(held)), held, most=most, memory_bytes=memory))
    assert list(chain.from_iterable(made)) == list(range(len(held)))
    for group in made:
        size = sum(held[index] for index in group)
        assert len(group) == 1 or (len(group) <= most and (memory is None or size <= SHARE * memory))
    for group, following in pairwise(made):
        size = sum(held[index] for index in (*group, following[0]))
        assert len(group) == most or (memory is not None and size > SHARE * memory), "as large as they may be"


def test_less_memory_makes_smaller_groups_and_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = small_job(tmp_path, seeds="0, 1, 2")
    resolved, store = resolve(job, open_store(str(tmp_path / "a"))), open_store(str(tmp_path / "a"))
    sizes = {}
    monkeypatch.setattr("pipeline.plan.SMALL_GROUP_BYTES", 0)
    for memory in (1, 2**40):
        plan = make_plan(resolved, store, workers=1, memory_bytes=lambda: memory)  # noqa: B023
        sizes[memory] = {len(task.models) for task in plan.measure}
    assert sizes == {1: {1}, 2**40: {6}}
    large = run(job, store, InlineExecutor())
    monkeypatch.setattr("pipeline.run.memory_bytes", lambda _: 1)
    small = open_store(str(tmp_path / "b"))
    assert run(job, small, InlineExecutor()).run == large.run
    assert published(small, large.run) == published(store, large.run)


def test_a_process_lets_go_of_what_is_not_of_its_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading._KEPT.clear()
    run(tiny_job(tmp_path), open_store(str(tmp_path / "store")), InlineExecutor())
    (one, other) = [call.arguments[0].id for call in loading._KEPT]
    loading.keep_only([one])
    assert len(loading._KEPT) == 2, "few and small"
    monkeypatch.setattr(loading, "KEPT_BYTES", 10)
    loading.keep_only([one, other])
    assert len(loading._KEPT) == 2, "of the task"
    loading.keep_only([one])
    assert [call.arguments[0].id for call in loading._KEPT] == [one]
    monkeypatch.setattr(loading, "KEPT_BYTES", 2**30)
    monkeypatch.setattr(loading, "KEPT_MODELS", 1)
    loading.keep_only([other])
    assert not loading._KEPT


def test_a_worker_has_its_share_of_the_machine() -> None:
    whole = devices.memory_bytes(Resources(cpus_per_worker=4096))
    assert whole is not None
    assert whole > 2**30
    assert devices.memory_bytes(Resources(memory_gib=0.5)) == 2**29
    half = devices.memory_bytes(Resources(cpus_per_worker=1))
    assert half is not None
    assert half <= whole


def test_a_fraction_of_a_gpu_is_a_fraction_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    assert devices.memory_bytes(Resources(gpus_per_worker=0.25)) == 20 * 2**30
    assert devices.memory_bytes(Resources(gpus_per_worker=2)) == 80 * 2**30
    for share in (0.0, 0.25, 1.0, 2.0):
        devices.limit_gpu(share)
    assert limits == [0.25]


def test_a_worker_is_given_a_cpu_for_each_thread(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    tiny_job(tmp_path)
    path.write_text(path.read_text() + "[numerics]\nthreads = 3\n")
    assert load_job(path).allotted.cpus_per_worker == 3
    path.write_text(path.read_text() + "[resources]\ncpus_per_worker = 4\n")
    assert load_job(path).allotted.cpus_per_worker == 4
