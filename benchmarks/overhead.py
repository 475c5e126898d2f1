"""What the statistics cost over the bare forward pass, for every model and set of statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import nn

from benchmarks.cases import CASES, DATA_ROWS, Case, batches, build, in_sample
from benchmarks.peers import Products, hooked
from benchmarks.timing import Passes, Ratio, Work, interleaved, ratio, settled
from pipeline.batch import Batch
from pipeline.devices import CPU, device_named, moved
from pipeline.flow.discover import Discovery, discover
from pipeline.flow.tap import quiet
from pipeline.kernels import choose
from pipeline.registry import statistics
from pipeline.resolve import sampled
from pipeline.running import Running
from pipeline.statistics.base import Statistic

BARE, PLAIN = "bare forward", "hooks, plain torch moments"
FIRST = ("response", "labels", "exemplars")
PRODUCTS = "forward + its products"
# a row that is compared with the products alone: the template of every row, though a job takes a sample of rows
TEMPLATE = "template, every row"
WHOLE = "all rows in the sample"
# by row: the greatest ratio that is allowed, and for which models
LIMITS: dict[str, float] = {"ours: response + labels + exemplars": 1.20, "ours: + match": 1.35}
LIMITED = ("resnet-18", "transformer-6x384")
TEMPLATE_LIMIT = 1.20


@dataclass(frozen=True)
class Line:
    """One row of the table: a set of statistics on a model. Times in ms of one batch; what the ratio is over.

    peak_mib  of a GPU's memory, the most that a pass took, launch by launch, beside what was there before it: model,
              batches and states
    graph_mib of a GPU's memory, what CUDA graphs keep for themselves
    """

    model: str
    rows: int
    row: str
    wall_ms: float
    cpu_ms: float
    over: str
    ratio: Ratio
    limit: float | None
    peak_mib: float | None = None
    graph_mib: float | None = None

    @property
    def within(self) -> bool:
        """Whether the ratio is within its limit."""
        return self.limit is None or self.ratio.wall <= self.limit


def measure_case(case: Case, *, seconds: float, rounds: int, device: str = CPU) -> Iterator[Line]:
    """Every row of one model."""
    there = device_named(device)
    model, several = build(case).to(there), [moved(batch, there) for batch in batches(case)]
    found = discover(model, several[0])
    yield from _statistics_rows(case, model, found, several, seconds=seconds, rounds=rounds)
    yield from _template_row(case, model, found, several, seconds=seconds, rounds=rounds)


def _statistics_rows(
    case: Case, model: nn.Module, found: Discovery, several: Sequence[Batch], *, seconds: float, rounds: int
) -> Iterator[Line]:
    known = {name: sampled(one, DATA_ROWS) for name, one in statistics().items()}
    shift = max(one.sample_shift for one in known.values())
    device = several[0].uid_N.device
    whole = [moved(batch, device) for batch in in_sample(several, shift, wanted=several[0].rows)]
    several = [moved(batch, device) for batch in in_sample(several, shift)]
    with_match = [known[name] for name in (*FIRST, "match")]
    chosen = {
        "ours: response + labels + exemplars": [known[name] for name in FIRST],
        "ours: + match": with_match,
        f"ours: + template of 1 row in {1 << shift}": [*with_match, known["template"]],
        f"ours: everything, samples 1 in {1 << shift}": list(known.values()),
    }
    bare = _bare(model, several)
    plain = _plain(model, several)
    passes = interleaved({BARE: bare, PLAIN: plain}, seconds=seconds, rounds=rounds)
    yield _line(case, BARE, passes[BARE], passes[BARE], _peak_mib(bare))
    yield _line(case, PLAIN, passes[PLAIN], passes[BARE], _peak_mib(plain))
    for row, ones in chosen.items():
        # a job has one such work: by turns with the bare forward alone, for states of others would fill the caches
        ours, peak_mib = _ours(case, model, found, several, ones)
        works: dict[str, Work] = {BARE: bare, row: ours}
        if found.apart and any(one.sample_shift for one in ones):
            # rows of a sample wait until a batch is full of them
            works[WHOLE], _ = _ours(case, model, found, whole, ones)
        passes = interleaved(works, seconds=seconds, rounds=rounds)
        times = passes[row].with_share(1 / (1 << shift), passes[WHOLE]) if WHOLE in works else passes[row]
        yield _line(case, row, times, passes[BARE], peak_mib, _graph_mib())


def _line(
    case: Case, row: str, times: Passes, bare: Passes, peak_mib: float | None, graph_mib: float | None = None
) -> Line:
    limit = LIMITS.get(row) if case.name in LIMITED else None
    return Line(case.name, case.rows, row, *_milliseconds(times), BARE, ratio(times, bare), limit, peak_mib, graph_mib)


def _template_row(
    case: Case, model: nn.Module, found: Discovery, several: Sequence[Batch], *, seconds: float, rounds: int
) -> Iterator[Line]:
    template = replace(statistics()["template"], sample_rows=None, whitened_fan_in=0)
    firing = {site.path for site in found.sites if site.fires}
    products, bare = Products(model, several[0], firing), _bare(model, several)

    def reference(number: int) -> None:
        bare(number)
        products.run()

    ours, peak_mib = _ours(case, model, found, several, [template])
    works: dict[str, Work] = {PRODUCTS: reference, TEMPLATE: ours}
    passes = interleaved(works, seconds=seconds, rounds=rounds)
    limit = TEMPLATE_LIMIT if case.name in LIMITED else None
    yield Line(
        case.name,
        case.rows,
        TEMPLATE,
        *_milliseconds(passes[TEMPLATE]),
        PRODUCTS,
        ratio(passes[TEMPLATE], passes[PRODUCTS]),
        limit,
        peak_mib,
    )


def _peak_mib(work: Work) -> float | None:
    """Do it once, and say what it took of a GPU's memory."""
    if not torch.cuda.is_initialized():
        work(0)
        return None
    settled()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(0)
    settled()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _graph_mib() -> float | None:
    if not torch.cuda.is_initialized():
        return None
    # what graphs had that are gone is not theirs
    torch.cuda.empty_cache()
    segments = torch.cuda.memory_snapshot()
    return sum(one["total_size"] for one in segments if any(one.get("segment_pool_id", ()))) / 2**20


