"""The load task: read models that were made elsewhere once, check them, and keep them in the store.

Layer 3. From then on a loaded model is a checkpoint like any other: no worker needs what it was loaded from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from pipeline.batch import Batch
from pipeline.errors import DataError, ModelError
from pipeline.fit.rows import Portion, sampled, take
from pipeline.foreign.origin import Loaded, Untrained
from pipeline.job_sections import DataSpec, Numerics
from pipeline.models.base import checkpoint_key, encode_checkpoint
from pipeline.numerics import in_force
from pipeline.registry import sources
from pipeline.sources.base import Chunk
from pipeline.store import Store


@dataclass(frozen=True)
class LoadTask:
    """Store the checkpoints of models from elsewhere, and of untrained twins, on one data set."""

    origins: tuple[Loaded | Untrained, ...]
    data: str
    spec: DataSpec
    numerics: Numerics

    @property
    def units(self) -> int:
        """Models."""
        return len(self.origins)

    @property
    def models(self) -> tuple[str, ...]:
        """Ids of the models that the task makes."""
        return tuple(origin.id for origin in self.origins)

    def parts(self) -> tuple[LoadTask, ...]:
        """A task for each model, where there are several."""
        return tuple(replace(self, origins=(one,)) for one in self.origins) if len(self.origins) > 1 else ()


class Staged(NamedTuple):
    """Models stored, models that failed by themselves, and models whose files are not there, with the reason."""

    units: int
    failed: dict[str, str]
    unread: dict[str, str]


def run_load(task: LoadTask, store: Store) -> Staged:
    """Store the checkpoints, create-only; what is wrong with one model costs no other."""
    failed: dict[str, str] = {}
    unread: dict[str, str] = {}
    with in_force(task.numerics):
        for origin in task.origins:
            try:
                match origin:
                    case Loaded():
                        checkpoint = origin.checkpoint()
                    case Untrained():
                        checkpoint = origin.checkpoint(_rows(task, origin.chunks, store))
                store.put_once(checkpoint_key(origin.id), encode_checkpoint(checkpoint))
            except ModelError as error:
                failed[origin.id] = str(error)
            except DataError as error:
                unread[origin.id] = str(error)
    return Staged(task.units - len(failed) - len(unread), failed, unread)


def _rows(task: LoadTask, chunks: Sequence[Chunk], store: Store) -> Iterator[Batch]:
    """A sample of the chunks' rows; of rows that stay together all."""
    if not chunks:
        return
    source, size = sources()[task.spec.source](task.data, task.spec, store), task.numerics.batch_rows
    if source.whole:
        yield from source.read(chunks[0], size)
        return
    portions = [Portion(chunk.id, chunk.rows, partial(source.read, chunk, size)) for chunk in chunks]
    (sample,) = sampled(portions, [lambda batch: torch.ones_like(batch.uid_N, dtype=torch.bool)])
    for start in range(0, sample.rows if sample else 0, size):
        assert sample is not None
        yield take(sample, slice(start, start + size))
