"""Rows cut out of their batches, held back, and run together: a sample of rows then costs its share of a forward pass.

Layer 1. Only for models that make the same of a row in any batch, which `discover` tries on its probe: where there is a
graph, a norm over the batch or a state kept between forwards they do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pipeline.batch import Batch
from pipeline.sites import Presentations

# of the largest number: the same row in a batch of another size is rounded otherwise
SAME = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
_NAMED = ("uid_N", "label_N", "label_NS", "mask_NS")
# the axis of the rows of each tensor among a batch's arguments, as a probe had it
Axes = Sequence[int | None]


def cut(batch: Batch, keep_N: torch.Tensor, axes: Axes) -> Batch | None:
    """The rows where the bool `keep_N` is True, copied; None where some part of the arguments has no axis of rows."""
    leaves, spec = pytree.tree_flatten((batch.inputs, dict(batch.kwargs)))
    index_K = keep_N.nonzero()[:, 0]
    found = iter(axes)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            axis = next(found, None)
            if axis is None or leaf.layout is not torch.strided or leaf.shape[axis : axis + 1] != (batch.rows,):
                return None
            leaves[place] = leaf.index_select(axis, index_K.to(leaf.device))
        elif not isinstance(leaf, _PLAIN):
            return None
    inputs, kwargs = pytree.tree_unflatten(leaves, spec)
    named = {name: getattr(batch, name) for name in _NAMED}
    kept: dict[str, Any] = {
        name: None if value is None else value[index_K.to(value.device)] for name, value in named.items()
    }
    return replace(batch, inputs=inputs, kwargs=kwargs, **kept)


def joined(parts: Sequence[Batch], axes: Axes) -> Batch:
    """The rows of batches that are alike (see `Held`), one batch after the other."""
    flat = [pytree.tree_flatten((part.inputs, dict(part.kwargs))) for part in parts]
    leaves, spec = flat[0]
    found = iter(axes)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            leaves[place] = torch.cat([each[place] for each, _ in flat], next(found) or 0)
    inputs, kwargs = pytree.tree_unflatten(leaves, spec)
    named = {name: [getattr(part, name) for part in parts] for name in _NAMED}
    whole: dict[str, Any] = {name: None if values[0] is None else torch.cat(values) for name, values in named.items()}
    return replace(parts[0], inputs=inputs, kwargs=kwargs, **whole)


class Held:
    """Rows of batches that wait until there are as many as a batch has, or come some that they cannot stand beside."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        self._parts: list[Batch] = []
        self._kind: Any = None

    def add(self, part: Batch, *, most: int) -> Iterator[Batch]:
        """Hold some more rows; yields those that are due, at most `most` at a time."""
        kind = self._kind_of(part)
        if kind != self._kind or self.rows + part.rows > most:
            yield from self.rest()
        self._kind = kind
        self._parts.append(part)
        if self.rows == most:
            yield from self.rest()

    def rest(self) -> Iterator[Batch]:
        """All rows that wait, if any do."""
        parts, self._parts = self._parts, []
        if parts:
            yield joined(parts, self._axes)

    @property
    def rows(self) -> int:
        """How many rows wait."""
        return sum(part.rows for part in self._parts)

    def _kind_of(self, part: Batch) -> Any:
        """All that batches must share to be one: equal but for their rows."""
        leaves, spec = pytree.tree_flatten((part.inputs, dict(part.kwargs)))
        found = iter(self._axes)
        kinds = [_kind(leaf, next(found) if isinstance(leaf, torch.Tensor) else None) for leaf in leaves]
        named = [_kind(getattr(part, name), 0) for name in _NAMED]
        return spec, kinds, named, part.call


def _kind(leaf: Any, axis: int | None) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return type(leaf), leaf
    assert axis is not None
    return leaf.dtype, leaf.device, (*leaf.shape[:axis], *leaf.shape[axis + 1 :])


class Rowwise:
    """What the sites of a forward are shown of one row, to be compared with what they are shown of the row alone."""

    def __init__(self, keep_N: torch.Tensor) -> None:
        self.keep_N = keep_N
        self._shown: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def note(self, presentations: Presentations) -> None:
        """Keep a copy of the row's z and a."""
        row = presentations.select_rows(self.keep_N.to(presentations.uid_N.device))
        self._shown.setdefault(row.site.name, []).append((row.z_LSU, row.a_LSU))

    def note_output(self, out: Any) -> None:
        """Keep a copy of what the model returns for the row, where that is a tensor with rows."""
        if isinstance(out, torch.Tensor) and out.shape[:1] == self.keep_N.shape:
            row = out[self.keep_N.to(out.device)]
            self._shown[""] = [(row, row)]

    def equals(self, other: Rowwise) -> bool:
        """Whether both saw the same sites, and there the same up to rounding."""
        if self._shown.keys() != other._shown.keys():
            return False
        return all(
            len(seen) == len(other._shown[name])
            and all(
                same(*pair) for both in zip(seen, other._shown[name], strict=True) for pair in zip(*both, strict=True)
            )
            for name, seen in self._shown.items()
        )


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    most = float(left.abs().nan_to_num().amax()) if left.numel() else 0.0
    return torch.allclose(left, right, rtol=0, atol=SAME.get(left.dtype, 1e-4) * most, equal_nan=True)
