"""What the statistics of a model cost over its bare forward, measured on a batch.

Layer 2. Only times come out: nothing that is measured here goes into a state, and the model is left as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.flow.discover import Discovery
from pipeline.flow.state import unchanged
from pipeline.flow.tap import quiet
from pipeline.graphs import BEFORE
from pipeline.running import Running
from pipeline.statistics.base import Statistic

# pairs of passes: few enough not to be felt in a run, and their median forgives an interruption
PASSES = 5
# no further pair begins later: a model whose forward takes longer has one
ENOUGH_S = 2.0
# of the time that a chunk takes, for what is only looked up; and seconds that are spent on it anyhow, where passes are
# so short that one alone may be an interruption
SHARE, FEW_S = 0.05, 0.5


@dataclass(frozen=True)
class Cost:
    """Seconds that one batch of `rows` rows takes, of `passes` passes each, interleaved.

    forward   the bare forward, in eval and inference mode
    measured  the same forward with every statistic, and the share of a batch in what is done with rows held back
    """

    rows: int
    forward: float
    measured: float
    passes: int

    @property
    def ratio(self) -> float:
        """What measuring costs, the bare forward being 1."""
        return self.measured / self.forward

    @property
    def statistics(self) -> float:
        """Seconds of the statistics alone."""
        return max(0.0, self.measured - self.forward)


@dataclass(frozen=True)
class ModelCost:
    """What a model, by its id, cost on a data set."""

    data: str
    model: str
    cost: Cost


def cost_of(
    model: nn.Module, discovery: Discovery, statistics: Sequence[Statistic], batch: Batch, *, classes: int, kernel: str
) -> Cost:
    """Time a model with and without its statistics, by turns; the batch is one that nobody needs any more."""
    running = Running(discovery, statistics, classes, kernel)

    def forward() -> None:
        with quiet(model):
            batch.forward(model)

    def measured() -> None:
        running.add(model, batch)

    pairs: list[tuple[float, float]] = []
    # on a GPU those behind the first few are one launch
    before = BEFORE if batch.uid_N.is_cuda else 1
    with unchanged(model):
        forward()
        for _ in range(before):
            measured()
        # compiling is over
        begin = time.perf_counter()
        while len(pairs) < PASSES and (not pairs or time.perf_counter() - begin < ENOUGH_S):
            pairs.append((_seconds(forward, batch), _seconds(measured, batch)))
        held = _seconds(lambda: running.finish(model), batch)
    forwards, wholes = zip(*pairs, strict=True)
    # rows of a sample wait over all passes, the first ones as well
    return Cost(batch.rows, median(forwards), median(wholes) + held / (len(pairs) + before), len(pairs))


def cost_beside(model: nn.Module, batch: Batch, *, seconds: float, rows: int) -> Cost:
    """The cost of rows that took so many seconds to measure, by batches the last of which may be small, as of a batch.

    The bare forwards of that batch take a twentieth of the time that measuring took, half a second, or one forward;
    nobody needs the batch any more.
    """

    def forward() -> None:
        with quiet(model):
            batch.forward(model)

    passes: list[float] = []
    enough = max(SHARE * seconds, FEW_S)
    with unchanged(model):
        while len(passes) < PASSES and sum(passes) < enough:
            passes.append(_seconds(forward, batch))
    return Cost(batch.rows, median(passes), seconds * batch.rows / rows, len(passes))


def _seconds(work: Callable[[], None], batch: Batch) -> float:
    start = clock(batch)
    work()
    return clock(batch) - start


def clock(batch: Batch) -> float:
    """Seconds of a clock, read when all that was asked of the batch's GPU is done."""
    if batch.uid_N.is_cuda:
        torch.cuda.synchronize(batch.uid_N.device)
    return time.perf_counter()
