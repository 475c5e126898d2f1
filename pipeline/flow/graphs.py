"""Rows of the inputs of graph batches: which graph each node and each edge belongs to.

Layer 1. By the shapes that graph libraries share: nodes of all graphs one after another, a sorted integer for each node
that numbers its graph (unless each node is a row itself), edges as a (2, E) integer tensor of nodes, from and to.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    def among(leaves: Sequence[torch.Tensor], rows: int) -> Graphs | None:
        """The graphs that input tensors describe, None if they describe none."""
        of_node = [leaf for leaf in leaves if _numbers_graphs(leaf, rows)]
        if of_node:
            node_V = of_node[0].to(CPU)
        elif any(leaf.dim() > 0 and len(leaf) == rows for leaf in leaves):
            node_V = torch.arange(rows)
        else:
            return None
        edges = [leaf for leaf in leaves if _joins_nodes(leaf, len(node_V))]
        if not of_node and not edges:
            return None
        return Graphs(rows, node_V, node_V[edges[0][1].to(CPU)] if edges else None)

    def rows_of(self, shape: Shape) -> Rows | None:
        """The rows of an input with nodes or edges along its first axis, or edges as (2, E); None of any other."""
        if shape and shape[0] == len(self.node_V):
            return along(0, self.node_V, self.rows)
        if self.edge_E is not None and len(self.edge_E) in (*shape[:1], *(shape[1:] if shape[:1] == (2,) else ())):
            return along(0 if shape[0] == len(self.edge_E) else 1, self.edge_E, self.rows)
        return None


def _numbers_graphs(leaf: torch.Tensor, rows: int) -> bool:
    if leaf.dtype != torch.int64 or leaf.dim() != 1 or len(leaf) <= rows or rows < 2:
        return False
    sorted_ = bool((leaf.diff() >= 0).all())
    return sorted_ and int(leaf[0]) >= 0 and int(leaf[-1]) == rows - 1


def _joins_nodes(leaf: torch.Tensor, nodes: int) -> bool:
    if leaf.dtype != torch.int64 or leaf.dim() != 2 or leaf.shape[0] != 2 or leaf.layout is not torch.strided:
        return False
    return leaf.numel() == 0 or (int(leaf.min()) >= 0 and int(leaf.max()) < nodes)
