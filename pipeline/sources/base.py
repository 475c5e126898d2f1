"""The contract of a source: chunks fixed by their file alone, batches, and a ledger of rows.

One file `sources/NAME.py` with a constant `SOURCE`, a class, adds one. Layer 2: a source imports this file and what is
below, never a sibling, and storage only through `inputs` and `store`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from pipeline.counted import counted
from pipeline.errors import DataError, JobError, MissingData, nearest
from pipeline.hashing import digest
from pipeline.inputs import InputFile, list_inputs
from pipeline.job_sections import DataSpec
from pipeline.misfits import dotted, in_words, shown
from pipeline.names import Names
from pipeline.rows.decode import UID_MASK
from pipeline.rows.features import NOTHING, Decoded, FeatureFormat, Numbers, is_list
from pipeline.rows.footers import Footer, first_uid, read_footer
from pipeline.rows.format import RowFormat
from pipeline.rows.groups import AHEAD, Group, read_groups
from pipeline.rows.reading import Piece, Reading, Unreadable, prefetched
from pipeline.rows.splits import SplitColumn
from pipeline.store import Store

# raised whenever the same row groups would give other batches
READ_VERSION = 1
SUFFIXES = (".parquet", ".parq", ".pq", ".arrow", ".feather", ".ipc")


class Options(BaseModel):
    """Base of what a source takes besides a data set's common keys: frozen, unknown keys refused. Here: nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True)
class Chunk:
    """A run of consecutive row groups of one file, read as one split of one data set.

    id         digest of the file's content, the row groups and everything that decides how they are read
    data       name of the data set in the job
    split      rows of other splits in these row groups are excluded
    url        the file as the job names it: the same wherever the store is and the run is started
    file_id    digest of the file's content
    start      first row group
    stop       row group behind the last one
    rows       rows in these row groups, those of other splits included
    first_row  number of the first of these rows in the file
    uid_base   uid of the file's first row; None where rows are not named by their number in it
    """

    id: str
    data: str
    split: str
    url: str
    file_id: str
    start: int
    stop: int
    rows: int
    first_row: int
    uid_base: int | None


class Source(ABC):
    """One data set of a job. Making it touches nothing; a bad job or data set is refused by the first question.

    `whole`: its rows depend on each other (a graph) and are one batch, for families that are `whole` as well. `files`:
    its options that name files as `url` does, by `spec.located`.
    """

    name: ClassVar[str]
    parameters: ClassVar[type[Options]] = Options
    whole: ClassVar[bool] = False
    files: ClassVar[tuple[str, ...]] = ()

    def __init__(self, data: str, spec: DataSpec, store: Store) -> None:
        self.data = data
        self.spec = spec
        self.store = store
        try:
            self.options = self.parameters(**spec.options)
        except ValidationError as error:
            raise JobError("\n".join(str(self._mistake(one)) for one in error.errors())) from None

    def _mistake(self, found: ErrorDetails) -> JobError:
        key = dotted(found["loc"])
        if found["type"] == "extra_forbidden":
            problem = f"unknown key; {nearest(key, self.parameters.model_fields)}"
        elif found["type"] == "missing":
            return self.refusal(f"options.{key}", f"missing; expected {self.parameters.model_fields[key].description}")
        else:
            problem = f"expected {in_words(found['msg'])}"
        return self.refusal(f"options.{key} = {shown(found['input'])}", problem)

    def refusal(self, key: str, problem: str) -> JobError:
        """The error for a key of this data set that the source cannot do with."""
        return JobError(f"{self.spec.place}: [data.{self.data}] {key}: {problem}")

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one row's input."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """Number of classes of the labels; 0 if the data has none."""

    @property
    def labels_positions(self) -> bool:
        """Whether each position of a row has a label of its own, and the row none."""
        return False

    @property
    def categories(self) -> tuple[int, ...]:
        """Number of values of each categorical column."""
        return ()

    @property
    def vocabulary(self) -> int:
        """Number of different tokens; 0 where rows are not tokens."""
        return 0

    @property
    def names(self) -> Names:
        """What people call the numbers of a row, as far as the data says it."""
        return Names()

    @abstractmethod
    def chunks(self, split: str) -> tuple[Chunk, ...]:
        """The chunks that can hold rows of a split, in plan order; none where no row is of it."""

    @abstractmethod
    def splits(self) -> Sequence[str]:
        """Every split that a row is of, for whoever has named another."""

    @abstractmethod
    def read(self, chunk: Chunk, batch_rows: int) -> Reading[Any, Any]:
        """The batches of a chunk. DataError if the file is not the one that was planned, or cannot be read."""

    def where(self, chunk: Chunk, uid: int) -> str:
        """Where a row of a chunk stands, for whoever looks for it."""
        if chunk.uid_base is not None:
            return f"{chunk.url}, row {(uid - chunk.uid_base) & UID_MASK}"
        return chunk.url


