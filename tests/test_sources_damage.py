"""Files and rows that are not what they should be: refused, or in the ledger as unreadable."""

from __future__ import annotations

import os
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import inputs
from pipeline.errors import DataError, StoreError
from pipeline.job_sections import Columns
from pipeline.store import open_store
from tests.row_files import corrupt_group, parquet, read_all, rows_table, write


def test_files_that_are_not_there(tmp_path: Path):
    with pytest.raises(DataError, match="there is no such file, directory or match"):
        parquet(tmp_path / "nowhere").chunks("test")
    (tmp_path / "notes.txt").write_text("no rows")
    (tmp_path / "more.txt").write_text("no rows")
    with pytest.raises(DataError, match=r"no file ends in \.parquet"):
        parquet(tmp_path).chunks("test")


@pytest.mark.parametrize("name", ["god.parquet", "good.parq", "godo/part.parquet"])
def test_the_nearest_name_of_a_file_that_is_not_there(tmp_path: Path, name: str):
    write(tmp_path / "good.parquet", rows_table(1))
    with pytest.raises(DataError, match=r"match; did you mean 'good\.parquet'\? expected at least one data file"):
        parquet(tmp_path / name).chunks("test")


def test_no_name_is_suggested_for_a_pattern_or_by_a_suffix(tmp_path: Path):
    write(tmp_path / "good.parquet", rows_table(1))
    for name in ("god*.parquet", "rows.parquet"):
        with pytest.raises(DataError, match="match; expected at least one data file"):
            parquet(tmp_path / name).chunks("test")


def test_a_file_whose_name_is_no_text_is_named(tmp_path: Path):
    write(tmp_path / "good.parquet", rows_table(20))
    bad = write(tmp_path / "bad.parquet", rows_table(20, seed=1))
    bad.rename(tmp_path / os.fsdecode(b"\xffa.parquet"))
    for url in (tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(DataError, match=r"^b'.*/\\xffa\.parquet': its name is not UTF-8; rename it$"):
            parquet(url).chunks("test")
    assert parquet(tmp_path / "g*").chunks("test")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("twice", ["x", "y", "split"])
def test_a_column_that_is_there_twice_is_refused_where_it_is_asked_for(tmp_path: Path, suffix: str, twice: str):
    rows = rows_table(20).append_column("more", pa.array(range(20))).append_column("more", pa.array(range(20)))
    path = tmp_path / f"a.{suffix}"

    def made(table: pa.Table) -> Path:
        if suffix == "arrow":
            with pa.ipc.new_file(path, table.schema) as opened:
                opened.write_table(table)
            return path
        return write(path, table)

    assert sum(batch.rows for batch in read_all(parquet(made(rows)), "test")[0]) > 0
    made(rows.append_column(twice, rows[twice]))
    source = parquet(path)
    with pytest.raises(DataError, match=rf"a\.{suffix}: there are 2 columns '{twice}'; expected names that differ"):
        source.chunks("test")
    assert source.names.features == ()


class Answering(BaseHTTPRequestHandler):
    """Answers with the status in the name of the file."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(int(self.path[1:4]))
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_server_that_is_not_there_is_no_missing_file():
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(DataError, match=r"404\.parquet: there is no such file"):
            parquet(f"{url}/404.parquet").chunks("test")
        for status in (403, 500):
            with pytest.raises(StoreError, match=rf"cannot be read: the server refuses \(HTTP {status}\)"):
                parquet(f"{url}/{status}.parquet").chunks("test")
        server.shutdown()
    with pytest.raises(StoreError, match=r"parquet: cannot be read: the server does not answer \(.*\): check the URL"):
        parquet(f"{url}/404.parquet").chunks("test")


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
    write(tmp_path / "a.parquet", rows_table(20), group_rows=20, write_statistics=False)
    write(tmp_path / "b.parquet", rows_table(5, seed=1, splits=("few",)))
    batches, readings = read_all(parquet(tmp_path), "few")
    assert [batch.rows for batch in batches] == [5]
    assert [(one.read, one.excluded, one.unreadable) for one in readings] == [(0, 20, 0), (5, 0, 0)]


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
