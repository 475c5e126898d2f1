"""Time series: ragged rows are filled up and masked, and what is no series is in the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch import Batch
from pipeline.errors import DataError, JobError
from pipeline.job_sections import Columns, DataSpec
from pipeline.rows.reading import Reading
from pipeline.sources.series import Series
from pipeline.store import open_store

STEPS = pa.list_(pa.list_(pa.float32()))


def series(url: Path, shape: tuple[int, ...] = (2, 5), *, ragged: bool = True, **spec: Any) -> Series:
    columns = Columns(features="s", shape=shape)
    given = DataSpec(url=str(url), columns=columns, options={"ragged": ragged}, **spec)
    return Series("rows", given, open_store("memory://unused"))


def write(path: Path, rows: list[Any], kind: pa.DataType = STEPS) -> Path:
    pq.write_table(pa.table({"s": pa.array(rows, kind)}), path, row_group_size=4)
    return path


def read(source: Series) -> tuple[list[Batch], Reading]:
    (chunk,) = source.chunks("all")
    reading = source.read(chunk, 3)
    return list(reading), reading


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=5), min_size=1, max_size=9
    )
)
def test_every_step_is_where_it_was_and_the_rest_is_masked(tmp_path_factory: pytest.TempPathFactory, rows: list[list]):
    path = write(tmp_path_factory.mktemp("rows") / "a.parquet", [[list(step) for step in row] for row in rows])
    batches, _ = read(series(path))
    x = torch.cat([batch.inputs[0] for batch in batches])
    mask = torch.cat([batch.kwargs["mask"] for batch in batches])
    assert all(batch.mask_NS is batch.kwargs["mask"] for batch in batches)
    assert x.shape == (len(rows), 2, 5)
    for row, steps in enumerate(rows):
        assert mask[row].tolist() == [True] * len(steps) + [False] * (5 - len(steps))
        assert x[row, :, : len(steps)].T.tolist() == [list(map(float, step)) for step in steps]
        assert not x[row, :, len(steps) :].any()


def test_series_of_one_length_have_no_mask(tmp_path: Path):
    rows = np.arange(24.0).reshape(3, 4, 2)
    (batch,), _ = read(series(write(tmp_path / "a.parquet", rows.tolist()), (2, 4), ragged=False))
    np.testing.assert_array_equal(batch.inputs[0], rows.transpose(0, 2, 1))
    assert batch.mask_NS is None
    assert not batch.kwargs


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float64()), pa.list_(pa.list_(pa.int16(), 1)), pa.large_list(pa.int8())], ids=str
)
def test_one_channel_may_be_plain_numbers(tmp_path: Path, kind: pa.DataType):
    rows: list = [[1, 2, 3], [4]]
    if pa.types.is_nested(kind.value_type):
        rows = [[[value] for value in row] for row in rows]
    (batch,), _ = read(series(write(tmp_path / "a.parquet", rows, kind), (1, 3)))
    assert batch.inputs[0].tolist() == [[[1, 2, 3]], [[4, 0, 0]]]


@pytest.mark.parametrize("step", [pa.list_(pa.float32()), pa.list_(pa.float32(), 2)], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_lists_of_one_size_are_series(tmp_path: Path, step: pa.DataType, ragged: bool, suffix: str):
    rows: list = np.arange(60.0).reshape(10, 3, 2).tolist()
    rows[1], rows[5][2] = None, [1.0, None]
    table = pa.table({"s": pa.array(rows, pa.list_(step, 3))})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path, row_group_size=4)
    else:
        with pa.ipc.new_file(path, table.schema) as opened:
            opened.write_table(table)
    batches, reading = read(series(path, (2, 3), ragged=ragged, max_unreadable=0.5))
    expected = np.array([row for number, row in enumerate(rows) if number not in (1, 5)]).transpose(0, 2, 1)
    np.testing.assert_array_equal(torch.cat([batch.inputs[0] for batch in batches]), expected)
    assert [one.first_row for one in reading.damage] == [1, 5]
    for most in (2,) if ragged else (2, 4):
        counts = "1 to 2" if ragged else most
        with pytest.raises(
            DataError, match=rf"is fixed_size_list.*\[3\], expected lists of {counts} steps, each a list"
        ):
            series(path, (2, most), ragged=ragged).chunks("all")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (None, "the list is null"),
        ([], "the sequence has 0 steps, expected 1 to 5"),
        ([[1.0, 2.0]] * 6, "the sequence has 6 steps, expected 1 to 5"),
        ([[1.0, 2.0], [1.0]], "a step has 1 numbers, expected 2"),
        ([[1.0, 2.0], None], "a step has 0 numbers, expected 2"),
        ([[1.0, None]], "a number of the list is null"),
    ],
)
def test_what_is_no_series_is_unreadable(tmp_path: Path, bad: list | None, reason: str):
    rows: list = [[[float(row), 0.0]] * (1 + row % 4) for row in range(9)]
    rows[2] = bad
    path = write(tmp_path / "a.parquet", rows)
    batches, reading = read(series(path, max_unreadable=0.5))
    assert torch.cat([batch.inputs[0] for batch in batches])[:, 0, 0].tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    assert torch.cat([batch.kwargs["mask"] for batch in batches]).sum(1).tolist() == [1, 2, 4, 1, 2, 3, 4, 1]
    assert [(one.rows, one.first_row, one.reason) for one in reading.damage] == [(1, 2, reason)]
    with pytest.raises(DataError, match=rf"a\.parquet, row 2: {reason}; 1 of 9 rows"):
        read(series(path))


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64()], ids=str)
def test_numbers_that_float64_rounds_are_read_beside_a_null(tmp_path: Path, kind: pa.DataType):
    path = write(tmp_path / "a.parquet", [[2**60 + 1, None], [2**60 + 1, 3]], pa.list_(kind))
    (batch,), reading = read(series(path, (1, 2), max_unreadable=0.5))
    assert batch.inputs[0].tolist() == [[[2.0**60, 3.0]]]
    assert [(one.first_row, one.reason) for one in reading.damage] == [(0, "a number of the list is null")]


def test_shorter_series_are_refused_unless_the_job_says_ragged(tmp_path: Path):
    path = write(tmp_path / "a.parquet", [[[1.0, 2.0]] * 5, [[1.0, 2.0]] * 4])
    with pytest.raises(DataError, match="row 1: the sequence has 4 steps, expected 5"):
        read(series(path, ragged=False))


def test_other_schemas_and_shapes_are_refused(tmp_path: Path):
    path = write(tmp_path / "a.parquet", [[1.0]], pa.list_(pa.float32()))
    with pytest.raises(
        DataError, match=r"column 's' is list.*, expected lists of 1 to 5 steps, each a list of 2 numbers"
    ):
        series(path).chunks("all")
    with pytest.raises(JobError, match=r"columns\.shape: expected the channels and the steps of a row"):
        series(path, (3,)).chunks("all")