def _milliseconds(passes: Passes) -> tuple[float, float]:
    return median(passes.wall) * 1e3, median(passes.cpu) * 1e3


def _bare(model: nn.Module, several: Sequence[Batch]) -> Work:
    def forward(number: int) -> None:
        with quiet(model):
            several[number % len(several)].forward(model)

    return forward


def _plain(model: nn.Module, several: Sequence[Batch]) -> Work:
    bare = _bare(model, several)
    # registered anew in every pass, so that the bare forward has no hooks
    kept: dict[str, object] = {}

    def forward(number: int) -> None:
        with hooked(model) as moments:
            for name, before in kept.items():
                moments[name] = before  # type: ignore[assignment]
            bare(number)
            kept.update(moments)

    return forward


def _ours(
    case: Case, model: nn.Module, found: Discovery, several: Sequence[Batch], chosen: Sequence[Statistic]
) -> tuple[Work, float | None]:
    """A pass with statistics, and what it takes of a GPU's memory launch by launch."""
    classes = case.task.outputs
    running = Running(found, chosen, classes, choose.name(several[0].uid_N.device.type))
    # what the first batches keep is kept already: a chunk has many
    with torch.inference_mode(False):
        for batch in several[1:]:
            running.add(model, batch)
        peak_mib = _peak_mib(lambda number: running.add(model, several[number]))
    return lambda number: running.add(model, several[number % len(several)]), peak_mib


def cases(names: Sequence[str]) -> list[Case]:
    """The cases of these names, or all."""
    return [case for case in CASES if not names or case.name in names]
