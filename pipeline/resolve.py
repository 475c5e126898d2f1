"""From a job to what it means: frozen lists of model ids and chunk ids, and the run they name.

Layer 3. Reads the footers of files, and rows only where a source counts the values of its columns, once. Everything a
job names is checked here, before anything but such counts is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from pipeline.devices import device_asked
from pipeline.errors import JobError, ModelError
from pipeline.fit.recipe import Recipe
from pipeline.fit.settings import Training
from pipeline.foreign.entry import Place, loaded_models, pin_of, twins
from pipeline.foreign.origin import Untrained
from pipeline.foreign.spec import LoadSpec
from pipeline.grid import Point, label, points
from pipeline.hashing import digest
from pipeline.job import DataSpec, Job, ModelSpec, Numerics, dotted, job_identity, misfit, refusal, unknown
from pipeline.kernels import choose
from pipeline.models.base import Family, Task
from pipeline.origins import Origin
from pipeline.registry import families, sources
from pipeline.registry import statistics as known_statistics
from pipeline.sources.base import Chunk, Source
from pipeline.statistics.base import Statistic
from pipeline.store import Store

# raised whenever the same model and rows would give other sites, states or scores
MEASURE_VERSION = 3


@dataclass(frozen=True)
class Model:
    """One model of a run.

    step        of its training; None where that is not known
    control     id of its untrained twin, `control_of` the lineage or architecture whose twin it is
    """

    id: str
    name: str
    data: str
    origin: Origin
    step: int | None
    control: str | None
    control_of: str | None

    @property
    def start(self) -> str | None:
        """Id of the model that it was before training; the twin of a loaded one began with other weights."""
        return self.control if isinstance(self.origin, Recipe) else None


@dataclass(frozen=True)
class Split:
    """The chunks of one split of one data set, in plan order."""

    data: str
    name: str
    chunks: tuple[Chunk, ...]

    @property
    def rows(self) -> int:
        """Rows in the row groups of its chunks, other splits' rows in them included."""
        return sum(chunk.rows for chunk in self.chunks)


@dataclass(frozen=True)
class Resolved:
    """A job with everything looked up: what runs is a function of this and of what the store holds.

    kernel  by which every worker measures, see `kernels.choose`
    """

    job: Job
    models: tuple[Model, ...]
    splits: tuple[Split, ...]
    statistics: tuple[Statistic, ...]
    classes: Mapping[str, int]
    training_chunks: Mapping[str, tuple[Chunk, ...]]
    kernel: str

    @cached_property
    def run(self) -> str:
        """The run id: digest of job, models, chunks and statistics. The same inputs are the same run."""
        chunks = [[split.data, split.name, [chunk.id for chunk in split.chunks]] for split in self.splits]
        states = [[self.state_name(statistic) for statistic in self.statistics_of(split)] for split in self.splits]
        return digest([job_identity(self.job), [model.id for model in self.models], chunks, states], length=16)

    @cached_property
    def measure_key(self) -> str:
        """What besides model, chunk and statistic decides a state's bytes: kernel, numerics, sites, our version."""
        job = self.job
        return digest(
            [MEASURE_VERSION, self.kernel, job.numerics.model_dump(mode="json"), job.sites.model_dump(mode="json")],
            length=8,
        )

    def statistics_of(self, split: Split) -> tuple[Statistic, ...]:
        """The statistics with their samples sized for this split."""
        return tuple(sampled(statistic, split.rows) for statistic in self.statistics)

    def state_name(self, statistic: Statistic) -> str:
        """The folder of a statistic's states within a model's."""
        return f"{statistic.identity}-{self.measure_key}"

    @property
    def device(self) -> str:
        """Where every worker measures."""
        return device_asked(self.job.resources)

    def splits_of(self, model: Model) -> tuple[Split, ...]:
        """The splits that a model is measured on."""
        return tuple(split for split in self.splits if split.data == model.data)

    @property
    def cells(self) -> int:
        """How many cells the run consists of."""
        chunks = sum(len(split.chunks) for model in self.models for split in self.splits_of(model))
        return chunks * len(self.statistics)

    @property
    def numerics(self) -> Numerics:
        """The job's numerics."""
        return self.job.numerics


