"""Graph convolutional network: Kipf & Welling, Semi-Supervised Classification with Graph Convolutional Networks,
ICLR 2017 (arXiv:1609.02907), equations 2 and 9.

Each layer is φ(Â H W) with Â = D̃^(-1/2) (A + I) D̃^(-1/2), sparse. Â H is computed first, so that what a unit is shown
is the mean of a neighbourhood: the same function as the authors' Â (H W), as the product is associative. On a GPU the
product with Â (cuSPARSE's) is not the same to the last bit from one time to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import nn
from torch.nn import functional

from pipeline.errors import DataError
from pipeline.hashing import row_hash, splitmix64
from pipeline.models.base import Family, Hyperparameters, Neighbourhoods, Task
from pipeline.names import UNNAMED, Names
from pipeline.sites import InputSpace


class GCNParameters(Hyperparameters):
    """`widths` of the hidden layers in units, `dropout` of every layer's input, `bias` (the paper has none)."""

    widths: tuple[PositiveInt, ...] = Field(default=(16,), min_length=1, strict=False)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    bias: bool = False


class GCN(Family):
    """Trains on the whole graph at once; Glorot's uniform initialisation, as in the paper."""

    name: ClassVar[str] = "gcn"
    version: ClassVar[int] = 1
    parameters: ClassVar[type[Hyperparameters]] = GCNParameters
    whole: ClassVar[bool] = True

    def build(self, parameters: GCNParameters, task: Task) -> nn.Module:
        """Layers of graph convolution over the nodes' features."""
        self.expect(task, "numbers")
        return _GCN(parameters, task)

    def prepare(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The nodes' features and Â instead of the edges."""
        x_VD, edge_2E = inputs
        return x_VD, normalised_adjacency(edge_2E, len(x_VD), x_VD.dtype)

    def neighbourhoods(self, inputs: tuple[Any, ...]) -> Neighbourhoods:
        """The neighbours of every node, from prepared inputs."""
        x_VD, adjacency = inputs
        return _Neighbours(x_VD, adjacency.indices())

    def example(self, task: Task, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Nodes in a ring."""
        node = torch.arange(rows)
        return *super().example(task, rows, dtype), torch.stack([node, (node + 1) % rows])

    def inputs(self, parameters: GCNParameters, task: Task, names: Names = UNNAMED) -> Mapping[str, InputSpace]:
        """A unit sees means over a node and its neighbours."""
        means = [[f"mean {names.feature(number)}" for number in range(task.shape[0])]]
        means += [
            [f"mean layers.{layer} {unit}" for unit in range(width)] for layer, width in enumerate(parameters.widths)
        ]
        return {f"layers.{layer}": InputSpace("neighbourhood", (len(of),), tuple(of)) for layer, of in enumerate(means)}


class _GCN(nn.Module):
    def __init__(self, parameters: GCNParameters, task: Task) -> None:
        super().__init__()
        widths = (*task.shape, *parameters.widths, task.outputs)
        self.dropout = parameters.dropout
        self.layers = nn.ModuleList(
            nn.Linear(widths[layer], widths[layer + 1], bias=parameters.bias) for layer in range(len(widths) - 1)
        )
        for name, value in self.named_parameters():
            nn.init.zeros_(value) if name.endswith("bias") else nn.init.xavier_uniform_(value)

    def forward(self, x: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
        """Logits (V, outputs) of features x (V, D) and edges (2, E) between numbers of nodes, or Â itself."""
        adjacency = edge if edge.is_sparse else normalised_adjacency(edge, len(x), x.dtype)
        *hidden, last = self.layers
        for layer in hidden:
            x = functional.relu(layer(self._aggregated(adjacency, x)))
        return last(self._aggregated(adjacency, x))  # type: ignore[no-any-return]

    def _aggregated(self, adjacency: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen, device = functional.dropout(x, self.dropout, self.training), x.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            if seen.is_cuda and seen.dtype in (torch.bfloat16, torch.float16):
                # there is no sparse product of these on GPUs
                return torch.sparse.mm(adjacency.float(), seen.float()).to(seen.dtype)
            return torch.sparse.mm(adjacency, seen)
        # a sparse product has no gradient in lower precision
        with torch.autocast(device, enabled=False):
            return torch.sparse.mm(adjacency, seen.to(adjacency.dtype))


def normalised_adjacency(edge_2E: torch.Tensor, nodes: int, dtype: torch.dtype) -> torch.Tensor:
    """Â as a sparse (V, V) tensor; edges have no direction, and they and self-loops count once however often given.

    DataError where an edge leads to a node that does not exist.
    """
    if edge_2E.numel() and not 0 <= int(edge_2E.min()) <= int(edge_2E.max()) < nodes:
        raise DataError(f"an edge joins nodes {edge_2E.min()} … {edge_2E.max()}; expected 0 … {nodes - 1}")
    itself = torch.arange(nodes, device=edge_2E.device)
    row, column = torch.cat([edge_2E, edge_2E.flip(0), torch.stack([itself, itself])], 1)
    once = torch.unique(row * nodes + column)
    row, column = once // nodes, once % nodes
    degree = torch.bincount(row, minlength=nodes).to(dtype)
    value = (degree[row] * degree[column]).rsqrt()
    index = torch.stack([row, column])
    return torch.sparse_coo_tensor(index, value, (nodes, nodes), is_coalesced=True, check_invariants=False)


class _Neighbours(Neighbourhoods):
    """Uniform draws without replacement: Hamilton, Ying & Leskovec, NeurIPS 2017 (arXiv:1706.02216), algorithm 2.

    `index_2E` are the places of Â's numbers, in the order of their rows: every node is among its own neighbours.
    """

    def __init__(self, x_VD: torch.Tensor, index_2E: torch.Tensor) -> None:
        self.x_VD, (row, self.neighbour) = x_VD, index_2E
        self.degree = torch.bincount(row, minlength=len(x_VD))
        self.first = self.degree.cumsum(0) - self.degree

    def draw(self, row_N: torch.Tensor, counts: Sequence[int], seed: int) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """The nodes, those asked for first, and their features with the edges that were drawn."""
        node, reached, edges = row_N, row_N, []
        for step, count in enumerate(counts):
            edges.append(self._edges(reached, count, splitmix64(seed + step)))
            known = torch.zeros(len(self.x_VD), dtype=torch.bool, device=node.device)
            known[node] = True
            reached = edges[-1][1].unique()
            reached = reached[~known[reached]]
            node = torch.cat([node, reached])
        number = torch.empty(len(self.x_VD), dtype=torch.int64, device=node.device)
        number[node] = torch.arange(len(node), device=node.device)
        return node, (self.x_VD[node], number[torch.cat(edges, 1)])

    def _edges(self, node: torch.Tensor, count: int, seed: int) -> torch.Tensor:
        degree = self.degree[node]
        which = torch.arange(len(node), device=node.device).repeat_interleave(degree)
        within = torch.arange(len(which), device=node.device) - (degree.cumsum(0) - degree)[which]
        place = self.first[node][which] + within
        # by the hash of their place, the first `count` of each node
        order = row_hash(place, seed=seed).argsort(stable=True)
        order = order[which[order].argsort(stable=True)]
        kept = order[within < count]
        return torch.stack([node[which[kept]], self.neighbour[place[kept]]])


FAMILY = GCN()
