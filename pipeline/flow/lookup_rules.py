"""How operations begin, weight, join and end lookups.

Layer 1.
"""

from __future__ import annotations

import torch

from pipeline.flow.lookups import Block, Lookup
from pipeline.flow.operators import words
from pipeline.flow.values import Call, Value

_RESHAPES = words("view reshape flatten unflatten unsqueeze squeeze contiguous to _to_copy clone detach dropout alias")
_JOINS = words("cat concat concatenate stack")
# Operations that may begin a lookup.
LOOKING = words("embedding index_select index mul")


def lookup_of(call: Call) -> Lookup | None:
    """The lookup that an operation's result holds, from those of its operands; None if it holds none."""
    name, values = call.op.name, call.values
    if name == "embedding":
        table, index = call.tensors[:2]
        return _first(values[0], table, index)
    if name in ("index_select", "index") and values[0].learned and not values[0].lookup:
        index = call.tensors[1]
        return _first(values[0], call.tensors[0], index) if len(call.tensors) == 2 else None
    if name == "mul" and len(values) == 2:
        return _weighted(call)
    held = [value.lookup for value in values]
    if name in _JOINS and held and all(held):
        return tuple(block for lookup in held if lookup for block in lookup)
    return held[0] if held and name in _RESHAPES else None


def _first(value: Value, table: torch.Tensor, index: torch.Tensor) -> Lookup | None:
    if not value.learned or not value.names or table.dim() != 2 or index.is_floating_point():
        return None
    return (Block(value.key, table, value.names, index, None),)


def _weighted(call: Call) -> Lookup | None:
    for (tensor, value), (other, other_value) in (_pairs(call), _pairs(call)[::-1]):
        narrow = other.shape[-1:] == (1,) and not other_value.learned
        if value.lookup and narrow:
            return tuple(block.weighted(other[..., 0]) for block in value.lookup)
        if narrow and value.learned and value.names and tensor.dim() == 2 and other.dim() == 3:
            return (Block(value.key, tensor, value.names, None, other[..., 0]),)
    return None


def _pairs(call: Call) -> list[tuple[torch.Tensor, Value]]:
    return list(zip(call.tensors, call.values, strict=True))