class RowGroupSource(Source):
    """Rows of Parquet or Arrow files: `spec.columns` says which columns are what, `footers` which files there are."""

    @abstractmethod
    def footers(self) -> Sequence[Footer]:
        """The footer of every file in plan order, named as the file is in chunks and tables."""

    @abstractmethod
    def locate(self, name: str) -> str:
        """The URL of a file by that name."""

    def where(self, chunk: Chunk, uid: int) -> str:
        """File and number of the row, or the column that names it."""
        key = self.spec.columns.key
        return super().where(chunk, uid) + (f", where column {key!r} names it" if key is not None else "")

    def features(self) -> FeatureFormat:
        """How the columns become what a model takes: here numbers, of `columns.shape` or one for each column."""
        columns = self.spec.columns
        features = (columns.features,) if isinstance(columns.features, str) else columns.features
        shape = columns.shape or ((len(features),) if not isinstance(columns.features, str) else ())
        if not features or not shape:
            missing = "features" if not features else "shape"
            raise self.refusal(f"columns.{missing}", f"missing; expected {_EXPECTED[missing]}")
        return Numbers(features, isinstance(columns.features, str), shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The features' shape: `columns.shape`, or the number of feature columns."""
        return self._features.shape

    @cached_property
    def names(self) -> Names:  # type: ignore[override]
        """What the format knows; of a column of lists what the first file says of it."""
        named, column = self._features.names, self.spec.columns.features
        if named.features or not isinstance(column, str) or not self.listed:
            return named
        return replace(named, features=self.listed[0].names_of(column))

    @property
    def classes(self) -> int:
        """The number of `labels`, else `classes`."""
        return self._format("").classes

    @property
    def labels_positions(self) -> bool:
        """Whether the label column has lists, where the features have positions."""
        rows = self._format("")
        return rows.features.positions is not None and any(rows.labels_positions(one) for one in self._checked)

    def chunks(self, split: str) -> tuple[Chunk, ...]:
        """Row groups that can hold the split, in runs of up to `chunk_rows` rows (or one group that is larger)."""
        cut = tuple(chunk for footer in self._checked for chunk in self._cut(footer, self._format(split)))
        return cut if cut and self.holds(split) else ()

    def splits(self) -> Sequence[str]:
        """The values of the column that says it."""
        return self._splits.known() if self._splits else ("all",)

    def holds(self, split: str) -> bool:
        """Whether any row is of a split, by the footers or, where they leave it open, by the column itself.

        That a column was read and holds it is stored: a rare one is not looked for anew by whoever plans again.
        """
        column = self._splits
        if column is None or split in self._held or column.told(split):
            return True
        made_of = [column.name, split, sorted(footer.file_id for footer in self.listed)]
        key = f"data/splits/{digest(made_of)}.json"
        if not self.store.keys(key):
            if not column.found(split, self._format(split).may_hold_split):
                return False
            self.store.put_once(key, json.dumps(made_of[:2]).encode())
        self._held.add(split)
        return True

    def read(self, chunk: Chunk, batch_rows: int) -> Reading[Any, Any]:
        """Read a chunk row group by row group, the next one while the last is used."""
        rows = self._format(chunk.split)
        return Reading(
            where=f"data {self.data}: {chunk.url}",
            rows=chunk.rows,
            fetch=lambda: self._groups(chunk, rows),
            pieces=lambda groups: rows.features.repacked(self._pieces(chunk, rows, groups)),
            join=rows.join,
            batch_rows=batch_rows,
            max_unreadable=self.spec.max_unreadable,
            ahead=AHEAD,
        )

    def _format(self, split: str) -> RowFormat:
        spec, columns = self.spec, self.spec.columns
        features = self._features
        if columns.label is not None and spec.labels is None and spec.classes is None:
            raise self.refusal("classes", f"missing; expected the number of classes of {columns.label!r}")
        return RowFormat(
            features=features,
            label=columns.label,
            labels=spec.labels,
            classes=len(spec.labels) if spec.labels is not None else spec.classes or 0,
            key=columns.key,
            split_column=columns.split,
            split=split,
        )

    @cached_property
    def _features(self) -> FeatureFormat:
        return self.features()

    @cached_property
    def listed(self) -> Sequence[Footer]:
        """The footers, asked for once."""
        return self.footers()

    @cached_property
    def _splits(self) -> SplitColumn | None:
        column = self.spec.columns.split
        return None if column is None else SplitColumn(column, self.listed, self.locate)

    @cached_property
    def _held(self) -> set[str]:
        """Splits that are known to have rows."""
        return set()

    @cached_property
    def _checked(self) -> Sequence[Footer]:
        rows = self._format("")
        footers = self.listed
        for footer in footers:
            rows.check(footer)
            rows.check_labels(footer)
        _refuse_mixed_labels(self.data, rows, footers)
        _refuse_shared_uids(self.data, footers)
        return footers

    def _cut(self, footer: Footer, rows: RowFormat) -> Iterator[Chunk]:
        """The chunks of one file: nothing else decides them, so that other files can come and go."""
        first_row = start = filled = 0
        for group, size in enumerate(footer.group_rows):
            wanted = rows.may_hold_split(footer, group)
            if filled and (not wanted or filled + size > self.spec.chunk_rows):
                yield self._chunk(footer, rows, start, group, first_row - filled, filled)
                filled = 0
            if wanted:
                start = start if filled else group
                filled += size
            first_row += size
        if filled:
            yield self._chunk(footer, rows, start, len(footer.group_rows), first_row - filled, filled)

    def _chunk(self, footer: Footer, rows: RowFormat, start: int, stop: int, first_row: int, count: int) -> Chunk:
        reading_spec = [READ_VERSION, rows.identity, self.spec.max_unreadable]
        return Chunk(
            id=digest([footer.file_id, start, stop, reading_spec]),
            data=self.data,
            split=rows.split,
            url=footer.name,
            file_id=footer.file_id,
            start=start,
            stop=stop,
            rows=count,
            first_row=first_row,
            uid_base=footer.uid_base if rows.numbers_rows else None,
        )

    def _groups(self, chunk: Chunk, rows: RowFormat) -> Iterator[Group]:
        wanted = range(chunk.start, chunk.stop)
        return read_groups(
            self.locate(chunk.url),
            chunk.file_id,
            wanted,
            rows.columns,
            encoded=rows.features.encoded,
            part_rows=rows.features.part_rows,
        )

    def _pieces(self, chunk: Chunk, rows: RowFormat, groups: Iterator[Group]) -> Iterator[Piece[Decoded]]:
        where = f"data {self.data}: {chunk.url}"
        first_row = chunk.first_row
        uids = [NOTHING.uid_N]
        for group in groups:
            for part in group.parts:
                piece = rows.decode(part, where=where, first_row=first_row, uid_base=first_uid(chunk.file_id))
                if rows.key is not None:
                    uids.append(piece.content.uid_N)
                yield piece
                first_row += part.num_rows
            if group.damage:
                yield Piece(0, NOTHING, unreadable=(Unreadable(group.rows, first_row, group.damage),))
                first_row += group.rows
        if rows.key is not None:
            _refuse_repeated(np.concatenate(uids), where, rows.key)


class FileSource(RowGroupSource):
    """Parquet or Arrow files at `url`: a file, every one below a directory, or what a glob matches."""

    def footers(self) -> Sequence[Footer]:
        """The footers of the files that `url` stands for, each named as the job would name it."""
        named = [(self.spec.named(file.url), file) for file in self._files()]
        with ThreadPoolExecutor(max_workers=16) as pool:
            return list(pool.map(lambda one: read_footer(*one), named))

    def _files(self) -> list[InputFile]:
        if self.spec.url is None:
            raise self.refusal("url", "missing; expected a file, directory or glob of Parquet or Arrow files")
        location = self.spec.location
        found = list_inputs(location)
        if [file.url for file in found] == [location] or any(sign in location for sign in "*?["):
            return found
        found = [file for file in found if file.url.lower().endswith(SUFFIXES)]
        if not found:
            raise MissingData(f"data {self.data}: below {location} no file ends in {', '.join(SUFFIXES)}")
        return found

    def locate(self, name: str) -> str:
        """Where a file of that name is, relative to the job file if the name is."""
        return self.spec.located(name)

    def lists_labels(self, footer: Footer) -> bool:
        """Whether a file has a column of labels that is one of lists."""
        label = self.spec.columns.label
        return footer.schema.names.count(label) == 1 and is_list(footer.schema.field(label).type)

    @cached_property
    def training_identity(self) -> list[Any]:
        """What decides which rows are there to train on, as JSON values."""
        return [self.spec.columns.split, self.spec.train, sorted(footer.file_id for footer in self.listed)]

    def training_rows(self, features: FeatureFormat) -> Iterator[pa.RecordBatch]:
        """Every row to train on of the groups that can be read, with the columns of these features, in plan order.

        And the label where it has lists: which row is unreadable as such is for who counts. For what must be known of
        the data before a model can be built. DataError if a file has not these columns, or not that of the split.
        """
        columns = self.spec.columns
        for footer in self.listed:
            label = columns.label if self.lists_labels(footer) else None
            named = RowFormat(features, label, self.spec.labels, 0, None, columns.split, self.spec.train)
            named.check(footer)
            wanted = [g for g in footer.groups if named.may_hold_split(footer, g)]
            for group in prefetched(read_groups(self.locate(footer.name), footer.file_id, wanted, named.columns)):
                for part in group.parts:
                    yield part.filter(pa.array(named.wanted(part)))


_EXPECTED = {
    "features": "the name of a column of lists, or an array of names of columns of numbers",
    "shape": "the shape of a row, shape = [1, 28, 28] say",
}


def _refuse_repeated(uid_N: np.ndarray, where: str, key: str) -> None:
    values, counts = np.unique(uid_N, return_counts=True)
    repeated = values[counts > 1]
    if len(repeated):
        keys = counted(len(repeated), "key")
        raise DataError(f"{where}: column {key!r} has {keys} of several rows each, first uid {repeated[0]}")


def _refuse_mixed_labels(data: str, rows: RowFormat, footers: Sequence[Footer]) -> None:
    """DataError if some files have a label for each row and others one for each position."""
    by_position = [rows.labels_positions(footer) for footer in footers]
    if any(by_position) and not all(by_position):
        row, position = (footers[by_position.index(kind)].name for kind in (False, True))
        raise DataError(
            f"data {data}: column {rows.label!r} has a label for each row in {row} and one for each position in "
            f"{position}; expected the same in every file"
        )


def _refuse_shared_uids(data: str, footers: Sequence[Footer]) -> None:
    """DataError if two files are the same, or number their rows alike (which 63 bits make all but impossible)."""
    ranges = sorted((footer.uid_base, footer.uid_base + footer.rows, footer.name) for footer in footers)
    wrapped = [(start - 2**63, stop - 2**63, name) for start, stop, name in ranges if stop > 2**63]
    for (_, stop, name), (start, _, other) in zip([*wrapped, *ranges], [*wrapped, *ranges][1:], strict=False):
        if start < stop:
            raise DataError(f"data {data}: {name} and {other} have the same content: every row would count twice")
