"""What a measure task is asked for: cells that are not stored yet, of some models on some chunks.

Layer 3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from pipeline.devices import CPU
from pipeline.job_sections import Numerics, SiteSelection
from pipeline.loading import Probe
from pipeline.run_models import Model
from pipeline.sources.base import Chunk
from pipeline.statistics.base import Statistic


@dataclass(frozen=True)
class Missing:
    """The cells of one model and chunk that are not stored yet."""

    model: Model
    chunk: Chunk
    statistics: tuple[Statistic, ...]


@dataclass(frozen=True)
class MeasureTask:
    """Missing cells of some models on some chunks of one split.

    `state_names` gives the folder of each statistic's states; `classes` is the number of classes of the labels;
    `kernel` is the one that the run names for all of its workers, and `device` where each of them measures; `texts` are
    those of the files that make its rows, see `texts.py`.
    """

    probe: Probe
    cells: tuple[Missing, ...]
    state_names: Mapping[str, str]
    numerics: Numerics
    sites: SiteSelection
    classes: int
    kernel: str
    texts: Mapping[str, str]
    device: str = CPU

    @property
    def models(self) -> tuple[str, ...]:
        """Ids of the models that the task is about."""
        return tuple(dict.fromkeys(cell.model.id for cell in self.cells))

    @property
    def units(self) -> int:
        """Cells to compute."""
        return sum(len(cell.statistics) for cell in self.cells)

    def without(self, models: Collection[str]) -> MeasureTask:
        """The task without the cells of some models."""
        return replace(self, cells=tuple(cell for cell in self.cells if cell.model.id not in models))

    def by_chunk(self) -> Iterator[tuple[Chunk, tuple[Missing, ...]]]:
        """The chunks in plan order, each with its cells."""
        for cells in groupby(self.cells, key=lambda cell: cell.chunk.id):
            same = tuple(cells[1])
            yield same[0].chunk, same

    def parts(self) -> tuple[MeasureTask, ...]:
        """The task cut by chunks, that of a single chunk by models; nothing if it is of one model and chunk."""
        if len(self.cells) == 1:
            return ()
        chunks = [cells for _, cells in self.by_chunk()]
        cut = chunks if len(chunks) > 1 else [(cell,) for cell in self.cells]
        return tuple(replace(self, cells=cells) for cells in cut)
