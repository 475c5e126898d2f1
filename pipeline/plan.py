"""What is left to do: tasks for the missing checkpoints and cells, from a resolved job and the keys of the store.

Layer 3. Pure but for one LIST per model. How cells are grouped into tasks is scheduling: it changes no key and no byte.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from math import ceil
from typing import TypeVar

from pipeline.cells import cell_key
from pipeline.errors import JobError
from pipeline.fit.recipe import Recipe
from pipeline.flow.discover import discover
from pipeline.grouping import groups
from pipeline.job import misfit
from pipeline.loading import PROBE_ROWS, Probe
from pipeline.measuring.task import MeasureTask, Missing
from pipeline.models.base import checkpoint_key
from pipeline.origins import made, made_up, shape_of
from pipeline.reduce import DONE, Measured, ReduceTask, reduced_key
from pipeline.resolve import Resolved, Split
from pipeline.run_models import Model
from pipeline.sizes import Size
from pipeline.staging import LoadTask
from pipeline.store import Store
from pipeline.training import TrainTask, grouped

T = TypeVar("T")

# chunks to look into for the first rows of a data set
PROBE_CHUNKS = 8
# models of one measure task: they share one reading of its chunks
GROUP_MODELS = 8
# any worker has room for this
SMALL_GROUP_BYTES = 256 << 20
# sites that a message names
LISTED_SITES = 6
# models of one load task: a worker's death costs no more
GROUP_LOADS = 16
# tasks per worker and split, so that a slow one does not hold up the rest
TASKS_PER_WORKER = 4
# a listing of a bucket takes 10 to 100 ms, and there is one for every model
LISTINGS = 16


@dataclass(frozen=True)
class Plan:
    """The tasks of a run that have work left, and how much was there already."""

    resolved: Resolved
    train: tuple[TrainTask, ...]
    load: tuple[LoadTask, ...]
    measure: tuple[MeasureTask, ...]
    trainings: int
    loads: int
    cells: int
    state_bytes: int

    @property
    def missing_cells(self) -> int:
        """Cells left to compute."""
        return sum(task.units for task in self.measure)

    @property
    def rows(self) -> int:
        """Rows to read: each missing chunk once per group of models."""
        return sum(chunk.rows for task in self.measure for chunk in {cell.chunk for cell in task.cells})


def make_plan(
    resolved: Resolved, store: Store, *, workers: int, memory_bytes: Callable[[], int | None] = lambda: None
) -> Plan:
    """Plan the trainings and cells that the store does not hold. JobError as `refuse_unfit` has it.

    `memory_bytes` says what one worker has on the device where it measures; asked only where models are large.
    """
    refuse_unfit(resolved)
    checkpoints, stored = _there(resolved, store)
    trainings = {recipe.lineage: (model.data, recipe) for model, recipe in trained(resolved)}
    missing = [
        (data, recipe)
        for data, recipe in trainings.values()
        if not {checkpoint_key(recipe.model_id(step)) for step in recipe.checkpoints} <= checkpoints
    ]
    loads = [model for model in resolved.models if not isinstance(model.origin, Recipe)]
    is_large = GROUP_MODELS * max((size.held for size in resolved.sizes.values()), default=0) > SMALL_GROUP_BYTES
    memory = memory_bytes() if is_large else None
    return Plan(
        resolved=resolved,
        train=tuple(_train_tasks(resolved, missing, workers)),
        load=tuple(_load_tasks(resolved, [one for one in loads if checkpoint_key(one.id) not in checkpoints], workers)),
        measure=tuple(_measure_tasks(resolved, stored, workers, resolved.sizes, memory)),
        trainings=len(trainings),
        loads=len(loads),
        cells=resolved.cells,
        state_bytes=resolved.state_bytes,
    )


def _there(resolved: Resolved, store: Store) -> tuple[set[str], set[str]]:
    """The keys of all checkpoints, and of the cells of the run's models."""
    checkpoints = set(store.keys("models/"))
    with ThreadPoolExecutor(LISTINGS) as pool:
        listings = pool.map(store.keys, [f"states/{model.id}/" for model in resolved.models])
        return checkpoints, {key for listing in listings for key in listing}


def gone(resolved: Resolved, store: Store, models: Collection[str]) -> list[Model]:
    """Those of the `models`, which have all been measured, whose checkpoint or a cell is not there any more."""
    checkpoints = set(store.keys("models/"))
    names = {
        (split.data, split.name): [resolved.state_name(one) for one in resolved.statistics_of(split)]
        for split in resolved.splits
    }

    def is_there(model: Model) -> bool:
        # a run may have more cells than memory holds names of
        stored = set(store.keys(f"states/{model.id}/"))
        return checkpoint_key(model.id) in checkpoints and all(
            cell_key(model.id, name, chunk.id) in stored
            for split in resolved.splits_of(model)
            for name in names[split.data, split.name]
            for chunk in split.chunks
        )

    measured = [model for model in resolved.models if model.id in models]
    with ThreadPoolExecutor(LISTINGS) as pool:
        return [model for model, there in zip(measured, pool.map(is_there, measured), strict=True) if not there]


def trained(resolved: Resolved) -> Iterator[tuple[Model, Recipe]]:
    """The models that the job trains, with their recipes."""
    for model in resolved.models:
        if isinstance(model.origin, Recipe):
            yield model, model.origin


def _load_tasks(resolved: Resolved, missing: Sequence[Model], workers: int) -> Iterator[LoadTask]:
    for data, spec in resolved.job.data.items():
        origins = [one.origin for one in missing if one.data == data and not isinstance(one.origin, Recipe)]
        size = min(GROUP_LOADS, max(1, ceil(len(origins) / (TASKS_PER_WORKER * workers))))
        for some in _cut(origins, size):
            yield LoadTask(tuple(some), data, spec, resolved.numerics)


