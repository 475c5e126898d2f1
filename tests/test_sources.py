"""Sources: every row exactly once, by a uid that stays, in chunks that one file alone decides."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError, JobError
from pipeline.job_sections import Columns
from pipeline.registry import sources
from pipeline.rows.features import Numbers
from pipeline.rows.footers import EDGE_BYTES
from pipeline.rows.format import RowFormat
from pipeline.sources.digits import Digits
from pipeline.sources.parquet import Parquet
from tests.row_files import ids, joined, parquet, read_all, rows_table, write


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
        parquet(path, Columns(features=("id",), label="y", split="split")),
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


@pytest.mark.parametrize("edge", ["head", "tail"])
def test_large_files_that_share_a_footer_are_told_apart_by_either_edge(tmp_path: Path, edge: str):
    values = list(map(float, range(20_000)))
    changed = values.copy()
    at = slice(1, 3) if edge == "head" else slice(-3, -1)
    changed[at] = changed[at][::-1]
    paths = [
        write(tmp_path / name, pa.table({"v": order}), group_rows=20_000, compression="none", use_dictionary=False)
        for name, order in (("a.parquet", values), ("b.parquet", changed))
    ]
    contents = [path.read_bytes() for path in paths]
    footers = [content[-8 - int.from_bytes(content[-8:-4], "little") :] for content in contents]
    assert footers[0] == footers[1]
    # the one edge alone differs, within what is hashed of it
    assert (contents[0][:EDGE_BYTES] != contents[1][:EDGE_BYTES]) == (edge == "head")
    assert (contents[0][-EDGE_BYTES:] != contents[1][-EDGE_BYTES:]) == (edge == "tail")
    assert contents[0][EDGE_BYTES:-EDGE_BYTES] == contents[1][EDGE_BYTES:-EDGE_BYTES] != b""
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


def test_options_that_a_source_does_not_have_are_refused():
    with pytest.raises(JobError, match=r"^job: \[data\.rows\] options\.window = 3: unknown key; none is known$"):
        parquet("a", options={"window": 3})


def test_the_registry_finds_both():
    assert sources()["digits"] is Digits
    assert sources()["parquet"] is Parquet
