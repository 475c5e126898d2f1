"""How the columns of a file become the rows of a model: checked against a footer, then decoded.

Layer 1: no I/O. What the features are is `features.py` and its kin; this is what every row has besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.batch import Batch
from pipeline.errors import DataError, nearest
from pipeline.rows.decode import UID_MASK, UNKNOWN_CLASS, RowError, class_labels, key_uids, position_labels
from pipeline.rows.features import (
    Decoded,
    FeatureFormat,
    Part,
    Role,
    Unwritten,
    Usable,
    Values,
    is_integer,
    is_list,
    is_name,
    is_text,
)
from pipeline.rows.footers import Footer
from pipeline.rows.reading import Piece, Stretch, Unreadable
from pipeline.rows.splits import as_named


@dataclass(frozen=True)
class RowFormat:
    """Which columns are what, and which rows are wanted.

    `labels` are the class names of a string label. A label column of lists has a label for each position, where the
    features have positions. Without `split_column` every row is wanted; without `key` rows are
    numbered.
    """

    features: FeatureFormat
    label: str | None
    labels: tuple[str, ...] | None
    classes: int
    key: str | None
    split_column: str | None
    split: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        named = (*self.features.columns, self.label, self.key, self.split_column)
        return tuple(dict.fromkeys(name for name in named if name))

    @property
    def numbers_rows(self) -> bool:
        """Whether rows are named by their number in the file."""
        return self.key is None and self.features.keeps_rows

    @property
    def identity(self) -> dict[str, Any]:
        """What decides how rows are read, as JSON values."""
        return self.features.identity | {name: value for name, value in vars(self).items() if name != "features"}

    def check(self, footer: Footer) -> None:
        """DataError naming file, column, expected and found unless the file has these columns with these types."""
        check_columns(footer, (*self.features.roles(), *self._roles()))

    def _roles(self) -> Iterator[Role]:
        if self.label is not None and self.labels is None:
            expected = "integers (for strings, list the class names as `labels` of the data set)"
            yield self._label_role(expected, is_integer)
        if self.label is not None and self.labels is not None:
            yield self._label_role("strings, since the data set lists `labels`", is_text)
        for named in (self.key, self.split_column):
            if named is not None:
                yield Role(named, "strings or integers", is_name)

    def _label_role(self, expected: str, fits: Callable[[pa.DataType], bool]) -> Role:
        """One for each row, or a list with one for each position."""
        assert self.label is not None
        if self.features.positions is None:
            return Role(self.label, expected, fits)
        either = f"{expected}, or lists of those, one for each position"
        return Role(self.label, either, lambda kind: fits(kind.value_type if is_list(kind) else kind))

    def labels_positions(self, footer: Footer) -> bool:
        """Whether a file that has been checked has a label for each position."""
        return self.label is not None and is_list(footer.schema.field(self.label).type)

    def check_labels(self, footer: Footer) -> None:
        """DataError if the footer says that a label is no class; what it does not say is found by reading."""
        if self.label is None or self.labels is not None:
            return
        for group in footer.groups:
            bounds = footer.bounds(group, self.label)
            if bounds is not None and not UNKNOWN_CLASS <= bounds[0] <= bounds[1] < self.classes:
                raise DataError(
                    f"{footer.file.url}: labels {bounds[0]} to {bounds[1]} in column {self.label!r}, expected 0 to "
                    f"{self.classes - 1} (or −1 for unknown): correct the file, or `classes` of the data set"
                )

    def may_hold_split(self, footer: Footer, group: int) -> bool:
        """Whether a row group can hold wanted rows: False only if the footer's extremes exclude it."""
        bounds = footer.bounds(group, self.split_column) if self.split_column is not None else None
        if bounds is None:
            return True
        least, greatest = (as_named(bound) for bound in bounds)
        if not isinstance(bounds[0], str | bytes):
            # numbers are in another order than their names
            return least != greatest or least == self.split
        return least <= self.split <= greatest

    def decode(self, rows: pa.RecordBatch, *, where: str, first_row: int, uid_base: int | None) -> Piece[Decoded]:
        """Decode rows of which the first is row `first_row` of the file.

        A row whose features cannot be used is unreadable. DataError at a label or key that cannot be.
        """
        number_N = np.arange(first_row, first_row + rows.num_rows)
        excluded = 0
        if self.split_column is not None and not (wanted_N := self.wanted(rows)).all():
            excluded = int((~wanted_N).sum())
            rows, number_N = rows.filter(pa.array(wanted_N)), number_N[wanted_N]
        with _named(where, number_N):
            features = self.features.decode(rows)
        damage: list[Unreadable] = []
        if not features.usable_N.all():
            damage += [Unreadable(1, int(row), features.reason) for row in number_N[~features.usable_N]]
            rows, number_N = rows.filter(pa.array(features.usable_N)), number_N[features.usable_N]
        with _named(where, number_N):
            labels = self._labels(rows, features)
        if not labels.usable_N.all():
            damage += [Unreadable(1, int(row), labels.reason) for row in number_N[~labels.usable_N]]
            rows, number_N = rows.filter(pa.array(labels.usable_N)), number_N[labels.usable_N]
            features = features._replace(parts=tuple(part[labels.usable_N] for part in features.parts))
        with _named(where, number_N):
            uid_N = self.uids(rows, number_N, uid_base)
        damage.sort(key=lambda one: one.first_row)
        return Piece(rows.num_rows, Decoded(features.parts, uid_N, labels.label_N), excluded, tuple(damage))

    def uids(self, rows: pa.RecordBatch, number_N: np.ndarray, uid_base: int | None) -> np.ndarray:
        """The uids of rows with these numbers in the file."""
        if self.key is not None:
            return key_uids(rows[self.key])
        assert uid_base is not None, "rows that no column names are named from their file"
        uid_N: np.ndarray = number_N + uid_base
        uid_N &= UID_MASK
        return uid_N

    def join(self, stretches: Sequence[Stretch[Decoded]]) -> Batch:
        """A batch of its own, aligned memory: what a model computes must not depend on how rows were stored."""
        tensors = tuple(
            _joined([(content.parts[index], start, stop) for content, start, stop in stretches], part)
            for index, part in enumerate(self.features.parts)
        )
        uid_N = np.concatenate([content.uid_N[start:stop] for content, start, stop in stretches])
        labels = [content.label_N[start:stop] for content, start, stop in stretches if content.label_N is not None]
        label_N = torch.from_numpy(np.concatenate(labels)) if labels else None
        if label_N is not None and label_N.ndim == 2:
            return replace(self.features.batch(tensors, torch.from_numpy(uid_N), None), label_NS=label_N)
        return self.features.batch(tensors, torch.from_numpy(uid_N), label_N)

    def wanted(self, rows: pa.RecordBatch) -> np.ndarray:
        """Which rows are of the split."""
        if self.split_column is None:
            return np.ones(rows.num_rows, dtype=bool)
        same = pc.equal(rows[self.split_column].cast(pa.string()), self.split)
        return np.asarray(same.fill_null(False).to_numpy(zero_copy_only=False))

    def _labels(self, rows: pa.RecordBatch, features: Usable) -> _Labels:
        every_N = np.ones(rows.num_rows, dtype=bool)
        if self.label is None:
            return _Labels(None, every_N, "")
        column = rows[self.label]
        if not is_list(column.type):
            return _Labels(class_labels(column, classes=self.classes, names=self.labels), every_N, "")
        positions, length_N = self.features.positions, features.length_N
        # the footer has been checked
        assert positions is not None
        assert length_N is not None
        return _Labels(*position_labels(column, length_N, positions, classes=self.classes, names=self.labels))