def sampled(statistic: Statistic, rows: int) -> Statistic:
    """Halve the sample until it expects at most twice `sample_rows` rows.

    Only crossing a power of two changes it, so data can grow without making old states useless.
    """
    if statistic.sample_rows is None:
        return statistic
    shift = 0
    while rows >> shift > 2 * statistic.sample_rows:
        shift += 1
    return replace(statistic, sample_shift=shift)


def resolve(job: Job, store: Store) -> Resolved:
    """Look up everything that a job names. JobError, DataError or ModelError where it does not exist."""
    statistics = _statistics(job)
    entries = [one for index in range(len(job.models)) for one in _entries(job, index)]
    for name, spec in job.data.items():
        if spec.source not in sources():
            raise unknown(job, f"data.{name}.source", spec.source, sources())
    # names are checked before a source is asked: one that brings its own data stores it first
    found: dict[str, Source] = {name: sources()[spec.source](name, spec, store) for name, spec in job.data.items()}
    models = _once(model for one in entries for model in _models(job, one, found[one.spec.data], store))
    _refuse_duplicates(job, models)
    used = sorted({model.data for model in models})
    return Resolved(
        job=job,
        models=models,
        splits=tuple(_split(job, name, split, found[name]) for name in used for split in _measured(job.data[name])),
        statistics=statistics,
        classes={name: found[name].classes for name in used},
        training_chunks={name: found[name].chunks(job.data[name].train) for name in used},
        kernel=choose.name(device_asked(job.resources)),
    )


def _split(job: Job, data: str, name: str, source: Source) -> Split:
    chunks = source.chunks(name)
    if not chunks:
        raise JobError(f"{job.place}: data.{data} has no rows of split {name!r} to measure")
    return Split(data, name, chunks)


def _measured(spec: DataSpec) -> tuple[str, ...]:
    return tuple(dict.fromkeys(spec.measure))


def _statistics(job: Job) -> tuple[Statistic, ...]:
    known = known_statistics()
    for name in job.statistics:
        if name not in known:
            raise unknown(job, "statistics", name, known)
    names = sorted(job.statistics) if job.statistics else sorted(known)
    return tuple(_parametrised(job, known[name], job.statistics.get(name, {})) for name in names)


def _parametrised(job: Job, statistic: Statistic, given: Mapping[str, Any]) -> Statistic:
    settable = {name: value for name, value in statistic.parameters.items() if name != "sample_shift"}
    for name, value in given.items():
        key = f"statistics.{statistic.name}.{name}"
        if name not in settable:
            raise unknown(job, key, name, settable)
        default = settable[name]
        if default is not None and type(value) is not type(default):
            raise misfit(job, key, value, f"a value like {default!r}")
    return replace(statistic, **given)


@dataclass(frozen=True)
class _Entry:
    """One entry of a job's models, or one point of its grid, with everything that needs no data checked."""

    where: str
    spec: ModelSpec
    family: Family
    name: str
    hyperparameters: dict[str, Any]
    training: dict[str, Any]


@dataclass(frozen=True)
class _LoadEntry:
    """One entry whose models are loaded."""

    where: str
    spec: ModelSpec
    load: LoadSpec


def _entries(job: Job, index: int) -> list[_Entry] | list[_LoadEntry]:
    spec, where = job.models[index], f"models[{index}]"
    if spec.data not in job.data:
        raise unknown(job, f"{where}.data", spec.data, job.data)
    if spec.load is not None:
        return [_LoadEntry(where, spec, _load_spec(job, where, spec.load))]
    if spec.family not in families():
        raise unknown(job, f"{where}.family", spec.family or "", families())
    _refuse_what_no_grid_can_set(job, where, spec)
    return [_entry(job, where, spec, point) for point in points(spec.grid)]


