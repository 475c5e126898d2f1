"""What a job names, looked up: its statistics, the entries of its models, its sources; all mistakes are said at once.

Layer 3. Touches no data and no store.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.entries import LoadEntry, TrainEntry, entries_of
from pipeline.errors import JobError, Mistakes
from pipeline.job import Job, misfit, read_job, unknown
from pipeline.registry import sources, statistics
from pipeline.sources.base import Source
from pipeline.statistics.base import Statistic
from pipeline.store import Store


class Named(NamedTuple):
    """What the names of a job stand for; sources by the name of their data set."""

    statistics: tuple[Statistic, ...]
    entries: list[TrainEntry | LoadEntry]
    sources: dict[str, Source]


def checked_job(path: str | Path, store: Store) -> Job:
    """Read a job file. JobError with one line for all that is wrong in it, as far as neither data nor store tells."""
    asked = read_job(path)
    if asked.job is None:
        raise JobError("\n".join(asked.mistakes))
    mistakes = Mistakes(asked.mistakes)
    _look_up(asked.job, store, mistakes, lost=asked.lost)
    mistakes.refuse()
    return asked.job


def look_up(job: Job, store: Store) -> Named:
    """What a job names. JobError with one line for each name or parameter that is not."""
    mistakes = Mistakes()
    named = _look_up(job, store, mistakes)
    mistakes.refuse()
    return named


def _look_up(job: Job, store: Store, mistakes: Mistakes, *, lost: Collection[int] = ()) -> Named:
    """What can be looked up, with the mistakes noted; nothing is said of `lost` entries."""
    named = Named((), [], {})
    for name, spec in job.data.items():
        with mistakes.noted():
            if spec.source not in sources():
                raise unknown(job, f"data.{name}.source", spec.source, sources())
            named.sources[name] = sources()[spec.source](name, spec, store)
    for index in range(len(job.models)):
        with mistakes.noted():
            named.entries.extend(() if index in lost else entries_of(job, index))
    return named._replace(statistics=_statistics(job, mistakes))


def _statistics(job: Job, mistakes: Mistakes) -> tuple[Statistic, ...]:
    known = statistics()
    found: list[Statistic] = []
    for name in sorted(job.statistics or known):
        with mistakes.noted():
            if name not in known:
                raise unknown(job, "statistics", name, known)
            found.append(_parametrised(job, known[name], job.statistics.get(name, {})))
    return tuple(found)


def _parametrised(job: Job, statistic: Statistic, given: Mapping[str, Any]) -> Statistic:
    settable = {name: value for name, value in statistic.parameters.items() if name != "sample_shift"}
    mistakes = Mistakes()
    for name, value in given.items():
        key = f"statistics.{statistic.name}.{name}"
        with mistakes.noted():
            if name not in settable:
                raise unknown(job, key, name, settable)
            default = settable[name]
            if default is not None and type(value) is not type(default):
                raise misfit(job, key, value, f"a value like {default!r}")
            if expected := statistic.expected(name, value):
                raise misfit(job, key, value, expected)
    mistakes.refuse()
    return replace(statistic, **given)
