"""What two batches must share for a forward to be able to do the same operations on both.

Layer 1. Only batches of plain tensors, in tuples, lists and dictionaries, have one.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch

from pipeline.batch import Batch

_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device)


class Signature(NamedTuple):
    """`key` is equal of batches that are alike; `leaves` are their tensors, in order, each once."""

    key: Hashable
    leaves: list[torch.Tensor]


class _UnlikeError(Exception):
    """A part of a batch that says nothing of what is computed with it."""


def signature_of(batch: Batch) -> Signature | None:
    """The signature of a batch; None where some part is no plain tensor or value.

    Nothing of the batch is kept alive by it but its plain values.
    """
    leaves: list[torch.Tensor] = []
    numbers: dict[int, int] = {}
    try:
        given = [_key_of(part, leaves, numbers) for part in (batch.inputs, batch.kwargs, batch.mask_NS)]
        call = None if batch.call is None else weakref.ref(batch.call)
        labels_NS = None if batch.label_NS is None else batch.label_NS.shape
        key = (*given, (batch.rows, batch.label_N is not None, labels_NS, batch.position_axes, call))
        hash(key)
    except (_UnlikeError, TypeError):
        return None
    return Signature(key, leaves)


def _key_of(value: Any, leaves: list[torch.Tensor], numbers: dict[int, int]) -> Hashable:
    kind = type(value)
    if kind is torch.Tensor:
        return _key_of_tensor(value, leaves, numbers)
    if kind in (tuple, list):
        return kind, tuple([_key_of(part, leaves, numbers) for part in value])
    if isinstance(value, Mapping):
        return kind, tuple([(name, _key_of(part, leaves, numbers)) for name, part in value.items()])
    if kind in _PLAIN:
        return kind, value
    raise _UnlikeError


def _key_of_tensor(tensor: torch.Tensor, leaves: list[torch.Tensor], numbers: dict[int, int]) -> Hashable:
    if tensor.layout is not torch.strided:
        raise _UnlikeError
    number = numbers.setdefault(id(tensor), len(leaves))
    if number == len(leaves):
        leaves.append(tensor)
    return number, tensor.shape, tensor.stride(), tensor.dtype, tensor.device
