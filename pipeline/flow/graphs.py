"""Rows of the inputs of graph batches: which graph each node and each edge belongs to.

Layer 1. By the shapes that graph libraries share: the nodes of all graphs along one axis, edges as a (2, E) integer
tensor of nodes, from and to. Whose node is whose is said by a sorted integer for each node that numbers its graph, by
the number of nodes of each graph, by where each begins, or by a list of each graph's nodes; else each node is a row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from pipeline.flow.rows import CPU, Rows, Shape, along


@dataclass(frozen=True, eq=False)
class Graphs:
    """The row of every node and, where edges are given, of every edge: that of the node it leads to."""

    rows: int
    node_V: torch.Tensor
    edge_E: torch.Tensor | None

    @staticmethod
    def among(leaves: Sequence[tuple[torch.Tensor, int | None]], rows: int) -> Graphs | None:
        """The graphs that input tensors describe, None if they describe none; with the row of those of one row alone.

        Where nothing says so, each of several nodes that edges join is a row.
        """
        shared = [leaf for leaf, row in leaves if row is None]
        node_V = _said_of_nodes(shared, rows)
        if node_V is None:
            node_V = _listed([(leaf, row) for leaf, row in leaves if row is not None], shared, rows)
        if node_V is not None:
            node_V = node_V.to(CPU)
        of_graphs = node_V is not None
        if node_V is None:
            if not any(leaf.dim() > 0 and len(leaf) == rows for leaf in shared):
                return None
            node_V = torch.arange(rows)
        edges = [leaf for leaf in shared if _joins_nodes(leaf, len(node_V))]
        if not of_graphs and not edges:
            return None
        return Graphs(rows, node_V, node_V[edges[0][1].to(CPU)] if edges else None)

    def rows_of(self, shape: Shape) -> Rows | None:
        """The rows of an input with nodes or edges along its first axis, or edges as (2, E); None of any other."""
        if shape and shape[0] == len(self.node_V):
            return along(0, self.node_V, self.rows)
        if self.edge_E is not None and len(self.edge_E) in (*shape[:1], *(shape[1:] if shape[:1] == (2,) else ())):
            return along(0 if shape[0] == len(self.edge_E) else 1, self.edge_E, self.rows)
        return None


def _said_of_nodes(leaves: Sequence[torch.Tensor], rows: int) -> torch.Tensor | None:
    """The graph of each node where one tensor tells: a number for each node, sizes, or where each graph begins."""
    for leaf in leaves:
        if _numbers_graphs(leaf, rows):
            return leaf
    counts = {len(leaf) for leaf in leaves if leaf.dim() > 0} - {rows, rows + 1}
    for leaf in leaves:
        sizes = _sizes(leaf, rows, counts)
        if sizes is not None and int(sizes.sum()) in counts:
            return torch.repeat_interleave(torch.arange(rows), sizes.cpu())
    return None


def _sizes(leaf: torch.Tensor, rows: int, counts: Collection[int]) -> torch.Tensor | None:
    """How many nodes each graph has, from their number itself or from where each begins; `counts` may be of nodes."""
    if leaf.is_floating_point() or leaf.dtype == torch.bool or leaf.dim() != 1 or rows < 2 or not len(leaf):
        return None
    begins = int(leaf[0]) == 0
    if len(leaf) == rows and begins and len(counts) == 1:
        leaf = torch.cat([leaf, leaf.new_tensor(list(counts))])
    if len(leaf) == rows + 1 and begins:
        leaf = leaf.diff()
    elif len(leaf) != rows or begins:
        return None
    return leaf if bool((leaf >= 0).all()) else None


def _listed(
    leaves: Sequence[tuple[torch.Tensor, int]], shared: Sequence[torch.Tensor], rows: int
) -> torch.Tensor | None:
    """The graph of each node where a list has the nodes of each: every node once."""
    lists = [(leaf, row) for leaf, row in leaves if leaf.dtype == torch.int64 and leaf.dim() == 1]
    nodes = torch.cat([leaf.to(CPU) for leaf, _ in lists]) if len(lists) == rows > 1 else torch.empty(0)
    if not len(nodes) or not any(len(leaf) == len(nodes) for leaf in shared if leaf.dim() > 0):
        return None
    if not torch.equal(nodes.sort().values, torch.arange(len(nodes))):
        return None
    node_V = torch.empty(len(nodes), dtype=torch.int64)
    for leaf, row in lists:
        node_V[leaf.to(CPU)] = row
    return node_V


def _numbers_graphs(leaf: torch.Tensor, rows: int) -> bool:
    if leaf.dtype != torch.int64 or leaf.dim() != 1 or len(leaf) <= rows or rows < 2:
        return False
    sorted_ = bool((leaf.diff() >= 0).all())
    return sorted_ and int(leaf[0]) >= 0 and int(leaf[-1]) == rows - 1


def _joins_nodes(leaf: torch.Tensor, nodes: int) -> bool:
    if leaf.dtype != torch.int64 or leaf.dim() != 2 or leaf.shape[0] != 2 or leaf.layout is not torch.strided:
        return False
    return leaf.numel() == 0 or (int(leaf.min()) >= 0 and int(leaf.max()) < nodes)
