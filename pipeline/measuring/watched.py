"""One model on one chunk: it is shown batches, and what becomes of its statistics and scores is kept.

Layer 3. A model that fails by itself is shown nothing more, and keeps the others from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pipeline.batch import Batch
from pipeline.cells import CellState
from pipeline.cost import Cost, clock, cost_beside
from pipeline.errors import ModelError
from pipeline.loading import Loaded
from pipeline.measuring.task import Missing
from pipeline.running import Running
from pipeline.scores import Sums, added, score
from pipeline.statistics.base import primitives_digest


@dataclass(eq=False)
class Watched:
    """A model and its running states; `failure` says why it failed, if so.

    For the log: the `seconds` that all batches took together, and the `rows` in them.
    """

    cell: Missing
    loaded: Loaded
    running: Running
    scores: list[Sums] = field(default_factory=list)
    seconds: float = 0.0
    rows: int = 0
    failure: str | None = None

    def show(self, batch: Batch, *, timed: bool) -> None:
        """Run the model on a batch, unless it has failed."""
        if self.failure is not None:
            return
        start = clock(batch) if timed else 0.0
        try:
            output = self.running.add(self.loaded.module, self.loaded.shown(batch))
            self.scores.append(score(output, batch, self.loaded.objective, classes=self.running.classes))
        except ModelError as error:
            self.failure = str(error)
        if timed:
            self.seconds += clock(batch) - start
            self.rows += batch.rows

    def finish(self, timed: Batch | None) -> None:
        """Show the model the rows that are held back still; if timed, it takes seconds too."""
        if self.failure is not None:
            return
        start = clock(timed) if timed else 0.0
        try:
            self.running.finish(self.loaded.module)
        except ModelError as error:
            self.failure = str(error)
        if timed:
            self.seconds += clock(timed) - start

    def cells(self, seen: CellState) -> dict[str, CellState]:
        """The cells by statistic, of a chunk of which `seen` says what was read."""
        seen = replace(seen, scores=added(self.scores), checkpoint=self.loaded.sha256)
        states = self.running.states()
        return {
            statistic.name: replace(
                seen,
                states=states[statistic.name],
                primitives=primitives_digest(statistic, self.loaded.discovery.sites),
            )
            for statistic in self.running.statistics
        }

    def cost(self, batch: Batch) -> Cost:
        """What the statistics cost, beside the bare forward of a batch that has been measured."""
        return cost_beside(self.loaded.module, self.loaded.shown(batch), seconds=self.seconds, rows=self.rows)
