"""Columns become what a model takes, and those of another schema, or settings that do not fit, are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.errors import DataError, JobError
from pipeline.job_sections import Columns, DataSpec
from pipeline.rows.decode import RowError, class_labels, key_uids
from pipeline.sources.parquet import Parquet
from pipeline.store import open_store
from tests.row_files import COLUMNS, parquet, read_all, rows_table, write


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.float64()),
        pa.list_(pa.float16()),
        pa.large_list(pa.int64()),
        pa.list_(pa.uint8(), 4),
        pa.list_(pa.int16()),
    ],
    ids=str,
)
def test_lists_of_any_numbers_become_float32(tmp_path: Path, kind: pa.DataType):
    values = [[0, 1, 2, 3], [4, 5, 6, 7]]
    path = write(tmp_path / "a.parquet", pa.table({"x": pa.array(values, kind)}))
    (batch,), _ = read_all(parquet(path, Columns(features="x", shape=(2, 2))), "all")
    assert batch.inputs[0].dtype == torch.float32
    assert batch.inputs[0].reshape(2, 4).tolist() == values
    assert batch.label_N is None


def test_several_columns_become_one_input(tmp_path: Path):
    table = pa.table(
        {
            "a": pa.array([1, 2], pa.int32()),
            "b": pa.array([0.5, float("nan")]),
            "c": pa.array([True, False]),
            "d": pa.array([1, 2], pa.decimal128(5, 2)),
        }
    )
    source = parquet(write(tmp_path / "a.parquet", table), Columns(features=("d", "a", "b", "c")))
    (batch,), _ = read_all(source, "all")
    assert source.shape == (4,)
    np.testing.assert_array_equal(batch.inputs[0], [[1, 1, 0.5, 1], [2, 2, np.nan, 0]])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_text_labels_are_numbered_as_the_job_lists_them(tmp_path: Path, kind: pa.DataType):
    table = pa.table({"v": [1.0, 2.0, 3.0], "y": pa.array(["dog", None, "cat"], pa.string()).cast(kind)})
    path = write(tmp_path / "a.parquet", table)
    source = parquet(path, Columns(features=("v",), label="y"), labels=("cat", "dog"))
    (batch,), _ = read_all(source, "all")
    assert batch.label_N is not None
    assert batch.label_N.tolist() == [1, -1, 0]
    assert source.classes == 2


def test_integer_labels_may_be_unknown(tmp_path: Path):
    path = write(tmp_path / "a.parquet", pa.table({"v": [1.0, 2.0, 3.0], "y": pa.array([2, None, -1], pa.int8())}))
    (batch,), _ = read_all(parquet(path, Columns(features=("v",), label="y")), "all")
    assert batch.label_N is not None
    assert batch.label_N.tolist() == [2, -1, -1]


@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_splits_may_be_numbers_or_text(tmp_path: Path, kind: pa.DataType):
    table = pa.table({"v": [1.0, 2.0, 3.0, 4.0], "s": pa.array(["0", "1", None, "1"]).cast(kind)})
    source = parquet(write(tmp_path / "a.parquet", table, group_rows=1), Columns(features=("v",), split="s"))
    batches, readings = read_all(source, "1")
    assert torch.cat([batch.inputs[0] for batch in batches]).tolist() == [[2.0], [4.0]]
    assert sum(reading.read for reading in readings) == 2


def test_an_integer_key_is_the_uid(tmp_path: Path):
    table = rows_table(25)
    columns = Columns(features="x", shape=(4,), key="id")
    batches, _ = read_all(parquet(write(tmp_path / "a.parquet", table), columns), "all")
    assert torch.cat([batch.uid_N for batch in batches]).tolist() == table["id"].to_pylist()


def test_keys_and_labels_that_are_no_text():
    keys = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    assert key_uids(keys).tolist() == [*key_uids(pa.array(["a"])), *key_uids(keys[1:])]
    with pytest.raises(RowError, match=r"label b'\\xff': expected one of a, b"):
        class_labels(keys, classes=2, names=("a", "b"))


def test_a_text_key_is_hashed_alike_wherever_the_row_is(tmp_path: Path):
    names = [f"row-{number}" for number in range(30)]
    tables = {"a": names, "b": names[::-1]}
    uids = {}
    for name, keys in tables.items():
        path = write(tmp_path / name / "a.parquet", pa.table({"v": [0.0] * 30, "k": keys}), group_rows=3 + len(name))
        batches, _ = read_all(parquet(path, Columns(features=("v",), key="k")), "all")
        uids[name] = torch.cat([batch.uid_N for batch in batches]).tolist()
    assert uids["a"] == uids["b"][::-1]
    assert len(set(uids["a"])) == 30
    assert min(uids["a"]) >= 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (pa.array([0, 1, 2, 1]), r"a\.parquet: column 'k' has 1 key of several rows each, first uid 1"),
        (pa.array(["a", "b", "c", "a"]), "column 'k' has 1 key of several rows each"),
        (pa.array([0, 1, -2, 3]), r"a\.parquet, row 2: key -2: expected 0 to 2⁶³ − 1"),
        (pa.array([0, 1, 2**63, 3], pa.uint64()), r"row 2: key 9223372036854775808: expected"),
        (pa.array([0, None, 2, 3]), r"row 1: the key is null"),
    ],
)
def test_keys_that_name_no_row_are_refused(tmp_path: Path, keys: pa.Array, message: str):
    path = write(tmp_path / "a.parquet", pa.table({"v": [0.0] * 4, "k": keys}), group_rows=2)
    with pytest.raises(DataError, match=message):
        read_all(parquet(path, Columns(features=("v",), key="k")), "all")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"features": "z", "shape": (4,)}, r"a\.parquet: there is no column 'z'; known: id, split, x, y"),
        ({"features": "x", "shape": (4,), "label": "yy"}, "there is no column 'yy'; did you mean 'y'"),
        ({"features": "split", "shape": (4,)}, r"column 'split' is string, expected lists of 4 numbers"),
        ({"features": ("y", "x")}, r"column 'x' is list<element: float>, expected numbers"),
        (
            {"features": "x", "shape": (4,), "label": "split"},
            r"'split' is string, expected integers \(for strings",
        ),
        ({"features": "x", "shape": (4,), "key": "x"}, r"column 'x' is list.*, expected strings or integers"),
        ({"features": "x", "shape": (4,), "split": "x"}, r"column 'x' is list.*, expected strings or integers"),
    ],
)
def test_another_schema_is_refused_before_a_row_is_read(tmp_path: Path, columns: dict[str, Any], message: str):
    source = parquet(write(tmp_path / "a.parquet", rows_table(20)), Columns(**{"split": "split", **columns}))
    with pytest.raises(DataError, match=message):
        source.chunks("test")


def test_fixed_lists_of_another_size_are_refused(tmp_path: Path):
    path = write(tmp_path / "a.parquet", pa.table({"x": pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2))}))
    with pytest.raises(DataError, match=r"is fixed_size_list.*\[2\], expected lists of 4 numbers"):
        parquet(path, Columns(features="x", shape=(2, 2))).chunks("all")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"columns": Columns(shape=(4,))}, r"\[data\.rows\] columns\.features: missing"),
        ({"columns": Columns(features="x")}, r"\[data\.rows\] columns\.shape: missing; expected the shape of a row"),
        ({"columns": COLUMNS}, r"\[data\.rows\] classes: missing; expected the number of classes of 'y'"),
        ({"columns": COLUMNS, "classes": 3}, r"\[data\.rows\] url: missing; expected a file, directory or glob"),
    ],
)
def test_what_the_job_leaves_out_is_named(spec: dict[str, Any], message: str):
    source = Parquet("rows", DataSpec(**spec), open_store("memory://unused"))
    with pytest.raises(JobError, match=message):
        source.chunks("test")


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("value", [2**63 - 1, 2**63, 2**64 - 1])
def test_labels_beyond_int64_are_named(tmp_path: Path, value: int, statistics: bool):
    table = pa.table({"v": [0.0] * 4, "y": pa.array([0, None, value, 1], pa.uint64())})
    path = write(tmp_path / "a.parquet", table, write_statistics=statistics)
    with pytest.raises(DataError, match=rf"a\.parquet(, row 2)?: labels? (0 to )?{value}.*: expected|expected 0 to 2"):
        read_all(parquet(path, Columns(features=("v",), label="y")), "all")


def test_labels_out_of_range_are_found_in_the_footer(tmp_path: Path):
    path = write(tmp_path / "a.parquet", pa.table({"v": [0.0, 1.0], "y": [0, 3]}))
    with pytest.raises(DataError, match=r"a\.parquet: labels 0 to 3 in column 'y', expected 0 to 2"):
        parquet(path, Columns(features=("v",), label="y")).chunks("all")


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1, 2, 3], None, r"a\.parquet, row 3: label 3: expected 0 to 2"),
        ([0, -2, 1, 1], None, r"a\.parquet, row 1: label -2: expected 0 to 2"),
        (["cat", "dog", "cow", "cat"], ("cat", "dog"), r"a\.parquet, row 2: label 'cow': expected one of cat, dog"),
    ],
)
def test_labels_out_of_range_are_found_in_the_rows(
    tmp_path: Path, labels: list[Any], names: tuple[str, ...] | None, message: str
):
    table = pa.table({"v": [0.0] * 4, "y": labels})
    path = write(tmp_path / "a.parquet", table, group_rows=2, write_statistics=False)
    with pytest.raises(DataError, match=message):
        read_all(parquet(path, Columns(features=("v",), label="y"), labels=names), "all")
