"""Training rows in shuffled order, and samples of them, from memory that does not grow with the data.

Layer 2: knows chunks by their id and a function that reads them. Each epoch takes the chunks in the order of a hash and
fills windows of at most `shuffle_rows` rows; within a window each model has its own order, by the hash of its seed. So
models that train together share one reading, and no order depends on which models those are. Every batch is full:
rows that do not fill one are kept for the next window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import ceil, floor, log10
from typing import Any, Protocol, TypeVar

import torch
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.errors import DataError
from pipeline.fit.settings import Training
from pipeline.hashing import digest, row_hash

# no statistic and no order may use this seed: held-out rows would be no fair sample
HELD_OUT_SEED = 0x4E1D007
SAMPLE_SEED = 0x5A3B1E
# rows of a sample, those that it is drawn from, and the portions in which these lie: no more is read for it
SAMPLE_ROWS = 4096
DRAWN_FROM = 1 << 16
SAMPLE_PORTIONS = 64


@dataclass(frozen=True)
class Portion:
    """A part of the training data that is read in one go: a chunk.

    rows   a bound
    named  what a person calls the row of a uid
    """

    id: str
    rows: int
    read: Callable[[], Iterable[Batch]]
    named: Callable[[int], str] = "the row of uid {}".format


def is_held_out(batch: Batch, share: float) -> torch.Tensor:
    """Which rows are kept from training to stop early by: a share of them, by the hash of their uid alone."""
    return row_hash(batch.uid_N, seed=HELD_OUT_SEED) < int(share * 2.0**63)


def least_share(batch: Batch) -> float:
    """The least share by which one of these rows is held out, rounded up to two digits; 1 of none."""
    if not batch.rows:
        return 1.0
    exact = (int(row_hash(batch.uid_N, seed=HELD_OUT_SEED).min()) + 1) / 2.0**63
    scale = 10.0 ** (1 - floor(log10(exact)))
    return ceil(exact * scale) / scale


class Sample:
    """SAMPLE_ROWS of the rows that are added, drawn by the hash of their uid: no order of theirs matters."""

    def __init__(self) -> None:
        self.rows = 0
        self._parts: list[Batch] = []
        self._bound = 2**63 - 1

    def add(self, batch: Batch) -> None:
        """Look at some rows more."""
        near = take(batch, (row_hash(batch.uid_N, seed=SAMPLE_SEED) <= self._bound).nonzero()[:, 0])
        if near.rows:
            self._parts.append(near)
            self.rows += near.rows
        if self.rows >= SAMPLE_ROWS + SAMPLE_ROWS // 4:
            self.batch()

    def batch(self) -> Batch:
        """The rows drawn so far, in the order of their hashes; there must be some."""
        joined = join(self._parts)
        hash_N = row_hash(joined.uid_N, seed=SAMPLE_SEED)
        order = hash_N.argsort(stable=True)[:SAMPLE_ROWS]
        if len(order) == SAMPLE_ROWS:
            self._bound = int(hash_N[order[-1]])
        self._parts, self.rows = [take(joined, order)], len(order)
        return self._parts[0]


class _Part(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def rows(self) -> int: ...


P = TypeVar("P", bound=_Part)


def spread(portions: Sequence[P]) -> tuple[list[P], int, int]:
    """The portions in the order to draw a sample in, how many of them it is to come of, and how many rows of each.

    All rows where there are at most DRAWN_FROM; else as many rows from each of SAMPLE_PORTIONS portions, drawn by the
    hash of their id: what lies in order, by class or by day, is then drawn from throughout.
    """
    if sum(portion.rows for portion in portions) <= DRAWN_FROM:
        return list(portions), len(portions), DRAWN_FROM
    order = sorted(portions, key=lambda portion: digest(["sample", portion.id]))
    enough = min(len(order), SAMPLE_PORTIONS)
    return order, enough, ceil(DRAWN_FROM / enough)


def sampled(portions: Sequence[Portion], wanted: Sequence[Callable[[Batch], torch.Tensor]]) -> list[Batch | None]:
    """For each of `wanted`, which says what rows of a batch, a sample of such rows; None where there are none.

    Further portions are read as long as there is none.
    """
    order, enough, most = spread(portions)
    samples = [Sample() for _ in wanted]
    for number, portion in enumerate(order):
        if number >= enough and all(sample.rows for sample in samples):
            break
        left = most
        for batch in portion.read():
            some = take(batch, slice(0, left))
            for sample, which in zip(samples, wanted, strict=True):
                sample.add(take(some, which(some).nonzero()[:, 0]))
            left -= some.rows
            if not left:
                break
    return [sample.batch() if sample.rows else None for sample in samples]


def passes(portions: Sequence[Portion], keep_rows: int) -> Iterator[Iterator[Batch]]:
    """One iterator of batches for each epoch, without end; data of at most `keep_rows` rows are read only once."""
    kept: dict[str, list[Batch]] | None = {} if sum(portion.rows for portion in portions) <= keep_rows else None

    def read(portion: Portion) -> Iterable[Batch]:
        if kept is None:
            return portion.read()
        if portion.id not in kept:
            kept[portion.id] = list(portion.read())
        return kept[portion.id]

    for epoch in count():
        order = sorted(portions, key=lambda portion: digest([epoch, portion.id]))
        yield (batch for portion in order for batch in read(portion))


def windows(
    portions: Sequence[Portion], wanted: Callable[[Batch], torch.Tensor], training: Training
) -> Iterator[Batch]:
    """Rows to draw from, a multiple of `batch_rows` at a time, without end; `wanted` says which rows of a batch.

    DataError if an epoch holds no wanted row.
    """
    full = max(1, training.shuffle_rows // training.batch_rows) * training.batch_rows
    held: list[Batch] = []
    for epoch in passes(portions, training.shuffle_rows):
        seen = 0
        for batch in epoch:
            chosen = take(batch, wanted(batch).nonzero()[:, 0])
            seen += chosen.rows
            held.append(chosen)
            while sum(one.rows for one in held) >= full:
                window, held = _cut(held, full)
                yield window
        if not seen:
            raise DataError("there is no row to train on: name a label column and a training split in the job")
        if rest := sum(one.rows for one in held) // training.batch_rows * training.batch_rows:
            window, held = _cut(held, rest)
            yield window


def _cut(held: Sequence[Batch], rows: int) -> tuple[Batch, list[Batch]]:
    joined = join(held)
    return take(joined, slice(0, rows)), [take(joined, slice(rows, None))]


def order_of(rows: int, *, seed: int, window: int) -> torch.Tensor:
    """The order in which a model of that seed takes the rows of a window: a permutation of 0 … rows − 1."""
    return row_hash(torch.arange(rows), seed=seed, unit=window).argsort(stable=True)


def draws(
    portions: Sequence[Portion],
    wanted: Callable[[Batch], torch.Tensor],
    training: Training,
    *,
    seeds: Sequence[int],
    start: int = 0,
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """For each step behind `start` a window and which of its rows each of G seeds learns from, (G, batch_rows)."""
    step = 0
    for number, window in enumerate(windows(portions, wanted, training)):
        batches = window.rows // training.batch_rows
        if step + batches > start:
            order_GW = torch.stack([order_of(window.rows, seed=seed, window=number) for seed in seeds])
            order_GW = order_GW.to(window.uid_N.device)
            for index_GN in order_GW.split(training.batch_rows, dim=1)[max(0, start - step) :]:
                yield window, index_GN
        step += batches


def take(batch: Batch, index: torch.Tensor | slice) -> Batch:
    """Some rows of a batch; an index of more than one axis gives every tensor these leading axes."""
    return replace(
        batch,
        inputs=tuple(value[index] for value in batch.inputs),
        kwargs={name: value[index] for name, value in batch.kwargs.items()},
        uid_N=batch.uid_N[index],
        label_N=None if batch.label_N is None else batch.label_N[index],
        label_NS=None if batch.label_NS is None else batch.label_NS[index],
        mask_NS=None if batch.mask_NS is None else batch.mask_NS[index],
    )


def join(parts: Sequence[Batch]) -> Batch:
    """Rows of several batches in one; shorter rows are filled with zeros (False in a mask, −1 as labels)."""
    first = parts[0]
    return replace(
        first,
        inputs=tuple(_joined(values) for values in zip(*(part.inputs for part in parts), strict=True)),
        kwargs={name: _joined([part.kwargs[name] for part in parts]) for name in first.kwargs},
        uid_N=torch.cat([part.uid_N for part in parts]),
        label_N=None if first.label_N is None else _joined([part.label_N for part in parts]),
        label_NS=None if first.label_NS is None else _joined([part.label_NS for part in parts], filling=-1),
        mask_NS=None if first.mask_NS is None else _joined([part.mask_NS for part in parts]),
    )


def _joined(values: Sequence[Any], *, filling: int = 0) -> torch.Tensor:
    sizes = [max(value.shape[axis] for value in values) for axis in range(1, values[0].ndim)]
    return torch.cat([_filled(value, sizes, filling) for value in values])


def _filled(value: torch.Tensor, sizes: Sequence[int], filling: int) -> torch.Tensor:
    missing = [size - have for size, have in zip(sizes, value.shape[1:], strict=True)]
    if not any(missing):
        return value
    return functional.pad(value, [side for end in reversed(missing) for side in (0, end)], value=filling)
