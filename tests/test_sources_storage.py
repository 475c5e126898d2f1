"""Files in buckets and in memory are read as those in a directory are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline import inputs
from pipeline.batch import Batch
from pipeline.errors import CensusError, DataError, StoreError
from pipeline.filesystems import filesystem
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


def test_links_are_followed(tmp_path: Path):
    write(tmp_path / "elsewhere" / "b.parquet", rows_table(20, seed=1))
    write(tmp_path / "elsewhere" / "deep" / "c.parquet", rows_table(20, seed=2))
    write(tmp_path / "rows" / "a.parquet", rows_table(20))
    (tmp_path / "rows" / "b.parquet").symlink_to("../elsewhere/b.parquet")
    (tmp_path / "rows" / "part").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "all").symlink_to("rows")
    (tmp_path / "rows" / ".seen").symlink_to("nowhere")
    for folder in (tmp_path / "rows", tmp_path / "all"):
        for url in (folder, folder / "**/*.parquet", f"file://{folder}"):
            found = [str(Path(file.url).relative_to(folder)) for file in list_inputs(str(url))]
            assert found == ["a.parquet", "b.parquet", "part/c.parquet"]
        assert [Path(file.url).name for file in list_inputs(f"{folder}/*/*.parquet")] == ["c.parquet"]
    (linked,) = list_inputs(f"{tmp_path}/rows/b*")
    (real,) = list_inputs(f"{tmp_path}/elsewhere/b*")
    assert (linked.size, linked.etag, linked.modified_s) == (real.size, real.etag, real.modified_s)
    x, uid_N, _ = joined(read_all(parquet(tmp_path / "rows"), "test")[0])
    assert len(x) == sum(rows_table(20, seed=seed)["split"].to_pylist().count("test") for seed in range(3))
    assert len(uid_N.unique()) == len(x)


@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("b.parquet", "gone.parquet", r"b\.parquet: a link to gone\.parquet, which is nothing; expected a file"),
        ("b.parquet", "b.parquet", r"b\.parquet: a link to b\.parquet, which is nothing"),
        ("deep/up", "../..", r"rows/deep/up: a link to \.\./\.\., which is a directory that it lies in"),
        ("deep/other", "../../round", r"deep/other/back: a link to \.\., which is a directory that it lies in"),
    ],
)
def test_a_link_that_leads_to_no_more_files_is_named(tmp_path: Path, link: str, target: str, message: str):
    write(tmp_path / "rows" / "a.parquet", rows_table(20))
    (tmp_path / "rows" / "deep").mkdir()
    (tmp_path / "round").mkdir()
    (tmp_path / "round" / "back").symlink_to("..")
    (tmp_path / "rows" / link).symlink_to(target)
    with pytest.raises(DataError, match=message):
        parquet(tmp_path / "rows").chunks("test")
    with pytest.raises(DataError, match=message):
        list_inputs(f"{tmp_path}/rows/**/*")


@pytest.mark.parametrize("pattern", ["", "/**/*.parquet", "/v*/*", "/[lv]*/*"])
def test_what_is_there_by_its_own_name_is_listed_once(tmp_path: Path, pattern: str):
    write(tmp_path / "rows" / "v1" / "a.parquet", rows_table(20))
    write(tmp_path / "rows" / "v2" / "a.parquet", rows_table(30))
    for link, target in {"latest": "v2", "v1/b.parquet": "../v2/a.parquet", "v1/here": ".", "v1/up": ".."}.items():
        (tmp_path / "rows" / link).symlink_to(target)
    (tmp_path / "all").symlink_to("rows")
    for directory in ("rows", "all"):
        found = [
            file.url.removeprefix(f"{tmp_path}/{directory}/")
            for file in list_inputs(f"{tmp_path}/{directory}{pattern}")
        ]
        assert found == ["v1/a.parquet", "v2/a.parquet"]


@pytest.mark.parametrize("folder", ["_scratch", ".cache", ".a/_b", "plain"])
def test_what_is_hidden_begins_where_the_pattern_does(tmp_path: Path, folder: str):
    for name in ("a.parquet", "_b.parquet", ".c/a.parquet", "part-0/a.parquet", "part-0/_b.parquet"):
        write(tmp_path / folder / name, rows_table(20))
    here = tmp_path / folder
    for pattern, found in {
        "": ["a.parquet", "part-0/a.parquet"],
        "/*.parquet": ["a.parquet"],
        "/*/*": ["part-0/a.parquet"],
        "/**/*.parquet": ["a.parquet", "part-0/a.parquet"],
        "/_b*": ["_b.parquet"],
        "/p*/[ab].parquet": ["part-0/a.parquet"],
    }.items():
        assert [file.url for file in list_inputs(f"{here}{pattern}")] == [str(here / name) for name in found], pattern


@pytest.mark.parametrize("place", ["directory", "s3", "memory"])
@pytest.mark.parametrize(
    ("pattern", "there", "found"),
    [
        ("br[1]/a[2].parquet", "br[1]/a[2].parquet", "br[1]/a[2].parquet"),
        ("br[1]", "br[1]", "br[1]/a[2].parquet"),
        ("br[1]/*.parquet", "br[1]", "br[1]/a[2].parquet"),
        ("a*b/?[c]/d.parquet", "a*b/?[c]/d.parquet", "a*b/?[c]/d.parquet"),
    ],
)
def test_a_name_that_is_read_as_a_pattern_is_said(
    tmp_path: Path, s3_url: str, place: str, pattern: str, there: str, found: str
):
    places = {"directory": str(tmp_path), "s3": s3_url, "memory": f"memory://named/{tmp_path.name}"}
    fs, root = filesystem(places[place])
    for name in ("br[1]/a[2].parquet", "a*b/?[c]/d.parquet"):
        fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{root}/{name}", b"x")
    with pytest.raises(DataError, match="it is read as a pattern") as refused:
        list_inputs(f"{places[place]}/{pattern}")
    said = re.search(r"and (.*) is there: (name the directory it is in, or )?write '(.*)'; exp", str(refused.value))
    assert said is not None
    assert said[1].endswith(f"/{there}")
    advised = [said[3], said[1].rpartition("/")[0]] if said[2] else [said[3]]
    for url in advised:
        assert any(file.url.endswith(f"{root}/{found}") for file in list_inputs(url)), url


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
