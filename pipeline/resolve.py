"""From a job to what it means: frozen lists of model ids and chunk ids, and the run they name.

Layer 3. Reads the footers of files, and rows only where a source counts the values of its columns, once. Everything a
job names is checked here, and nothing is written: what was found out at some expense is withheld until all is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from pipeline.devices import device_asked
from pipeline.entry_models import models_of, refuse_without_rows
from pipeline.errors import ContractError, DataError, MissingData, StoreError, nearest
from pipeline.hashing import digest
from pipeline.job import Job, job_identity, misfit
from pipeline.job_sections import DataSpec, Numerics
from pipeline.kernels import choose
from pipeline.named import look_up
from pipeline.origins import family_of, shape_of
from pipeline.run_models import Model, once, refuse_duplicates
from pipeline.sizes import Size, sizes_of
from pipeline.sources.base import Chunk, Source
from pipeline.statistics.base import Statistic
from pipeline.store import Store
from pipeline.tables import table_columns
from pipeline.texts import texts_of
from pipeline.withheld import Withheld

# raised whenever the same model and rows would give other sites, states or scores
MEASURE_VERSION = 7
# raised whenever the same states would give other rows, though no column says so, or the rows lie elsewhere on the way
REDUCE_VERSION = 3


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

    kernel    by which every worker measures, see `kernels.choose`
    findings  what was counted and hashed for it, to be released into the store before anything is done
    """

    job: Job
    models: tuple[Model, ...]
    splits: tuple[Split, ...]
    statistics: tuple[Statistic, ...]
    classes: Mapping[str, int]
    training_chunks: Mapping[str, tuple[Chunk, ...]]
    kernel: str
    findings: Withheld = field(compare=False)

    @cached_property
    def run(self) -> str:
        """The run id: digest of job, models, chunks, statistics and tables. The same inputs are the same run."""
        chunks = [[split.data, split.name, [chunk.id for chunk in split.chunks]] for split in self.splits]
        states = [[self.state_name(statistic) for statistic in self.statistics_of(split)] for split in self.splits]
        models = [model.id for model in self.models]
        return digest([job_identity(self.job), models, chunks, states, self.tables_key], length=16)

    @cached_property
    def tables_key(self) -> str:
        """What besides the states decides the rows: the texts of statistics and families, all columns, our version.

        A version of this program that has others is another run, which shares no row with one that was left.
        """
        columns = table_columns([column for statistic in self.statistics for column in statistic.COLUMNS])
        described = {table: [asdict(column) for column in those] for table, those in columns.items()}
        return digest([REDUCE_VERSION, described, self.texts], length=8)

    @cached_property
    def texts(self) -> dict[str, str]:
        """Of the files that make rows: whoever edits a formula shall not be shown what the one before it gave.

        States are named by versions alone, so that a word in a comment does not cost measuring anew.
        """
        families = {family_of(model.origin) for model in self.models} - {None}
        return texts_of([*self.statistics, *families])

    @cached_property
    def measure_key(self) -> str:
        """What besides model, chunk and statistic decides a state's bytes: where, by which kernel, numerics, sites."""
        numerics, sites = (one.model_dump(mode="json") for one in (self.job.numerics, self.job.sites))
        return digest([MEASURE_VERSION, self.device, self.kernel, numerics, sites], length=8)

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

    @cached_property
    def sizes(self) -> dict[str, Size]:
        """The size of each shape of model; takes the seconds in which one of each is built."""
        limit = self.job.resources.max_state_gib * 2**30
        most_bytes = {shape: limit / chunks for shape, chunks in self._chunks.items()}
        return sizes_of((model.origin for model in self.models), self.statistics, self.job.sites, most_bytes=most_bytes)

    @cached_property
    def _chunks(self) -> Counter[str]:
        """How often the models of each shape are shown a chunk."""
        shown: Counter[str] = Counter()
        for model in self.models:
            shown[shape_of(model.origin)] += sum(len(split.chunks) for split in self.splits_of(model))
        return shown

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of every cell of the run."""
        return sum(self.sizes[shape].states * chunks for shape, chunks in self._chunks.items())

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
    """Look up everything that a job names, and write nothing. JobError, DataError or ModelError where it is missing."""
    findings = Withheld(store)
    # names are checked before a source is asked: one may have to read all rows
    statistics, entries, found = look_up(job, findings)
    for name in sorted({one.spec.data for one in entries}):
        _look_into(job, name, found[name])
        _refuse_unfit(job, statistics, name, found[name].classes)
    models = once(model for one in entries for model in models_of(job, one, found[one.spec.data], findings))
    refuse_duplicates(job, models)
    used = sorted({model.data for model in models})
    for name in used:
        _refuse_one_id(job, name, found[name])
    return Resolved(
        job=job,
        models=models,
        splits=tuple(_split(job, name, split, found[name]) for name in used for split in _measured(job.data[name])),
        statistics=statistics,
        classes={name: found[name].classes for name in used},
        training_chunks={name: found[name].chunks(job.data[name].train) for name in used},
        kernel=choose.name(device_asked(job.resources)),
        findings=findings,
    )


def _look_into(job: Job, data: str, source: Source) -> None:
    """Have a data set's files listed and their schemas checked; its error, with where the job names them."""
    try:
        source.chunks(job.data[data].train)
    except (DataError, StoreError) as error:
        spec = job.data[data]
        cure = f"; make it by: {spec.made_by}" if spec.made_by and isinstance(error, MissingData) else ""
        raise type(error)(f"{spec.place}: [data.{data}] {error}{cure}") from error


def _refuse_unfit(job: Job, statistics: Sequence[Statistic], data: str, classes: int) -> None:
    """JobError for a parameter of a statistic that cannot be for a data set, before anything is trained on it."""
    for statistic in statistics:
        for name, expected in statistic.unfit(classes).items():
            key = f"statistics.{statistic.name}.{name}"
            raise misfit(job, key, statistic.parameters[name], f"{expected} {data!r}")


def _split(job: Job, data: str, name: str, source: Source) -> Split:
    chunks = source.chunks(name)
    if not chunks:
        refuse_without_rows(job, data, name, source)
        expected = f"splits with rows to measure, and there is none of {name!r}; {nearest(name, source.splits())}"
        raise misfit(job, f"data.{data}.measure", list(job.data[data].measure), expected)
    return Split(data, name, chunks)


def _refuse_one_id(job: Job, data: str, source: Source) -> None:
    """ContractError where different rows have one id: states of some would stand for those of others."""
    spec, found = job.data[data], dict[str, Chunk]()
    for split in dict.fromkeys((spec.train, *_measured(spec))):
        for chunk in source.chunks(split):
            first = found.setdefault(chunk.id, chunk)
            if replace(first, url=chunk.url) != chunk:
                file = f"{type(source).__module__.replace('.', '/')}.py"
                raise ContractError(
                    f"{file}: chunks(): id {chunk.id} stands for {_of(first)} and for {_of(chunk)}: expected a digest "
                    "of all that decides which rows a chunk has"
                )


def _of(chunk: Chunk) -> str:
    return f"{chunk.split!r} of {chunk.url}, groups {chunk.start} to {chunk.stop - 1}"


def _measured(spec: DataSpec) -> tuple[str, ...]:
    return tuple(dict.fromkeys(spec.measure))
