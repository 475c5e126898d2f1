"""Models are shown the same first rows, read once for all of them, and none can change what the next one sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.loading import forget, probe_batch
from pipeline.plan import probe_of
from pipeline.resolve import resolve
from pipeline.sources.base import RowGroupSource
from pipeline.store import open_store
from tests.census import run_inline, small_job


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> None:
    forget()


def test_first_rows_are_read_once_and_are_each_models_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path / "store"))
    probe = probe_of(resolve(small_job(tmp_path), store), "digits")
    first = probe_batch(probe, store)
    expected = first.inputs[0].clone()
    first.inputs[0].zero_()
    monkeypatch.setattr(RowGroupSource, "read", lambda *_: pytest.fail("read again"))
    for _ in range(2):
        again = probe_batch(probe, store)
        assert torch.equal(again.inputs[0], expected)
        again.inputs[0].zero_()
    assert torch.equal(again.uid_N, first.uid_N)
    monkeypatch.undo()
    assert torch.equal(probe_batch(probe, store, 5).inputs[0], expected[:5])


def test_what_is_large_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path / "store"))
    probe = probe_of(resolve(small_job(tmp_path), store), "digits")
    monkeypatch.setattr("pipeline.loading.KEPT_PROBE_BYTES", 100)
    passes = []
    read = RowGroupSource.read
    monkeypatch.setattr(RowGroupSource, "read", lambda *given: passes.append(1) or read(*given))
    assert torch.equal(probe_batch(probe, store).inputs[0], probe_batch(probe, store).inputs[0])
    assert len(passes) == 2


def test_a_run_reads_the_first_rows_of_its_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    read = RowGroupSource.read
    monkeypatch.setattr(RowGroupSource, "read", lambda *given: sizes.append(given[2]) or read(*given))
    outcome, _ = run_inline(small_job(tmp_path, seeds="0, 1, 2"), str(tmp_path / "store"))
    assert outcome.failed == {}
    assert sizes.count(16) == 1