def _entry(job: Job, where: str, spec: ModelSpec, point: Point) -> _Entry:
    family: Family = families()[spec.family or ""]
    read = partial(_validated, job, where, point=point)
    return _Entry(
        where=where,
        spec=spec,
        family=family,
        name="-".join(part for part in (spec.name or spec.family, label(point)) if part),
        hyperparameters=read("hyperparameters", family.parameters, spec.hyperparameters),
        training=read("training", Training, spec.training),
    )


def _refuse_what_no_grid_can_set(job: Job, where: str, spec: ModelSpec) -> None:
    tables = {"hyperparameters": families()[spec.family or ""].parameters, "training": Training}
    known = [name for table in tables.values() for name in table.model_fields]
    for key in (key for grid in spec.grid for key in grid):
        if key not in known:
            raise unknown(job, f"{where}.grid.{key}", key, known)
        for table in tables:
            if key in (given := getattr(spec, table)):
                raise misfit(job, f"{where}.{table}.{key}", given[key], "no value here, as the grid has some")


def _load_spec(job: Job, where: str, given: Mapping[str, Any]) -> LoadSpec:
    spec = _checked(job, f"{where}.load", LoadSpec, given)
    if spec.family is None:
        return spec
    if spec.family not in families():
        raise unknown(job, f"{where}.load.family", spec.family, families())
    arguments = _checked(job, f"{where}.load.arguments", families()[spec.family].parameters, spec.arguments)
    # defaults are part of how a model is built
    return spec.model_copy(update={"arguments": arguments.model_dump(mode="json")})


def _models(job: Job, entry: _Entry | _LoadEntry, source: Source, store: Store) -> list[Model]:
    if isinstance(entry, _Entry):
        return _trained(job, entry, source)
    return _loaded(job, entry, source, store)


def _loaded(job: Job, entry: _LoadEntry, source: Source, store: Store) -> list[Model]:
    """The models that an entry's files are, and behind them the untrained twin of each architecture."""
    where, spec, load = entry.where, entry.spec, entry.load
    if load.family is not None:
        _refuse_other_rows(job, where, spec.data, families()[load.family], source)
    task = Task(tuple(source.shape), source.classes, tuple(source.categories), source.vocabulary)
    place = Place(spec.located(load.url), spec.named)
    chunks = source.chunks(job.data[spec.data].train) or source.chunks(job.data[spec.data].measure[0])
    try:
        found = loaded_models(load, place, task, dtype=job.numerics.dtype, store=store)
        if load.sha256 is not None and load.sha256 != (pin := pin_of(found)):
            raise misfit(job, f"{where}.load.sha256", load.sha256, f"the sha256 of what is there, {pin}")
        made = twins(found, seed=_seed(job, 0), data=spec.data, chunks=chunks)
    except ModelError as error:
        raise refusal(job, f"{where}.load", str(error)) from error
    controls = made if spec.control else {}
    models = []
    for name, origin in found.items():
        twin = controls.get(origin.architecture)
        named = name if spec.name is None else f"{spec.name}-{name}"
        models.append(Model(origin.id, named, spec.data, origin, None, twin.id if twin else None, None))
    for architecture, twin in controls.items():
        base = spec.name or (architecture.label or "").rpartition(":")[2]
        several = "" if len(controls) == 1 else f"-{twin.id[:8]}"
        models.append(Model(twin.id, f"{base}{several}-init", spec.data, twin, 0, None, architecture.id))
    return models


def _refuse_other_rows(job: Job, where: str, data: str, family: Family, source: Source) -> None:
    if family.whole != source.whole:
        takes = "a graph" if family.whole else "single rows"
        raise misfit(job, f"{where}.data", data, f"data of {takes}, which family {family.name} takes")


def _once(models: Iterable[Model]) -> tuple[Model, ...]:
    """The models without repeated twins of loaded ones: entries of one architecture share theirs."""
    found: dict[int | str, Model] = {}
    for number, model in enumerate(models):
        found.setdefault(model.id if isinstance(model.origin, Untrained) else number, model)
    return tuple(found.values())


