"""Sources: every row exactly once, by a uid that stays, in chunks that one file alone decides, or a clear refusal."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from pipeline import inputs
from pipeline.batch import Batch
from pipeline.errors import CensusError, DataError, JobError, StoreError
from pipeline.hashing import splitmix64
from pipeline.inputs import list_inputs, open_input
from pipeline.job import Columns, DataSpec
from pipeline.registry import sources
from pipeline.rows.decode import RowError, class_labels, key_uids
from pipeline.rows.features import Numbers
from pipeline.rows.format import RowFormat
from pipeline.rows.reading import Piece, Reading, batched, prefetched
from pipeline.sources.base import Chunk, Source
from pipeline.sources.digits import Digits
from pipeline.sources.parquet import Parquet
from pipeline.store import open_store

COLUMNS = Columns(features="x", label="y", split="split", shape=(2, 2))


def rows_table(rows: int, *, seed: int = 0, splits: tuple[str, ...] = ("train", "test")) -> pa.Table:
    """Rows of four numbers, a class below 3 and a split, drawn from a seed."""
    generator = np.random.default_rng(seed)
    return pa.table(
        {
            "x": pa.array(list(generator.normal(size=(rows, 4)).astype(np.float32)), pa.list_(pa.float32())),
            "y": pa.array(generator.integers(0, 3, rows)),
            "split": pa.array(generator.choice(splits, rows) if rows else [], pa.string()),
            "id": pa.array(generator.permutation(rows) + 1000 * seed),
        }
    )


def write(path: Path, table: pa.Table, *, group_rows: int = 10, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group_rows, **options)
    return path


def parquet(url: Path | str, columns: Columns = COLUMNS, **spec: Any) -> Parquet:
    return Parquet("rows", DataSpec(url=str(url), columns=columns, classes=3, **spec), open_store("memory://unused"))


def read_all(source: Source, split: str, batch_rows: int = 7) -> tuple[list[Batch], list[Reading]]:
    readings = [source.read(chunk, batch_rows) for chunk in source.chunks(split)]
    return [batch for reading in readings for batch in reading], readings


def joined(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.cat([batch.inputs[0] for batch in batches])
    return (
        x,
        torch.cat([batch.uid_N for batch in batches]),
        torch.cat([b.label_N for b in batches if b.label_N is not None]),
    )


# --- every row exactly once -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    files=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 15)), min_size=1, max_size=3),
    chunk_rows=st.integers(1, 50),
    batch_rows=st.integers(1, 20),
    splits=st.sampled_from([("train", "test"), ("test",), ("train",), ("a", "test", "z")]),
)
def test_every_row_of_a_split_is_read_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[tuple[int, int]],
    chunk_rows: int,
    batch_rows: int,
    splits: tuple[str, ...],
):
    folder = tmp_path_factory.mktemp("rows")
    tables = [rows_table(rows, seed=seed, splits=splits) for seed, (rows, _) in enumerate(files, 1)]
    for number, (table, (_, group_rows)) in enumerate(zip(tables, files, strict=True)):
        # named alike, so that files without rows are not the same file twice
        write(folder / f"{number}.parquet", table.replace_schema_metadata({"n": str(number)}), group_rows=group_rows)
    whole = pa.concat_tables(tables).filter(pa.compute.field("split") == "test")
    source = parquet(folder, chunk_rows=chunk_rows)
    batches, readings = read_all(source, "test", batch_rows)
    assert sum(reading.read for reading in readings) == whole.num_rows
    for chunk, reading in zip(source.chunks("test"), readings, strict=True):
        assert reading.read + reading.unreadable + reading.excluded == chunk.rows
        assert all(batch.rows == batch_rows for batch in list(reading)[:-1]), "batches start anew at each chunk"
    if whole.num_rows:
        x, uid_N, label_N = joined(batches)
        assert x.shape == (whole.num_rows, 2, 2)
        assert x.reshape(-1, 4).tolist() == whole["x"].to_pylist()
        assert label_N.tolist() == whole["y"].to_pylist()
        assert len(uid_N.unique()) == len(uid_N)
        assert uid_N.min() >= 0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 60),
    group_rows=st.integers(1, 20),
    chunk_rows=st.integers(1, 80),
    split=st.sampled_from(["train", "test"]),
)
def test_chunks_partition_the_groups_that_can_hold_the_split(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group_rows: int, chunk_rows: int, split: str
):
    table = rows_table(rows).sort_by("split")  # so that some groups hold one split only
    path = write(tmp_path_factory.mktemp("rows") / "a.parquet", table, group_rows=group_rows)
    chunks = parquet(path, chunk_rows=chunk_rows).chunks(split)
    held = {row // group_rows for row, name in enumerate(table["split"].to_pylist()) if name == split}
    covered = [group for chunk in chunks for group in range(chunk.start, chunk.stop)]
    assert covered == sorted(held)
    for chunk in chunks:
        assert chunk.first_row == chunk.start * group_rows
        assert chunk.rows == min(rows, chunk.stop * group_rows) - chunk.first_row
        assert chunk.rows <= chunk_rows or chunk.stop == chunk.start + 1


def test_a_uid_is_the_file_and_the_row_number(tmp_path: Path):
    table = rows_table(30)
    source = parquet(write(tmp_path / "a.parquet", table), chunk_rows=10)
    _, uid_N, _ = joined(read_all(source, "test")[0])
    base = source.chunks("test")[0].uid_base
    expected = [(base + row) % 2**63 for row, split in enumerate(table["split"].to_pylist()) if split == "test"]
    assert uid_N.tolist() == expected


def test_uids_wrap_around_without_becoming_negative():
    rows = RowFormat(Numbers(("x",), False, (1,)), None, None, 0, None, None, "all")
    batch = pa.record_batch({"x": pa.array([1.0, 2.0, 3.0])})
    piece = rows.decode(batch, where="", first_row=0, uid_base=2**63 - 2)
    assert piece.content.uid_N.tolist() == [2**63 - 2, 2**63 - 1, 0]


# --- what decides a chunk ---------------------------------------------------------------------------------------------


def ids(source: Source, split: str = "test") -> list[str]:
    return [chunk.id for chunk in source.chunks(split)]


def test_appending_a_file_changes_no_chunk(tmp_path: Path):
    write(tmp_path / "b.parquet", rows_table(50, seed=1))
    before = parquet(tmp_path, chunk_rows=20).chunks("test")
    write(tmp_path / "a.parquet", rows_table(50, seed=2))
    write(tmp_path / "c.parquet", rows_table(50, seed=3))
    after = parquet(tmp_path, chunk_rows=20).chunks("test")
    assert set(before) <= set(after)
    assert len(after) == 3 * len(before)


def test_a_file_can_be_moved_and_renamed(tmp_path: Path):
    path = write(tmp_path / "here" / "a.parquet", rows_table(50))
    before = ids(parquet(path, chunk_rows=20))
    moved = tmp_path / "b.parquet"
    path.rename(moved)
    assert ids(parquet(moved, chunk_rows=20)) == before


def test_what_is_read_otherwise_is_another_chunk(tmp_path: Path):
    path = write(tmp_path / "a.parquet", rows_table(20))
    variants = [
        parquet(path),
        parquet(path, Columns(features="x", label="y", split="split", shape=(4,))),
        parquet(path, Columns(features="x", label="y", split="split", shape=(2, 2), key="id")),
        parquet(path, Columns(features=("y", "id"), label="y", split="split")),
        parquet(path, Columns(features="x", split="split", shape=(2, 2))),
        parquet(path, max_unreadable=0.5),
    ]
    found = [ids(source)[0] for source in variants]
    found.append(ids(parquet(path), "train")[0])
    found.append(ids(parquet(path, Columns(features="x", label="y", shape=(2, 2))), "all")[0])
    assert len(set(found)) == len(found)


def test_files_that_share_a_footer_are_told_apart(tmp_path: Path):
    # uncompressed, of equal length, with the same extremes: only the rows differ
    def table(order: list[float]) -> pa.Table:
        return pa.table({"v": pa.array([0.0, *order, 1.0])})

    paths = [
        write(tmp_path / f"{name}.parquet", table(order), group_rows=100, compression="none", use_dictionary=False)
        for name, order in (("a", [0.25, 0.5]), ("b", [0.5, 0.25]))
    ]
    footers = [path.read_bytes()[-8 - int.from_bytes(path.read_bytes()[-8:-4], "little") :] for path in paths]
    assert footers[0] == footers[1]
    one, other = (parquet(path, Columns(features=("v",))) for path in paths)
    assert ids(one, "all") != ids(other, "all")
    assert len(ids(parquet(tmp_path, Columns(features=("v",))), "all")) == 2


def test_the_same_rows_twice_are_refused(tmp_path: Path):
    write(tmp_path / "a.parquet", rows_table(20))
    (tmp_path / "copy.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    with pytest.raises(DataError, match=r"a\.parquet and .*copy\.parquet have the same content"):
        parquet(tmp_path).chunks("test")


def test_groups_without_rows_of_the_split_are_left_out(tmp_path: Path):
    table = pa.concat_tables([rows_table(20, splits=("train",)), rows_table(20, seed=1, splits=("test",))])
    source = parquet(write(tmp_path / "a.parquet", table))
    assert [(chunk.start, chunk.stop) for chunk in source.chunks("test")] == [(2, 4)]
    assert source.chunks("none") == ()


def test_without_statistics_in_the_footer_every_group_is_looked_into(tmp_path: Path):
    table = pa.concat_tables([rows_table(20, splits=("train",)), rows_table(20, seed=1, splits=("test",))])
    source = parquet(write(tmp_path / "a.parquet", table, write_statistics=False))
    (chunk,) = source.chunks("test")
    _, (reading,) = read_all(source, "test")
    assert chunk.rows == 40
    assert (reading.read, reading.excluded) == (20, 20)


def test_chunks_and_sources_travel(tmp_path: Path):
    source = parquet(write(tmp_path / "a.parquet", rows_table(20)))
    travelled = pickle.loads(pickle.dumps((source, source.chunks("test"))))
    assert travelled[1] == source.chunks("test")
    assert ids(travelled[0]) == ids(source)


def test_names_are_relative_to_the_job_where_its_url_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "rows" / "deep" / "a.parquet", rows_table(20))
    monkeypatch.chdir(tmp_path)
    for url in ("rows", "rows/*/*.parquet", "rows/deep/a.parquet", "./rows/../rows"):
        source = parquet(url)
        assert {chunk.url for chunk in source.chunks("test")} == {"rows/deep/a.parquet"}
        assert read_all(source, "test")[1]
    assert parquet(tmp_path / "rows").chunks("test")[0].url == str(tmp_path / "rows/deep/a.parquet")


# --- columns ----------------------------------------------------------------------------------------------------------


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
        (pa.array([0, 1, 2, 1]), r"a\.parquet: 1 keys of column 'k' name several rows, first uid 1"),
        (pa.array(["a", "b", "c", "a"]), "1 keys of column 'k' name several rows"),
        (pa.array([0, 1, -2, 3]), r"a\.parquet, row 2: key -2: expected 0 to 2⁶³ − 1"),
        (pa.array([0, 1, 2**63, 3], pa.uint64()), r"row 2: key 9223372036854775808: expected"),
        (pa.array([0, None, 2, 3]), r"row 1: the key is null"),
    ],
)
def test_keys_that_name_no_row_are_refused(tmp_path: Path, keys: pa.Array, message: str):
    path = write(tmp_path / "a.parquet", pa.table({"v": [0.0] * 4, "k": keys}), group_rows=2)
    with pytest.raises(DataError, match=message):
        read_all(parquet(path, Columns(features=("v",), key="k")), "all")


# --- schemas and settings that do not fit -----------------------------------------------------------------------------


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


# --- files that are not what they should be ---------------------------------------------------------------------------


def test_files_that_are_not_there(tmp_path: Path):
    with pytest.raises(DataError, match="there is no such file, directory or match"):
        parquet(tmp_path / "nowhere").chunks("test")
    (tmp_path / "notes.txt").write_text("no rows")
    (tmp_path / "more.txt").write_text("no rows")
    with pytest.raises(DataError, match=r"no file ends in \.parquet"):
        parquet(tmp_path).chunks("test")


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b"text", lambda b: b[:-20], lambda b: b[50:]])
def test_a_file_that_is_not_parquet_or_truncated(tmp_path: Path, damage: Callable[[bytes], bytes]):
    path = write(tmp_path / "a.parquet", rows_table(20))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.parquet: (not a Parquet file|the footer is damaged)"):
        parquet(path).chunks("test")


def test_a_damaged_footer(tmp_path: Path):
    path = write(tmp_path / "a.parquet", rows_table(20))
    content = bytearray(path.read_bytes())
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(DataError, match="the footer is damaged"):
        parquet(path).chunks("test")


def test_a_footer_larger_than_the_first_read(tmp_path: Path):
    table = pa.table({f"column number {number}": [float(number)] * 4 for number in range(600)})
    path = write(tmp_path / "a.parquet", table, group_rows=1)
    assert int.from_bytes(path.read_bytes()[-8:-4], "little") > 64 << 10
    batches, _ = read_all(parquet(path, Columns(features=("column number 599",))), "all")
    assert torch.cat([batch.inputs[0] for batch in batches]).tolist() == [[599.0]] * 4


def test_a_file_without_rows_gives_no_chunk(tmp_path: Path):
    write(tmp_path / "a.parquet", rows_table(0))
    write(tmp_path / "b.parquet", rows_table(20))
    assert {chunk.url for chunk in parquet(tmp_path).chunks("test")} == {str(tmp_path / "b.parquet")}


def test_a_chunk_without_rows_of_its_split_is_read_as_empty(tmp_path: Path):
    source = parquet(write(tmp_path / "a.parquet", rows_table(20), write_statistics=False))
    batches, (reading,) = read_all(source, "none")
    assert batches == []
    assert (reading.read, reading.excluded, reading.unreadable) == (0, 20, 0)


def test_a_file_that_changed_since_the_plan_is_refused(tmp_path: Path):
    path = write(tmp_path / "a.parquet", rows_table(20))
    source = parquet(path)
    (chunk,) = source.chunks("test")
    write(path, rows_table(20, seed=1))
    with pytest.raises(DataError, match="the file has changed since the run was planned"):
        list(source.read(chunk, 7))
    path.unlink()
    with pytest.raises(DataError, match="there is no such file"):
        list(source.read(chunk, 7))


def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path):
    path = write(tmp_path / "a.parquet", rows_table(40), group_rows=5)
    source = parquet(path)
    (chunk,) = source.chunks("test")
    batches = iter(source.read(chunk, 2))
    next(batches)
    write(tmp_path / "new.parquet", rows_table(40, seed=1)).rename(path)
    with pytest.raises(DataError, match="the file was replaced while it was read"):
        list(batches)


# --- rows that cannot be read -----------------------------------------------------------------------------------------


def corrupt_group(path: Path, group: int) -> None:
    """Overwrite the data of the first column of a row group."""
    column = pq.read_metadata(path).row_group(group).column(0)
    content = bytearray(path.read_bytes())
    start = column.data_page_offset
    content[start : start + column.total_compressed_size // 2] = b"\xa5" * (column.total_compressed_size // 2)
    path.write_bytes(content)


def test_a_corrupt_row_group_is_in_the_ledger(tmp_path: Path):
    table = rows_table(50)
    path = write(tmp_path / "a.parquet", table, compression="zstd", use_dictionary=False)
    # in the middle of a file whose first and last 64 KiB are its identity, only reading can find it
    corrupt_group(path, 2)
    source = parquet(path, max_unreadable=0.3)
    batches, (reading,) = read_all(source, "test")
    (damage,) = reading.damage
    assert (damage.rows, damage.first_row) == (10, 20)
    assert "row group 2 is corrupt" in damage.reason
    expected = [row for n, row in enumerate(table.to_pylist()) if row["split"] == "test" and not 20 <= n < 30]
    assert torch.cat([batch.inputs[0] for batch in batches]).reshape(-1, 4).tolist() == [row["x"] for row in expected]
    assert reading.read + reading.unreadable + reading.excluded == 50


def test_beyond_the_limit_it_is_refused(tmp_path: Path):
    path = write(tmp_path / "a.parquet", rows_table(50), compression="zstd", use_dictionary=False)
    corrupt_group(path, 2)
    for limit in (0.0, 0.19):
        with pytest.raises(DataError, match=r"a\.parquet, row 20: row group 2 is corrupt: .*; 10 of 50 rows"):
            read_all(parquet(path, max_unreadable=limit), "test")


def test_a_flipped_bit_is_found_where_the_file_has_checksums(tmp_path: Path):
    path = write(
        tmp_path / "a.parquet",
        pa.table({"v": np.arange(20.0)}),
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(1).column(0)
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="row 10: row group 1 is corrupt"):
        read_all(parquet(path, Columns(features=("v",))), "all")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (None, "the list is null"),
        ([1.0, 2.0], "the list has 2 numbers, expected 4"),
        ([1.0, None, 2.0, 3.0], "a number of the list is null"),
        ([], "the list has 0 numbers, expected 4"),
    ],
)
def test_ragged_rows_are_unreadable(tmp_path: Path, bad: list | None, reason: str):
    values = [[float(row)] * 4 for row in range(12)]
    values[3] = values[7] = bad  # type: ignore[assignment, call-overload]
    path = write(tmp_path / "a.parquet", pa.table({"x": pa.array(values, pa.list_(pa.float32()))}), group_rows=6)
    columns = Columns(features="x", shape=(4,))
    batches, (reading,) = read_all(parquet(path, columns, max_unreadable=0.5), "all")
    good = [row for row in range(12) if row not in (3, 7)]
    assert torch.cat([batch.inputs[0] for batch in batches])[:, 0].tolist() == good
    assert [(one.rows, one.first_row, one.reason) for one in reading.damage] == [(1, 3, reason), (1, 7, reason)]
    base = parquet(path, columns).chunks("all")[0].uid_base
    assert torch.cat([batch.uid_N for batch in batches]).tolist() == [(base + row) % 2**63 for row in good]
    with pytest.raises(DataError, match=rf"row 3: {reason}; 1 of 12 rows"):
        read_all(parquet(path, columns), "all")


def test_nulls_in_columns_are_unreadable_and_nan_is_not(tmp_path: Path):
    table = pa.table({"a": [1.0, None, 3.0], "b": pa.array([1.0, 2.0, float("nan")], from_pandas=False)})
    source = parquet(write(tmp_path / "a.parquet", table), Columns(features=("a", "b")), max_unreadable=0.5)
    (batch,), (reading,) = read_all(source, "all")
    np.testing.assert_array_equal(batch.inputs[0], [[1, 1], [3, np.nan]])
    assert reading.damage[0].reason == "column 'a' is null"


def test_rows_of_other_splits_are_excluded_even_if_unreadable(tmp_path: Path):
    table = pa.table({"x": pa.array([[1.0], None], pa.list_(pa.float32())), "split": ["test", "train"]})
    source = parquet(write(tmp_path / "a.parquet", table), Columns(features="x", split="split", shape=(1,)))
    _, (reading,) = read_all(source, "test")
    assert (reading.read, reading.excluded, reading.unreadable) == (1, 1, 0)


def test_a_broken_connection_is_not_a_corrupt_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = open_store("memory://broken-connection")
    store.put_once("a.parquet", write(tmp_path / "a.parquet", rows_table(50)).read_bytes())
    source = parquet(f"{store.url}/a.parquet", max_unreadable=1.0)
    (chunk,) = source.chunks("test")

    def broken(self: inputs.WatchedInput, size: int = -1) -> bytes:
        self.failure = OSError(5, "Input/output error")
        raise self.failure

    monkeypatch.setattr(inputs.WatchedInput, "read", broken)
    with pytest.raises(StoreError, match="cannot be read: Input/output error"):
        list(source.read(chunk, 7))


def test_a_broken_disk_is_not_a_corrupt_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = parquet(write(tmp_path / "a.parquet", rows_table(50)), max_unreadable=1.0)
    (chunk,) = source.chunks("test")

    def broken(*_: object, **__: object) -> pa.Table:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", broken)
    with pytest.raises(StoreError, match="cannot be read: Input/output error"):
        list(source.read(chunk, 7))


# --- object storage ---------------------------------------------------------------------------------------------------


def test_s3_is_read_as_a_directory_is(tmp_path: Path, s3_url: str):
    store = open_store(s3_url)
    for name in ("a", "b"):
        path = write(tmp_path / f"{name}.parquet", rows_table(40, seed=ord(name)))
        store.put_once(f"rows/{path.name}", path.read_bytes())
    there, here = parquet(f"{s3_url}/rows"), parquet(tmp_path)
    assert ids(there) == ids(here)
    assert there.chunks("test")[0].url == f"{s3_url}/rows/a.parquet"
    for one, other in zip(joined(read_all(there, "test")[0]), joined(read_all(here, "test")[0]), strict=True):
        assert torch.equal(one, other)


ANYWHERE = [
    ("tabular", ("a", "b"), None, {"categories": ("name",)}),
    ("series", "steps", (1, 3), {"ragged": True}),
    ("tokens", "name", (4,), {}),
    ("tokens", "name", (4,), {"tokenizer": "words", "min_count": 1}),
    ("graph", ("a", "b"), None, {"edges": "edges.parquet"}),
]


@pytest.mark.parametrize(("kind", "features", "shape", "options"), ANYWHERE)
@pytest.mark.parametrize("place", ["s3", "memory"])
def test_every_kind_of_file_is_read_from_anywhere(
    tmp_path: Path, s3_url: str, kind: str, features: Any, shape: Any, options: dict[str, Any], place: str
):
    steps = pa.array([[1.0], [2.0, 3.0], [4.0, 5.0, 6.0], [7.0]], pa.list_(pa.float32()))
    rows = pa.table(
        {"a": [1.0, 2, 3, 4], "b": [4.0, 3, 2, 1], "name": ["x y", "é", "x", "longer than"], "steps": steps}
    )
    write(tmp_path / "rows.parquet", rows.append_column("split", pa.array(["all"] * 4)), group_rows=2)
    write(tmp_path / "edges.parquet", pa.table({"source": [0, 1, 3], "target": [1, 2, 0]}))
    there = open_store({"s3": f"{s3_url}/{kind}", "memory": f"memory://anywhere/{tmp_path.name}"}[place])
    for name in ("rows", "edges"):
        there.put_once(f"{name}.parquet", (tmp_path / f"{name}.parquet").read_bytes())

    def batches(folder: str) -> list[Batch]:
        given = options | ({"edges": f"{folder}/edges.parquet"} if "edges" in options else {})
        columns = Columns(features=features, shape=shape, split="split")
        spec = DataSpec(url=f"{folder}/rows.parquet", columns=columns, options=given, train="all")
        return read_all(sources()[kind]("d", spec, open_store(str(tmp_path / "store"))), "all")[0]

    def tensors(batch: Batch) -> list[torch.Tensor]:
        return [batch.uid_N, *batch.inputs, *batch.kwargs.values()]

    for one, other in zip(batches(str(tmp_path)), batches(there.url), strict=True):
        for left, right in zip(tensors(one), tensors(other), strict=True):
            assert torch.equal(left, right)


def test_s3_files_are_read_in_ranges(tmp_path: Path, s3_url: str):
    store = open_store(s3_url)
    path = write(tmp_path / "a.parquet", rows_table(200_000), group_rows=20_000)
    store.put_once("rows/a.parquet", path.read_bytes())
    source = parquet(f"{s3_url}/rows/a.parquet", chunk_rows=20_000)
    read = 0
    plain_read = inputs.WatchedInput.read

    def counted(self: inputs.WatchedInput, size: int = -1) -> bytes:
        nonlocal read
        content = plain_read(self, size)
        read += len(content)
        return content

    chunk = source.chunks("test")[4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs.WatchedInput, "read", counted)
        assert sum(batch.rows for batch in source.read(chunk, 1000)) > 9_000
    assert 0 < read < path.stat().st_size / 8, "one of ten row groups, and of it the columns that are wanted"


def test_s3_files_that_change_are_refused(tmp_path: Path, s3_url: str):
    store = open_store(s3_url)
    store.put_once("rows/a.parquet", write(tmp_path / "a.parquet", rows_table(40)).read_bytes())
    source = parquet(f"{s3_url}/rows/a.parquet", chunk_rows=10)
    chunk = source.chunks("test")[0]
    store.remove("rows/a.parquet")
    with pytest.raises(DataError, match="there is no such file"):
        list(source.read(chunk, 7))
    store.put_once("rows/a.parquet", write(tmp_path / "b.parquet", rows_table(40, seed=1)).read_bytes())
    with pytest.raises(DataError, match="has changed since the run was planned"):
        list(source.read(chunk, 7))


def test_an_s3_file_replaced_under_an_open_reader_is_refused(s3_url: str):
    store = open_store(s3_url)
    store.put_once("a", b"1" * 1000)
    stream = open_input(f"{s3_url}/a")
    store.remove("a")
    store.put_once("a", b"2" * 1000)
    with pytest.raises(DataError, match="replaced while it was read"), inputs.input_errors("a"):
        stream.read(10)


def test_a_bucket_that_is_not_there_and_a_server_that_is_down(s3_server: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CensusError, match=r"there is no such file|does not exist"):
        parquet("s3://no-such-bucket-at-all/rows").chunks("test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match="does not answer"):
        list_inputs("s3://bucket/rows")


# --- batches ----------------------------------------------------------------------------------------------------------


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
    with pytest.raises(RuntimeError, match="does not add up"):
        list(reading)


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


# --- digits -----------------------------------------------------------------------------------------------------------


def digits(store_url: str, **spec: Any) -> Digits:
    return Digits("digits", DataSpec(source="digits", **spec), open_store(store_url))


def test_digits_are_those_of_scikit_learn(tmp_path: Path):
    source = digits(str(tmp_path), chunk_rows=200)
    assert source.shape == (1, 8, 8)
    assert source.classes == 10
    image, label = load_digits(return_X_y=True)
    seen: list[int] = []
    for split in ("train", "test"):
        x, uid_N, label_N = joined(read_all(source, split, 64)[0])
        assert x.shape[1:] == (1, 8, 8)
        np.testing.assert_array_equal(x.reshape(-1, 64).numpy() * 16, image[uid_N])
        np.testing.assert_array_equal(label_N, label[uid_N])
        assert all((splitmix64(uid) < 2**63 // 5) == (split == "test") for uid in uid_N.tolist())
        seen += uid_N.tolist()
    assert sorted(seen) == list(range(1797))
    assert 0.19 < len(uid_N) / 1797 < 0.21


def test_planning_digits_writes_nothing_and_reading_stages_them_once(tmp_path: Path):
    source = digits(str(tmp_path))
    chunks = source.chunks("test")
    assert list(tmp_path.iterdir()) == []
    list(source.read(chunks[0], 64))
    assert [key.rpartition("-")[0] for key in source.store.keys("")] == ["data/digits/test"]
    read_all(source, "train")
    assert len(source.store.keys("data/digits/")) == 3


def test_digits_are_the_same_chunks_in_every_store(tmp_path: Path, s3_url: str):
    here, there = digits(str(tmp_path)), digits(s3_url)
    assert here.chunks("train") == there.chunks("train")
    for one, other in zip(joined(read_all(here, "test")[0]), joined(read_all(there, "test")[0]), strict=True):
        assert torch.equal(one, other)


def test_digits_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pipeline.sources import digits as module

    module._files.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(JobError, match=r"needs scikit-learn: pip install 'neuron-census\[demo\]'"):
        digits(str(tmp_path)).chunks("test")


def test_digits_staged_elsewhere_by_other_versions(tmp_path: Path):
    source = digits(str(tmp_path))
    (chunk,) = source.chunks("test")
    other = Chunk(**{**vars(chunk), "url": "data/digits/test-000000000000.parquet"})
    with pytest.raises(DataError, match="planned with another version of pyarrow or scikit-learn"):
        list(source.read(other, 64))


def test_digits_take_no_url(tmp_path: Path):
    with pytest.raises(JobError, match=r"\[data\.digits\] url: source 'digits' knows it by itself"):
        digits(str(tmp_path), url="s3://elsewhere")


def test_options_that_a_source_does_not_have_are_refused():
    with pytest.raises(JobError, match=r"^job: \[data\.rows\] options\.window = 3: unknown key; none is known$"):
        parquet("a", options={"window": 3})


def test_the_registry_finds_both():
    assert sources()["digits"] is Digits
    assert sources()["parquet"] is Parquet
