"""Graphs: one batch of all nodes, of which a split's are counted; an edge that leads to none is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.batch import Batch
from pipeline.errors import DataError, JobError
from pipeline.job_sections import Columns, DataSpec
from pipeline.rows.reading import Reading
from pipeline.sources.graph import Graph
from pipeline.store import open_store

SPLITS = ["train", "test", "train", "test", "none"]


def nodes(path: Path, **changed: Any) -> Path:
    columns = {
        "a": [0.0, 1, 2, 3, 4],
        "b": [5.0, 6, 7, 8, 9],
        "y": [0, 1, 2, 0, 1],
        "split": SPLITS,
        "name": list("vwxyz"),
        **changed,
    }
    pq.write_table(pa.table(columns), path / "nodes.parquet", row_group_size=2)
    return path


def edges(path: Path, source: list[Any], target: list[Any], name: str = "edges.parquet") -> Path:
    pq.write_table(pa.table({"source": source, "target": target}), path / name, row_group_size=2)
    return path


def graph(path: Path, *, key: str | None = None, files: str = "edges.parquet", **options: Any) -> Graph:
    columns = Columns(features=("a", "b"), label="y", split="split", key=key)
    given = {"edges": str(path / files), **options}
    spec = DataSpec(url=str(path / "nodes.parquet"), columns=columns, classes=3, options=given)
    return Graph("g", spec, open_store("memory://unused"))


def read(source: Graph, split: str) -> tuple[Batch, Reading]:
    (chunk,) = source.chunks(split)
    reading = source.read(chunk, 2)
    (batch,) = reading
    return batch, reading


def test_the_nodes_of_a_split_are_counted_and_labelled_and_all_take_part(tmp_path: Path):
    source = graph(edges(nodes(tmp_path), [0, 3, 4], [1, 0, 4]))
    batch, reading = read(source, "test")
    x, edge = batch.inputs
    assert x.tolist() == [[0, 5], [1, 6], [2, 7], [3, 8], [4, 9]]
    assert edge.tolist() == [[0, 3, 4], [1, 0, 4]]
    assert batch.label_N is not None
    assert batch.label_N.tolist() == [-1, 1, -1, 0, -1]
    assert batch.mask_NS is not None
    assert batch.mask_NS.tolist() == [[split == "test"] for split in SPLITS]
    assert (reading.read, reading.excluded, reading.unreadable) == (2, 3, 0)
    (chunk,) = source.chunks("test")
    assert chunk.uid_base is not None
    assert batch.uid_N.tolist() == [(chunk.uid_base + row) % 2**63 for row in range(5)]
    assert chunk.id != source.chunks("train")[0].id


def test_edges_may_name_nodes_by_their_key_and_lie_in_several_files(tmp_path: Path):
    edges(nodes(tmp_path), ["v", "y"], ["w", "v"], "edges-0.parquet")
    edges(tmp_path, ["z"], ["z"], "edges-1.parquet")
    batch, _ = read(graph(tmp_path, key="name", files="edges-*.parquet"), "train")
    assert batch.inputs[1].tolist() == [[0, 3, 4], [1, 0, 4]]


def test_a_graph_without_edges_or_without_nodes_of_a_split(tmp_path: Path):
    pq.write_table(pa.table({"source": pa.array([], pa.int64()), "target": pa.array([], pa.int64())}), tmp_path / "e")
    source = graph(nodes(tmp_path), files="e")
    assert read(source, "train")[0].inputs[1].shape == (2, 0)
    assert source.chunks("zzz") == ()
    # between "test" and "train": the footer cannot exclude it
    assert source.chunks("tom") == ()
    assert list(source.splits()) == sorted(set(SPLITS))


@pytest.mark.parametrize(
    ("key", "source", "target", "message"),
    [
        (None, [0, 1, 2], [1, 5, 0], r"edges\.parquet, row 1: an edge ends at node 5, which is none of the 5 nodes"),
        (None, [0, -1], [1, 0], r"row 1: an edge ends at node -1, which is none of the 5 nodes"),
        (None, [0, None], [1, 0], r"row 1: an edge ends at node None"),
        ("name", ["v", "v"], ["w", "q"], r"row 1: an edge ends at node 'q', which is none of the 5 nodes"),
    ],
)
def test_an_edge_to_a_missing_node(tmp_path: Path, key: str | None, source: list, target: list, message: str):
    with pytest.raises(DataError, match=message):
        read(graph(edges(nodes(tmp_path), source, target), key=key), "test")


@pytest.mark.parametrize("beyond", [2**63, 2**64 - 1])
def test_an_edge_to_a_number_beyond_int64(tmp_path: Path, beyond: int):
    ends = pa.array([0, 1, beyond], pa.uint64())
    with pytest.raises(DataError, match=rf"row 2: an edge ends at node {beyond}, which is none of the 5 nodes"):
        read(graph(edges(nodes(tmp_path), ends, pa.array([1, 2, 3], pa.uint64()))), "test")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"b": [1.0, None, 2, 3, 4]}, r"nodes\.parquet, row 1: column 'b' is null; a graph needs every node"),
        ({"name": list("vvxyz")}, r"key 'name' names several nodes"),
        ({"y": [0, 1, 2, 3, 0]}, r"labels 2 to 3 in column 'y', expected 0 to 2"),
    ],
)
def test_nodes_that_cannot_be(tmp_path: Path, changed: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        read(graph(edges(nodes(tmp_path, **changed), ["v"], ["w"]), key="name"), "test")


def test_a_corrupt_row_group_of_edges_is_refused(tmp_path: Path):
    table = pa.table({"source": pa.array([0] * 4000), "target": pa.array([1] * 4000)})
    path = tmp_path / "edges.parquet"
    pq.write_table(table, path, row_group_size=2000, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(1).column(0)
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"edges\.parquet: row group 1 is corrupt: .*; a graph needs all of it"):
        read(graph(nodes(tmp_path)), "test")


def test_edges_that_change_make_another_graph(tmp_path: Path):
    source = graph(edges(nodes(tmp_path), [0, 3, 4], [1, 0, 4]))
    (chunk,) = source.chunks("test")
    edges(tmp_path, [0, 3, 4], [1, 0, 3])
    changed = graph(tmp_path)
    assert changed.chunks("test")[0].id != chunk.id
    with pytest.raises(DataError, match="the graph has changed since the run was planned"):
        list(changed.read(chunk, 2))


def test_what_the_job_gets_wrong_is_named(tmp_path: Path):
    edges(nodes(tmp_path), ["v"], ["w"])
    with pytest.raises(DataError, match=r"column 'source' is string, expected integers, the numbers of nodes"):
        graph(tmp_path).chunks("test")
    with pytest.raises(DataError, match=r"there is no column 'from'; known: source, target"):
        graph(tmp_path, key="name", source="from").chunks("test")
    with pytest.raises(JobError, match=r"options\.edges"):
        Graph("g", DataSpec(url=str(tmp_path)), open_store("memory://unused"))
    (tmp_path / "more.parquet").write_bytes((tmp_path / "nodes.parquet").read_bytes())
    spec = DataSpec(url=str(tmp_path), columns=Columns(features=("a",)), options={"edges": "e"})
    with pytest.raises(JobError, match=r"url: 3 files of nodes; a graph has one"):
        Graph("g", spec, open_store("memory://unused")).chunks("all")


def test_a_convolution_over_a_part_of_the_nodes_sees_their_neighbours(tmp_path: Path):
    from pipeline.models.gcn import normalised_adjacency

    batch, _ = read(graph(edges(nodes(tmp_path), [0, 3, 4], [1, 0, 4])), "test")
    x, edge = batch.inputs
    mean = normalised_adjacency(edge, 5, x.dtype) @ x
    assert torch.allclose(mean[1], x[1] / 2 + x[0] / 6**0.5)