def _trained(job: Job, entry: _Entry, source: Source) -> list[Model]:
    """The trained models of an entry, one for each seed, each followed by its untrained twin."""
    data = entry.spec.data
    _refuse_other_rows(job, entry.where, data, entry.family, source)
    chunks = source.chunks(job.data[data].train)
    if not chunks:
        raise JobError(f"{job.place}: data.{data} has no rows of split {job.data[data].train!r} to train on")
    # one tuple for all: a task of eight models carries it once
    trained_on = tuple(chunk.id for chunk in chunks)
    recipes = [
        Recipe(
            family=entry.family.name,
            family_version=entry.family.version,
            hyperparameters=entry.hyperparameters,
            training=entry.training,
            seed=_seed(job, seed),
            shape=tuple(source.shape),
            outputs=source.classes,
            categories=tuple(source.categories),
            vocabulary=source.vocabulary,
            chunks=trained_on,
            dtype=job.numerics.dtype,
            threads=job.numerics.threads,
            deterministic=job.numerics.deterministic,
        )
        for seed in entry.spec.seeds
    ]
    _try_to_build(job, entry.where, recipes[0])
    named = zip(recipes, entry.spec.seeds, strict=True)
    return [model for recipe, seed in named for model in _lineage(entry, recipe, seed)]


def _seed(job: Job, seed: int) -> int:
    return job.seed * 1_000_003 + seed


def _lineage(entry: _Entry, recipe: Recipe, seed: int) -> list[Model]:
    """The model at each of its checkpoints, the last one first, and, unless the job says no, its untrained twin."""
    spec, name = entry.spec, f"{entry.name}-{seed}"
    twin = recipe.model_id(0) if spec.control else None
    models = [
        Model(
            recipe.model_id(step),
            name if step == recipe.steps else f"{name}@{step}",
            spec.data,
            recipe,
            step,
            twin,
            None,
        )
        for step in reversed(recipe.checkpoints[1:])
    ]
    if twin is None:
        return models
    return [*models, Model(twin, f"{name}-init", spec.data, recipe, 0, None, recipe.lineage)]


def _try_to_build(job: Job, where: str, recipe: Recipe) -> None:
    try:
        with torch.device("meta"):
            recipe.build()
    except ModelError as error:
        raise JobError(f"{job.place}: {where}: {error}") from error


def _validated(
    job: Job, where: str, table: str, model: type[BaseModel], given: Mapping[str, Any], *, point: Point
) -> dict[str, Any]:
    """A table of an entry with what a point of the grid sets of it, checked."""
    chosen = {name: value for name, value in point.items() if name in model.model_fields}
    places = dict.fromkeys(chosen, f"{where}.grid")
    return _checked(job, f"{where}.{table}", model, {**given, **chosen}, places=places).model_dump(mode="json")


T = TypeVar("T", bound=BaseModel)


def _checked(
    job: Job, where: str, model: type[T], given: Mapping[str, Any], *, places: Mapping[str, str] = MappingProxyType({})
) -> T:
    """What a table says, read; `places` are those of keys that stand in another table. JobError at the first misfit."""
    try:
        return model(**given)
    except ValidationError as error:
        first = error.errors()[0]
        key = dotted(first["loc"])
        path = f"{places.get(str(first['loc'][0]), where)}.{key}"
        if first["type"] == "extra_forbidden":
            raise unknown(job, path, key, model.model_fields) from None
        if first["type"] == "missing":
            meaning = model.model_fields[key].description
            raise refusal(job, where, f"{key} is missing: expected {key} = … ({meaning})") from None
        raise misfit(job, path, first["input"], first["msg"]) from None


def _refuse_duplicates(job: Job, models: tuple[Model, ...]) -> None:
    for what in ("id", "name"):
        seen: dict[str, Model] = {}
        for model in models:
            other = seen.setdefault(getattr(model, what), model)
            if other is not model:
                raise JobError(
                    f"{job.place}: models {other.name!r} and {model.name!r} have the same {what}: "
                    f"{_CURES[what, isinstance(model.origin, Recipe)]}"
                )


_CURES = {
    ("id", True): "give their entries different names, seeds or settings",
    ("id", False): "they are the same weights; measure those on other data in a job of its own",
    ("name", True): "give their entries different names, seeds or settings",
    ("name", False): "give their entries different names",
}