def _train_tasks(resolved: Resolved, missing: Sequence[tuple[str, Recipe]], workers: int) -> Iterator[TrainTask]:
    for data, spec in resolved.job.data.items():
        for recipes in grouped([recipe for of, recipe in missing if of == data], workers):
            yield TrainTask(
                recipes=recipes,
                data=data,
                spec=spec,
                chunks=resolved.training_chunks[data],
                numerics=resolved.numerics,
                device=resolved.device,
            )


def all_measure_tasks(resolved: Resolved) -> Iterator[MeasureTask]:
    """The tasks of one worker that holds any model, for every cell, stored or not."""
    small = {shape_of(model.origin): Size() for model in resolved.models}
    return _measure_tasks(resolved, set(), 1, small, None)


def _measure_tasks(
    resolved: Resolved, stored: set[str], workers: int, sizes: Mapping[str, Size], memory_bytes: int | None
) -> Iterator[MeasureTask]:
    for split in resolved.splits:
        statistics = resolved.statistics_of(split)
        names = {one.name: resolved.state_name(one) for one in statistics}
        models = [model for model in resolved.models if model.data == split.data]
        size = min(GROUP_MODELS, max(1, ceil(len(models) / workers)))
        held = [sizes[shape_of(model.origin)].held for model in models]
        for group in groups(models, held, most=size, memory_bytes=memory_bytes):
            cells = []
            for chunk in split.chunks:
                for model in group:
                    left = tuple(
                        one for one in statistics if cell_key(model.id, names[one.name], chunk.id) not in stored
                    )
                    if left:
                        cells.append(Missing(model, chunk, left))
            for part in _by_chunk(cells, workers):
                yield MeasureTask(
                    probe=probe_of(resolved, split.data),
                    cells=part,
                    state_names=names,
                    numerics=resolved.numerics,
                    sites=resolved.job.sites,
                    classes=resolved.classes[split.data],
                    kernel=resolved.kernel,
                    texts=resolved.texts,
                    device=resolved.device,
                )


def _by_chunk(cells: Sequence[Missing], workers: int) -> Iterator[tuple[Missing, ...]]:
    """Runs of whole chunks, a few tasks for each worker."""
    chunks = [list(same) for _, same in groupby(cells, key=lambda cell: cell.chunk.id)]
    for run in _cut(chunks, max(1, ceil(len(chunks) / (TASKS_PER_WORKER * workers)))):
        yield tuple(cell for same in run for cell in same)


def _cut(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def reduce_tasks(
    resolved: Resolved, stored: Collection[str], failed: Mapping[str, str], *, open: Collection[str] = ()
) -> list[ReduceTask]:
    """A task for every model whose rows of this run are not stored yet; one that failed has a row in `models` only.

    `open` are models whose cells are not all there: they have none, and neither has a model they are the control of.
    """
    by_id = {model.id: model for model in resolved.models if model.id not in failed}
    left_open = frozenset(open)
    return [
        ReduceTask(
            run=resolved.run,
            model=model,
            twin=by_id.get(model.start) if model.start else None,
            failure=failed.get(model.id),
            measured=tuple(_measured(resolved, split) for split in resolved.splits_of(model)),
            probe=probe_of(resolved, model.data),
            numerics=resolved.numerics,
            sites=resolved.job.sites,
            texts=resolved.texts,
        )
        for model in resolved.models
        if reduced_key(resolved.run, model.id, DONE) not in stored and not {model.id, model.control} & left_open
    ]


def _measured(resolved: Resolved, split: Split) -> Measured:
    statistics = resolved.statistics_of(split)
    return Measured(split, statistics, {one.name: resolved.state_name(one) for one in statistics})


def probe_of(resolved: Resolved, data: str) -> Probe:
    """The first chunk that models of a data set are measured on, and some more where that turns out to be empty."""
    every = (chunk for split in resolved.splits if split.data == data for chunk in split.chunks)
    first, *others = islice(every, PROBE_CHUNKS)
    return Probe(data, resolved.job.data[data], first, tuple(others))


def refuse_unfit(resolved: Resolved) -> None:
    """JobError where no model has a site that is asked for, or the states outgrow the job's limit.

    Known from made-up rows, before anything is written.
    """
    _refuse_no_choice(resolved)
    limit = resolved.job.resources.max_state_gib
    if resolved.state_bytes > limit * 2**30:
        least = "at least " if any(size.is_least for size in resolved.sizes.values()) else ""
        raise JobError(
            f"{resolved.job.place}: the states would take {least}{resolved.state_bytes / 2**30:.1f} GiB, more than "
            f"resources.max_state_gib = {limit}: measure fewer statistics, use larger chunks, or raise it"
        )


def _refuse_no_choice(resolved: Resolved) -> None:
    sites = resolved.job.sites
    key = "exclude" if sites.exclude else "include"
    if (key == "include" and set(sites.include) == {"*"}) or not all(
        size.has_no_site for size in resolved.sizes.values()
    ):
        return
    first = resolved.models[0]
    found = discover(made(first.origin), made_up(first.origin, PROBE_ROWS)).sites
    listed = ", ".join(f"{site.name} ({site.kind}, {site.gate})" for site in found[:LISTED_SITES]) or "none"
    more = f" and {len(found) - LISTED_SITES} more" if len(found) > LISTED_SITES else ""
    expected = f"patterns that leave a site of some model; {first.name} has {listed}{more}"
    raise misfit(resolved.job, f"sites.{key}", getattr(sites, key), expected)
