"""What a training learns from, step by step, and what it is scored on.

Layer 2: turns the batches of a source into those of a training: on its device, in its precision, without the rows that
are held out or have no label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from math import ceil
from typing import Any, NoReturn

import torch

from pipeline.batch import Batch
from pipeline.counted import counted
from pipeline.devices import moved
from pipeline.errors import DataError
from pipeline.fit.objective import NOTHING, targets
from pipeline.fit.rows import Portion, draws, is_held_out, least_share, order_of, passes, sampled, take
from pipeline.fit.settings import Training
from pipeline.hashing import splitmix64
from pipeline.models.base import Family

SCORED_BATCH_ROWS = 256
# rows to draw from: 65,536 images of 224 × 224 pixels would be 39 GB
SHUFFLE_BYTES = 1 << 30
# the order of the rows must not follow from the numbers that a model's weights are drawn with
ORDER_SEED = 0x0DE5


class Material:
    """The training data of some models of one family, each with its seed.

    scored    a sample of the rows to learn from, in even batches; DataError if there are none
    held_out  a sample of those held out; empty where training does not stop early
    """

    def __init__(
        self,
        family: Family,
        settings: Training,
        portions: Sequence[Portion],
        *,
        seeds: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.family, self.settings, self.device, self.dtype = family, settings, device, dtype
        self.seeds = [seed ^ ORDER_SEED for seed in seeds]
        self.portions = [replace(one, read=partial(self._read, one)) for one in portions]
        # a share that holds no row out is a mistake whether or not anything is done with the rows
        self.scored, *held_out = self._samples([False, True] if settings.held_out else [False])
        self.settings = settings.model_copy(update={"shuffle_rows": self._rows_to_shuffle()})
        self.held_out = held_out[0] if settings.patience else []

    def _rows_to_shuffle(self) -> int:
        """As many rows as the job says, or as SHUFFLE_BYTES hold of rows as they are."""
        if self.family.whole:
            return self.settings.shuffle_rows
        first = self.scored[0]
        values = [*first.inputs, *first.kwargs.values()]
        row_bytes = max(1, sum(value.nbytes for value in values if isinstance(value, torch.Tensor)) // first.rows)
        return min(self.settings.shuffle_rows, max(self.settings.batch_rows, SHUFFLE_BYTES // row_bytes))

    def draws(self, start: int) -> Iterator[tuple[Batch, torch.Tensor | None]]:
        """What each step behind `start` learns from."""
        if self.family.whole:
            return ((batch, None) for batch in islice(self._wholes(), start, None))
        return draws(self.portions, self._wanted, self.settings, seeds=self.seeds, start=start)

    def _wholes(self) -> Iterator[Batch]:
        """Batches whose rows stay together, without end; or, if neighbours are drawn, some of their rows with those."""
        keep = self.settings.shuffle_rows if len(self.portions) > 1 else self.portions[0].rows
        (seed,) = self.seeds
        for number, batch in enumerate(chain.from_iterable(passes(self.portions, keep))):
            if not self.settings.neighbours:
                yield self._labelled(batch, held_out=False)
                continue
            rows = self._wanted(batch).nonzero()[:, 0]
            order = rows[order_of(len(rows), seed=seed, window=number).to(self.device)]
            neighbourhoods = self.family.neighbourhoods(batch.inputs)
            for step, some in enumerate(order.split(self.settings.batch_rows)):
                drawn_seed = splitmix64(seed ^ splitmix64(number) + step)
                node, inputs = neighbourhoods.draw(some, self.settings.neighbours, drawn_seed)
                yield _some_of(batch, node, len(some), inputs)

    def _read(self, portion: Portion) -> Iterator[Batch]:
        for batch in portion.read():
            self._refuse_not_finite(batch, portion)
            yield self._ready(batch)

    def _refuse_not_finite(self, batch: Batch, portion: Portion) -> None:
        """DataError naming the first row to learn from whose numbers are not finite: no weights would come of it."""
        # rows that stay together all take part, whatever their labels are for
        taking_part_N = torch.ones_like(batch.uid_N, dtype=torch.bool) if self.family.whole else self._wanted(batch)
        for value in (*batch.inputs, *batch.kwargs.values()):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point() or len(value) != batch.rows:
                continue
            bad_N = ~value.flatten(1).isfinite().all(1) if value.ndim > 1 else ~value.isfinite()
            bad_N &= taking_part_N
            if bool(bad_N.any()):
                first = int(bad_N.nonzero()[0, 0])
                numbers = value[first].reshape(-1)
                at = int((~numbers.isfinite()).nonzero()[0, 0])
                raise DataError(
                    f"{portion.named(int(batch.uid_N[first]))}: number {at} (from 0) is {float(numbers[at])} in "
                    f"{str(value.dtype).removeprefix('torch.')}, and nothing can be learned from it: correct the row, "
                    "or make it null, which counts as unreadable"
                )

    def _ready(self, batch: Batch) -> Batch:
        there = moved(batch, self.device, self.dtype)
        return replace(there, inputs=self.family.prepare(there.inputs)) if self.family.whole else there

    def _wanted(self, batch: Batch, held_out: bool = False) -> torch.Tensor:
        wanted_N = is_held_out(batch, self.settings.held_out) == held_out
        if self.family.objective == "classes":
            wanted_N &= batch.label_N >= 0 if batch.label_N is not None else False
        return wanted_N

    def _labelled(self, batch: Batch, *, held_out: bool) -> Batch:
        """A batch whose rows stay together, with the labels of the wanted ones only."""
        if batch.label_N is None:
            return batch
        return replace(batch, label_N=batch.label_N.where(self._wanted(batch, held_out), NOTHING))

    def _samples(self, held_out: Sequence[bool]) -> list[list[Batch]]:
        """Rows to learn from, or held out, to be scored, in even batches; DataError if there are none."""
        if self.family.whole:
            wholes = [batch for portion in self.portions for batch in portion.read()]
            return [self._of_wholes(wholes, held_out=out) for out in held_out]
        found = sampled(self.portions, [partial(self._wanted, held_out=out) for out in held_out])
        return [
            self._evenly(one) if one is not None else self._refuse(out)
            for one, out in zip(found, held_out, strict=True)
        ]

    def _of_wholes(self, wholes: Sequence[Batch], *, held_out: bool) -> list[Batch]:
        labelled = [self._labelled(batch, held_out=held_out) for batch in wholes]
        if not any(bool((targets(self.family, one) != NOTHING).any()) for one in labelled):
            self._refuse(held_out)
        return labelled

    def _evenly(self, batch: Batch) -> list[Batch]:
        # logits of every token of a sequence are large: what fits when learning fits when scoring
        most = SCORED_BATCH_ROWS if self.family.objective == "classes" else self.settings.batch_rows
        parts = torch.arange(batch.rows, device=self.device).chunk(ceil(batch.rows / most))
        return [take(batch, part) for part in parts]

    def _refuse(self, held_out: bool) -> NoReturn:
        batches = [batch for portion in self.portions for batch in portion.read()]
        if not held_out and any(bool(self._wanted(batch, held_out=True).any()) for batch in batches):
            raise DataError(
                f"training.held_out = {self.settings.held_out:g} leaves no row to train on: expected a smaller share"
            )
        if not held_out:
            raise DataError("there is no row to train on: name a label column and a training split in the job")
        labelled = [take(batch, self._wanted(batch).nonzero()[:, 0]) for batch in batches]
        raise DataError(
            f"training.held_out = {self.settings.held_out:g} holds out none of "
            f"{counted(sum(one.rows for one in labelled), 'row')} to train on: expected 0, or at least "
            f"{min(map(least_share, labelled)):g}"
        )


def _some_of(batch: Batch, node: torch.Tensor, labelled: int, inputs: tuple[Any, ...]) -> Batch:
    """Some rows of a batch with inputs of their own; the labels of the first of them only."""
    assert batch.label_N is not None
    label_N = batch.label_N[node]
    label_N[labelled:] = NOTHING
    return replace(batch, inputs=inputs, uid_N=batch.uid_N[node], label_N=label_N)
