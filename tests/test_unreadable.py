"""Rows that cannot be read in a whole run: below the job's limit they are a table, above it the run fails."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from pipeline.query import ask, connect
from pipeline.store import open_store
from tests.census import digits_file, parquet_job, run_inline
from tests.row_files import corrupt_group

ROWS = 100


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A file to train on, and one to measure on of whose five row groups the third is corrupt."""
    digits_file(tmp_path / "data" / "train.parquet", rows=range(200), split="train")
    digits_file(tmp_path / "data" / "test.parquet", rows=range(200, 200 + ROWS), split="test", group_rows=20)
    corrupt_group(tmp_path / "data" / "test.parquet", 2)
    return tmp_path


def job(folder: Path, limit: float):
    found = parquet_job(folder)
    spec = found.data["digits"].model_copy(update={"max_unreadable": limit})
    spec._directory, spec._place = found.data["digits"]._directory, found.data["digits"]._place
    return found.model_copy(update={"data": {"digits": spec}})


def test_below_the_limit_file_and_row_are_in_the_ledger(damaged: Path):
    _, store = run_inline(job(damaged, 0.2), str(damaged / "store"))
    with closing(connect(store)) as con:
        rows = list(ask(con, "SELECT name, file, row, rows, u.reason FROM unreadable u JOIN models USING (model)").rows)
        counted = list(ask(con, "SELECT DISTINCT rows, unreadable, excluded, total FROM receipts").rows)
    assert [row[:4] for row in sorted(rows)] == [
        (name, "data/test.parquet", 40, 20) for name in ("mlp-0", "mlp-0-init")
    ]
    assert all("row group 2 is corrupt" in row[4] for row in rows)
    assert counted == [(ROWS - 20, 20, 0, ROWS)]


def test_above_it_the_run_fails_and_nothing_is_published(damaged: Path):
    with pytest.raises(DataError, match=r"test\.parquet, row 40: row group 2 is corrupt: .*; 20 of 100 rows"):
        run_inline(job(damaged, 0.1), str(damaged / "store"))
    store = open_store(str(damaged / "store"))
    assert not [key for key in store.keys("runs/") if "tables" in key or "_manifest" in key]


def test_rows_to_train_on_may_be_unreadable_as_well(damaged: Path):
    digits_file(damaged / "data" / "train.parquet", rows=range(200), split="train", group_rows=50)
    corrupt_group(damaged / "data" / "train.parquet", 1)
    with pytest.raises(DataError, match=r"mlp-0.*train\.parquet, row 50: row group 1 is corrupt: .*allows 40: repair"):
        run_inline(job(damaged, 0.2), str(damaged / "store"))
    outcome, _ = run_inline(job(damaged, 0.5), str(damaged / "other"))
    assert (outcome.trained, outcome.failed) == (1, {})


def test_chunks_without_a_row_of_their_split_are_measured_as_empty(tmp_path: Path):
    # between "alpha" and "zulu" a footer cannot exclude "test", and this file comes first
    for name, splits in (("a", ["alpha", "zulu"]), ("b", ["test"]), ("c", ["train"])):
        digits_file(tmp_path / "data" / f"{name}.parquet", rows=range(60), split=splits[0], also=splits[-1])
    _, store = run_inline(parquet_job(tmp_path), str(tmp_path / "store"))
    with closing(connect(store)) as con:
        counted = list(ask(con, "SELECT DISTINCT file, rows, excluded, total FROM receipts").rows)
        scored = list(ask(con, "SELECT DISTINCT rows FROM scores").rows)
    assert sorted(counted) == [("data/a.parquet", 0, 60, 60), ("data/b.parquet", 60, 0, 60)]
    assert scored == [(60,)]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_a_row_to_train_on_that_is_not_finite_is_named(tmp_path: Path, value: float):
    digits_file(tmp_path / "data" / "test.parquet", rows=range(200, 230), split="test")
    path = tmp_path / "data" / "train.parquet"
    digits_file(path, rows=range(200), split="train")
    table = pq.read_table(path)
    images = np.array(table["image"].to_pylist())
    images[123, 7] = value
    pq.write_table(table.set_column(0, "image", pa.array(list(images))), path)
    said = "nan" if np.isnan(value) else "inf"
    with pytest.raises(
        DataError, match=rf"train\.parquet, row 123 to train on: number 7 \(from 0\) is {said} in float32"
    ):
        run_inline(parquet_job(tmp_path), str(tmp_path / "store"))
    # without a label it is not learned from
    labels = pa.array([-1 if row == 123 else label for row, label in enumerate(table["label"].to_pylist())])
    table = table.set_column(1, "label", labels)
    pq.write_table(table.set_column(0, "image", pa.array(list(images))), path)
    outcome, _ = run_inline(parquet_job(tmp_path), str(tmp_path / "store"))
    assert (outcome.trained, outcome.failed) == (1, {})
