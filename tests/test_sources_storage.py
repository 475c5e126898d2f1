"""Files in buckets and in memory are read as those in a directory are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline import inputs
from pipeline.batch import Batch
from pipeline.errors import CensusError, DataError, StoreError
from pipeline.inputs import list_inputs, open_input
from pipeline.job_sections import Columns, DataSpec
from pipeline.registry import sources
from pipeline.store import open_store
from tests.row_files import ids, joined, parquet, read_all, rows_table, write


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
