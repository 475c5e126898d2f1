"""Batches as people have them: tensors, pairs with labels, tuples and dictionaries of a forward's arguments.

Layer 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from pipeline.batch import Batch, misnamed
from pipeline.errors import DataError

# under this argument a dictionary says which positions are real, as tokenizers put it
MASK = "attention_mask"


def numbered(batches: Iterable[Any], *, by_position: bool = False) -> Iterator[Batch]:
    """Batches as the pipeline takes them, from what people have; rows without uids are numbered from 0.

    A tensor is the forward's argument, a tuple its arguments, a dictionary its keyword arguments; in a pair (x, y) with
    one int64 label y for each row, x is any of these, or a list with an entry for each row; `by_position` also takes a
    y of (N, S) or (N, H, W) for labels, one for each position. Raises TypeError for anything else, DataError for uids
    of a Batch that cannot name its rows.

    >>> [batch.uid_N.tolist() for batch in numbered([torch.ones(2, 3), (torch.ones(1, 3), torch.tensor([7]))])]
    [[0, 1], [2]]
    """
    seen = 0
    for value in batches:
        batch = _with_names(value) if isinstance(value, Batch) else _as_batch(value, seen, by_position)
        seen += batch.rows
        yield batch


def of_classes(batches: Iterable[Batch], classes: int) -> Iterator[Batch]:
    """The batches; DataError at the first whose labels are not int64 of its rows, each negative or below `classes`.

    >>> list(of_classes(numbered([(torch.ones(1, 3), torch.tensor([7]))]), 3))
    Traceback (most recent call last):
    pipeline.errors.DataError: row 0 has label 7: expected 0 to 2, as classes=3, or −1 where it is unknown
    """
    for batch in batches:
        for axes, label in (("N", batch.label_N), ("NS", batch.label_NS)):
            if label is not None:
                _refuse_labels(label, axes, batch, classes)
        yield batch


def _refuse_labels(label: torch.Tensor, axes: str, batch: Batch, classes: int) -> None:
    if label.dtype != torch.int64 or label.shape[:1] != (batch.rows,) or label.dim() != len(axes):
        found = f"label_{axes} is {str(label.dtype).removeprefix('torch.')} of shape {tuple(label.shape)}"
        raise DataError(f"{found}: expected int64 with {' × '.join(axes)} values, N = {batch.rows} rows")
    if label.numel() and int(label.max()) >= classes:
        row, value = int(label.reshape(batch.rows, -1).amax(1).argmax()), int(label.max())
        known = f"0 to {classes - 1}, as classes={classes}, or −1 where it is unknown"
        raise DataError(f"row {int(batch.uid_N[row])} has label {value}: expected {known}")


def _with_names(batch: Batch) -> Batch:
    """The batch; DataError unless its uids are int64, one for each row, none negative or twice the same."""
    problem = misnamed(batch.uid_N)
    if problem is not None:
        raise DataError(problem)
    return batch


def _as_batch(value: Any, first_uid: int, by_position: bool) -> Batch:
    labels = _labels(value, by_position)
    if labels is None and by_position:
        _refuse_like_labels(value)
    x = value[0] if labels is not None else value
    if isinstance(x, Mapping):
        inputs: tuple[Any, ...] = ()
        kwargs = dict(x)
    else:
        whole = isinstance(x, torch.Tensor) or (isinstance(x, list) and labels is not None)
        inputs, kwargs = ((x,) if whole else _arguments(x)), {}
    rows = _rows_of([*inputs, *kwargs.values()]) if labels is None else len(labels)
    uid_N = torch.arange(first_uid, first_uid + rows)
    of_rows = labels is None or labels.dim() == 1
    return Batch(
        inputs=inputs,
        uid_N=uid_N,
        label_N=labels if of_rows else None,
        kwargs=kwargs,
        mask_NS=_mask(kwargs.get(MASK), rows),
        label_NS=None if labels is None or of_rows else labels.flatten(1),
    )


def _arguments(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise TypeError(f"a batch is a tensor, tuple, dictionary or Batch, got {type(value).__name__}; make it a Batch")
    return tuple(value)


def _labels(value: Any, by_position: bool) -> torch.Tensor | None:
    """The labels of a pair: one int64 for each row, or position of a row, of what stands before them."""
    if not isinstance(value, tuple | list) or len(value) != 2 or not _is_labels(value[1], by_position):
        return None
    first, labels = value
    if isinstance(first, torch.Tensor):
        return labels if first.dim() > 0 and len(first) == len(labels) else None  # type: ignore[no-any-return]
    return labels if isinstance(first, tuple | list | Mapping) else None  # type: ignore[no-any-return]


def _refuse_like_labels(value: Any) -> None:
    """DataError for a pair whose second part can only be meant as labels: one number for each of some rows."""
    if not isinstance(value, tuple | list) or len(value) != 2 or not isinstance(value[0], torch.Tensor):
        return
    rows, second = len(value[0]) if value[0].dim() else 0, value[1]
    if isinstance(second, torch.Tensor) and second.dim() == 1:
        found = f"{str(second.dtype).removeprefix('torch.')} of shape {tuple(second.shape)}"
    elif isinstance(second, list) and second and all(isinstance(one, int) for one in second):
        found = f"a list of {len(second)} integers"
    else:
        return
    raise DataError(
        f"in a pair (x, y) of {rows} rows y is {found}: expected int64 labels, a tensor with one for each row; "
        "arguments of a forward beside labels go in a Batch"
    )


def _is_labels(value: Any, by_position: bool) -> bool:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
        return False
    return value.dim() == 1 or (by_position and value.dim() > 1)


def _rows_of(values: list[Any]) -> int:
    first = values[0] if values else None
    if not isinstance(first, torch.Tensor) or first.dim() == 0:
        found = "a number (a tensor without axes)" if isinstance(first, torch.Tensor) else type(first).__name__
        raise TypeError(f"a batch starts with a tensor whose first axis is the rows, got {found}; make it a Batch")
    return int(first.shape[0])


def _mask(value: Any, rows: int) -> torch.Tensor | None:
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or len(value) != rows:
        return None
    other = value[(value != 0) & (value != 1)]
    if other.numel():
        raise DataError(
            f"{MASK} has {other[0].item():g}: expected 1 where a position is real and 0 where it is padding; what is "
            "added to scores goes by another name, or in a Batch with its own mask_NS"
        )
    return value != 0
