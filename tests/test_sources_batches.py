"""Batches: as large as asked for however rows are stored, in memory of their own, and a ledger that adds up."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch import Batch, misnamed
from pipeline.errors import ContractError, DataError
from pipeline.job_sections import Columns
from pipeline.rows.reading import Piece, batched, prefetched
from tests.row_files import parquet, read_all, rows_table, write


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 30), max_size=6), batch_rows=st.integers(1, 12))
def test_batches_do_not_depend_on_how_rows_were_cut(cuts: list[int], batch_rows: int):
    pieces = [Piece(stop - start, range(start, stop)) for start, stop in pairwise([0, *sorted(cuts), 30])]
    found = [[row for rows, start, stop in batch for row in rows[start:stop]] for batch in batched(pieces, batch_rows)]
    assert found == [list(range(start, min(start + batch_rows, 30))) for start in range(0, 30, batch_rows)]


def test_a_batch_has_its_own_aligned_memory(tmp_path: Path):
    source = parquet(write(tmp_path / "a.parquet", rows_table(50), group_rows=50))
    batches, _ = read_all(source, "test", 3)
    others = [batch.inputs[0].clone() for batch in batches]
    batches[0].inputs[0].zero_()
    assert all(torch.equal(batch.inputs[0], other) for batch, other in zip(batches[1:], others[1:], strict=True))
    assert {batch.inputs[0].data_ptr() % 64 for batch in batches} == {0}


def test_numbers_beyond_float32_become_infinite(tmp_path: Path):
    path = write(tmp_path / "a.parquet", pa.table({"v": [1e300, -1e300, 1.0]}))
    (batch,), _ = read_all(parquet(path, Columns(features=("v",))), "all")
    assert batch.inputs[0].flatten().tolist() == [float("inf"), float("-inf"), 1.0]


def test_a_ledger_that_does_not_add_up_is_a_defect(tmp_path: Path):
    source = parquet(write(tmp_path / "a.parquet", rows_table(20)))
    reading = source.read(source.chunks("test")[0], 7)
    reading.rows += 1
    with pytest.raises(ContractError, match=r"does not add up: .* expected the 21 of the chunk$"):
        list(reading)


@pytest.mark.parametrize("named", ["uids", "labels"])
def test_a_batch_has_a_uid_and_a_label_for_each_row(tmp_path: Path, named: str):
    source = parquet(write(tmp_path / "a.parquet", rows_table(20)))
    reading = source.read(source.chunks("test")[0], 7)
    joined = reading.join

    def join(stretches: Any) -> Batch:
        batch = joined(stretches)
        fewer = {"uids": {"uid_N": batch.uid_N[1:]}, "labels": {"label_N": batch.uid_N[1:]}}
        return replace(batch, **fewer[named])

    reading.join = join
    with pytest.raises(ContractError, match=rf"a batch has \d+ {named}; expected \d+, one for each row$"):
        list(reading)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda batch: {"uid_N": batch.uid_N * 0}, r"uid_N has 0 7 times: expected another for each row"),
        (lambda batch: {"uid_N": -1 - batch.uid_N}, r"uid_N has -\d+: expected names from 0 on"),
        (lambda batch: {"uid_N": batch.uid_N.int()}, r"uid_N is int32 of shape \(7,\): expected a tensor of int64"),
        (lambda batch: {"label_N": batch.label_N.float()}, r"label_N is float32: expected int64"),
    ],
)
def test_names_and_labels_are_as_a_batch_has_them(tmp_path: Path, change: Any, problem: str):
    source = parquet(write(tmp_path / "a.parquet", rows_table(20)))
    chunk = source.chunks("test")[0]
    reading = source.read(chunk, 7)
    joined = reading.join

    def join(stretches: Any) -> Batch:
        batch = joined(stretches)
        return replace(batch, **change(batch))

    reading.join = join
    with pytest.raises(ContractError, match=rf"^{re.escape(reading.where)}: {problem}"):
        list(reading)


def test_uids_need_not_rise():
    assert misnamed(torch.tensor([3, 1, 2])) is None
    assert misnamed(torch.tensor([3, 1, 3])) == "uid_N has 3 2 times: expected another for each row"
    assert misnamed(torch.tensor([], dtype=torch.int64)) is None


def test_a_reading_can_be_repeated(tmp_path: Path):
    source = parquet(write(tmp_path / "a.parquet", rows_table(20)))
    reading = source.read(source.chunks("test")[0], 7)
    assert len(list(reading)) == len(list(reading))
    assert reading.read + reading.excluded == 20


def test_prefetching_keeps_order_and_errors_and_can_be_left():
    assert list(prefetched(iter(range(1, 100)))) == list(range(1, 100))

    def failing() -> Any:
        yield 1
        raise DataError("bad")

    items = prefetched(failing())
    assert next(items) == 1
    with pytest.raises(DataError, match="bad"):
        next(items)
    left = prefetched(iter(range(1, 10)))
    next(left)
    left.close()
