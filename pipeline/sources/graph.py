"""A graph in Parquet: a file of nodes with features, labels and splits, and files of edges between them.

A graph is read whole, as one batch of all of its nodes: the rows of a split are those that are counted and labelled,
the others still take part. So every node must be readable, and every edge must lead to a node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field

from pipeline.batch import Batch
from pipeline.counted import counted
from pipeline.errors import DataError
from pipeline.hashing import digest
from pipeline.inputs import list_inputs
from pipeline.rows.decode import whole_numbers
from pipeline.rows.features import Role, is_integer, is_name
from pipeline.rows.footers import Footer, read_footer
from pipeline.rows.format import RowFormat, check_columns
from pipeline.rows.groups import read_groups
from pipeline.rows.reading import Piece, Reading, Stretch
from pipeline.rows.tally import as_text
from pipeline.sources.base import READ_VERSION, Chunk, FileSource, Options


class GraphOptions(Options):
    """What a graph takes besides."""

    edges: str = Field(description="file, directory or glob of Parquet or Arrow files of edges; relative to the job")
    source: str = Field(default="source", description="column with the node that an edge leaves")
    target: str = Field(default="target", description="column with the node that it leads to")


class Graph(FileSource):
    """One graph as x (V, D) and edge (2, E). An edge names nodes by `columns.key`, or by their number in the file."""

    name: ClassVar[str] = "graph"
    parameters: ClassVar[type[Options]] = GraphOptions
    whole: ClassVar[bool] = True
    files: ClassVar[tuple[str, ...]] = ("edges",)
    options: GraphOptions

    def chunks(self, split: str) -> tuple[Chunk, ...]:
        """The graph, if it can have nodes of the split."""
        nodes, rows = self._nodes, self._format(split)
        rows.check(nodes)
        rows.check_labels(nodes)
        for footer in self._edges:
            check_columns(footer, self._ends)
        if not (any(rows.may_hold_split(nodes, group) for group in nodes.groups) and self.holds(split)):
            return ()
        chunk = self._chunk(nodes, rows, 0, len(nodes.groups), 0, nodes.rows)
        return (replace(chunk, id=digest([READ_VERSION, chunk.id, self._edge_identity])),)

    def read(self, chunk: Chunk, batch_rows: int) -> Reading[Any, Any]:
        """One batch, whatever `batch_rows`. DataError at a node that cannot be read or an edge that leads to none."""
        return Reading(
            where=f"data {self.data}: {chunk.url}",
            rows=chunk.rows,
            fetch=lambda: self._graph(chunk),
            pieces=iter,
            join=_only,
            batch_rows=max(1, chunk.rows),
        )

    @cached_property
    def _nodes(self) -> Footer:
        if len(self.listed) != 1:
            raise self.refusal("url", f"{counted(len(self.listed), 'file')} of nodes; a graph has one")
        return self.listed[0]

    @cached_property
    def _edges(self) -> tuple[Footer, ...]:
        files = list_inputs(self.spec.located(self.options.edges))
        return tuple(read_footer(self.spec.named(file.url), file) for file in files)

    @property
    def _edge_identity(self) -> list[Any]:
        return [self.options.source, self.options.target, *(footer.file_id for footer in self._edges)]

    @property
    def _ends(self) -> tuple[Role, Role]:
        keyed = self.spec.columns.key is not None
        expected = "strings or integers" if keyed else "integers, the numbers of nodes (no column is their key)"
        fits = is_name if keyed else is_integer
        return Role(self.options.source, expected, fits), Role(self.options.target, expected, fits)

    def _graph(self, chunk: Chunk) -> Iterator[Piece[Batch]]:
        if chunk.id not in {one.id for one in self.chunks(chunk.split)}:
            raise DataError(
                f"data {self.data}: {chunk.url}: the graph has changed since the run was planned; run again"
            )
        wanted_rows = self._format(chunk.split)
        every = replace(wanted_rows, split_column=None)
        nodes = _read_all(self.locate(chunk.url), self._nodes, wanted_rows.columns)
        batch = self._decoded(chunk, every, nodes)
        edge_2E = torch.from_numpy(np.concatenate([self._ends_of(footer, nodes) for footer in self._edges], 1))
        wanted_V = torch.from_numpy(wanted_rows.wanted(nodes))
        label_V = None if batch.label_N is None else batch.label_N.where(wanted_V, -1)
        wanted = int(wanted_V.sum())
        graph = replace(batch, inputs=(*batch.inputs, edge_2E), label_N=label_V, mask_NS=wanted_V[:, None])
        yield Piece(batch.rows if wanted else 0, graph, excluded=batch.rows - wanted, made_of=wanted)

    def _decoded(self, chunk: Chunk, every: RowFormat, nodes: pa.RecordBatch) -> Batch:
        where = f"data {self.data}: {chunk.url}"
        piece = every.decode(nodes, where=where, first_row=0, uid_base=chunk.uid_base)
        if piece.unreadable:
            first = piece.unreadable[0]
            raise DataError(f"{where}, row {first.first_row}: {first.reason}; a graph needs every node")
        uids, counts = np.unique(piece.content.uid_N, return_counts=True)
        if (counts > 1).any():
            raise DataError(
                f"{where}: the key {self.spec.columns.key!r} names several nodes, uid {uids[counts > 1][0]}"
            )
        return every.join([Stretch(piece.content, 0, piece.rows)])

    def _ends_of(self, footer: Footer, nodes: pa.RecordBatch) -> np.ndarray:
        """(2, E) numbers of nodes of the edges of one file."""
        names = (self.options.source, self.options.target)
        edges = _read_all(self.locate(footer.name), footer, names)
        where = f"data {self.data}: {footer.name}"
        return np.stack([self._numbers_of(edges[name], nodes, where) for name in names])

    def _numbers_of(self, ends: pa.Array, nodes: pa.RecordBatch, where: str) -> np.ndarray:
        key = self.spec.columns.key
        if key is None:
            found = whole_numbers(ends)
            outside = pc.or_(pc.less(found, 0), pc.greater_equal(found, nodes.num_rows))
            found = pc.if_else(outside, pa.scalar(None, pa.int64()), found)
        else:
            found = pc.index_in(as_text(ends), value_set=as_text(nodes[key]))
        if (first := pc.index(found.is_null(), True).as_py()) >= 0:
            raise DataError(
                f"{where}, row {first}: an edge ends at node {ends[first].as_py()!r}, which is none of the "
                f"{counted(nodes.num_rows, 'node')}"
            )
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int64)


def _only(stretches: Sequence[Stretch[Batch]]) -> Batch:
    (stretch,) = stretches
    return stretch.content


def _read_all(url: str, footer: Footer, columns: Sequence[str]) -> pa.RecordBatch:
    """All rows of a file; DataError if any cannot be read."""
    parts: list[pa.RecordBatch] = []
    for group in read_groups(url, footer.file_id, footer.groups, columns):
        if group.damage:
            raise DataError(f"{footer.file.url}: {group.damage}; a graph needs all of it")
        parts += group.parts
    if parts:
        return pa.concat_batches(parts)
    return pa.record_batch({name: pa.array([], footer.schema.field(name).type) for name in columns})


SOURCE = Graph