class _Labels(NamedTuple):
    """Classes of the usable rows, or of their positions; which rows those are; why the first other one is not."""

    label_N: np.ndarray | None
    usable_N: np.ndarray
    reason: str


@contextmanager
def _named(where: str, number_N: np.ndarray) -> Iterator[None]:
    """Say in which file and row a value is wrong."""
    try:
        yield
    except RowError as error:
        raise DataError(f"{where}, row {number_N[error.row]}: {error}") from None


def check_columns(footer: Footer, roles: Sequence[Role]) -> None:
    """DataError naming file, column, expected and found unless the file has these columns with these types."""
    for name, expected, fits in roles:
        if name not in footer.schema.names:
            raise DataError(f"{footer.file.url}: there is no column {name!r}; {nearest(name, footer.schema.names)}")
        if (count := footer.schema.names.count(name)) > 1:
            raise DataError(f"{footer.file.url}: there are {count} columns {name!r}; expected names that differ")
        if not fits(found := footer.schema.field(name).type):
            raise DataError(f"{footer.file.url}: column {name!r} is {found}, expected {expected}")


def _joined(stretches: Sequence[tuple[Values, int, int]], part: Part) -> torch.Tensor:
    rows = sum([stop - start for _, start, stop in stretches])
    tensor = torch.empty((rows, *part.shape), dtype=part.dtype)
    at = 0
    for values, start, stop in stretches:
        if isinstance(values, Unwritten):
            values.write(tensor, at=at, start=start, stop=stop)
        else:
            _copy(values[start:stop], tensor.numpy()[at : at + stop - start])
        at += stop - start
    return tensor


def _copy(some: np.ndarray, place: np.ndarray) -> None:
    """Once, in whatever order the numbers lie."""
    with np.errstate(over="ignore"):  # beyond float32: infinite, and counted as such by the statistics
        place[...] = some if some.shape[1:] == place.shape[1:] else some.reshape(place.shape)
