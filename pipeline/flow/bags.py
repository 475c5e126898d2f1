"""Sums of embeddings as what they are: a multi-hot vector, weighted or not, times the table.

Layer 1: pure torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pipeline.flow.patches import Contraction
from pipeline.flow.row_joins import Source, rows_of_bags
from pipeline.flow.values import Call, Origin, Value

SUM, MEAN = 0, 1


@dataclass(frozen=True)
class Bags(Contraction):
    """z = x · table for a multi-hot x (N, D), as a linear layer."""

    @property
    def kind(self) -> str:
        """A table of embeddings that are summed."""
        return "embedding_bag"


def bags_of(call: Call) -> tuple[torch.Tensor, Value] | None:
    """The sparse x (N, D) of an embedding bag and what is known of it; None where it keeps maxima or is of no data."""
    given = call.bound()
    weight, indices = given["weight"], given["indices"]
    values = dict(zip(map(id, call.tensors), call.values, strict=True))
    if given.get("mode", SUM) not in (SUM, MEAN) or values[id(indices)].origin is not Origin.DATA:
        return None
    offsets = given["offsets"][:-1] if given.get("include_last_offset", False) else given["offsets"]
    sources = [
        Source(value.rows, tensor.shape, tensor) for tensor, value in zip(call.tensors, call.values, strict=True)
    ]
    x = Value(None, Origin.DATA, rows=rows_of_bags(given, sources))
    return _multi_hot(weight, indices, offsets, given), x


def _multi_hot(
    weight: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, given: dict[str, Any]
) -> torch.Tensor:
    bag = torch.bucketize(torch.arange(len(indices), device=indices.device), offsets, right=True) - 1
    value = given.get("per_sample_weights")
    value = torch.ones(len(indices), dtype=weight.dtype, device=weight.device) if value is None else value
    padding = given.get("padding_idx")
    if padding is not None:
        kept = indices != padding % len(weight)
        bag, indices, value = bag[kept], indices[kept], value[kept]
    if given.get("mode", SUM) == MEAN:
        value = value / torch.bincount(bag, minlength=len(offsets)).to(value.dtype)[bag]
    size = (len(offsets), len(weight))
    return torch.sparse_coo_tensor(torch.stack([bag, indices.long()]), value, size, check_invariants=False).coalesce()
