"""Find and remove what no run needs any more: garbage is named first, with the reason, and removed only when asked to.

Layer 5. Nothing is garbage that is younger than an age, that a committed run or an open one has claimed, or that is not
called as a census calls what it stores: a store may lie among other things, and who says `gc` may have said the wrong
place. A run is open while anything that it wrote is younger than the age; whoever takes one up that was left writes so
first. Whoever still misses what was removed measures it again: a missing cell is not done, never empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import PurePosixPath
from typing import NamedTuple

from pipeline.claims import NAME as CLAIMS
from pipeline.claims import Claims, claims_key, log_prefix, read_claims
from pipeline.errors import StoreError
from pipeline.manifest import manifest_key, read_manifest
from pipeline.store import Store, Stored

DEFAULT_AGE = timedelta(days=7)
# two clocks that differ by more are worth a word
CLOCKS_AGREE = timedelta(hours=1)
# what a census stores, for as long as somebody needs it; digests of the lengths that `digest` is asked for
_OWN = re.compile(
    r"""
    models/[0-9a-f]{32}\.safetensors
    | states/[0-9a-f]{32}/[^/]+-[0-9a-f]+/[0-9a-f]{32}\.safetensors
    | training/[0-9a-f]{32}/\d+\.safetensors
    | runs/[0-9a-f]{16}/(_\w+\.json|(log|reduced|tables)/.+)
    | probe-[0-9a-f]{32}
    """,
    re.VERBOSE,
)

Objects = Mapping[str, Stored]


@dataclass(frozen=True)
class Garbage:
    """Something that nobody needs: an object, or the draft of one by a writer that was killed."""

    key: str
    stored: Stored
    reason: str
    is_draft: bool = False


@dataclass(frozen=True)
class _Needed:
    """What runs have claimed: checkpoints and cells, every cell of some models, or more than is known."""

    checkpoints: frozenset[str] = frozenset()
    cells: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()
    unknown: bool = False

    @classmethod
    def by(cls, claims: Claims) -> _Needed:
        cells = (f"{state}/{chunk}" for states, chunks in claims.cells for state in states for chunk in chunks)
        return cls(frozenset(claims.checkpoints), frozenset(cells))

    @classmethod
    def all_of(cls, several: Sequence[_Needed]) -> _Needed:
        return cls(
            frozenset().union(*(one.checkpoints for one in several)),
            frozenset().union(*(one.cells for one in several)),
            frozenset().union(*(one.models for one in several)),
            any(one.unknown for one in several),
        )

    def claim(self, key: str) -> bool:
        """Whether it is a checkpoint or cell that a run may read."""
        return key.startswith(("models/", "states/")) and self.holds(key)

    def holds(self, key: str) -> bool:
        """Whether a run may read this checkpoint or cell."""
        kind, model, *rest = key.removesuffix(".safetensors").split("/")
        if self.unknown or model in self.models:
            return True
        return model in self.checkpoints and (kind == "models" or "/".join(rest) in self.cells)


class Clock(NamedTuple):
    """What time it is, and what a person should know of how that is known."""

    now: datetime
    remark: str | None = None


def clock(store: Store, *, removes: bool) -> Clock:
    """The time by the store's own clock, which ages are judged by: that of an object written for it.

    A store that can only be read shows no clock, so there it is this machine's, and nothing can be removed by it:
    StoreError for one who `removes`. StoreError also if there is no store.
    """
    _refuse_nothing(store)
    try:
        now = store.now()
    except StoreError:
        if removes:
            raise
        return Clock(datetime.now(UTC), "the store cannot be written: ages are by the clock of this machine")
    ahead = datetime.now(UTC) - now
    if abs(ahead) <= CLOCKS_AGREE:
        return Clock(now)
    differ = f"{abs(ahead).total_seconds() / 3600:.1f} hours {'ahead of' if ahead > timedelta() else 'behind'}"
    return Clock(now, f"the clock of this machine is {differ} the store's, by which ages are judged")


def find_garbage(store: Store, *, age: timedelta = DEFAULT_AGE, now: datetime | None = None) -> list[Garbage]:
    """Everything older than `age` that no run needs, in order of its keys; nothing is removed.

    `now` is the time by the store's clock. StoreError if there is no store: its name is mistyped.
    """
    _refuse_nothing(store)
    before = (now or store.now()) - age
    runs: dict[str, dict[str, Stored]] = {}
    for key, stored in _own(store, "runs/").items():
        runs.setdefault(key.split("/")[1], {})[key] = stored
    parts = {**_own(store, "models/"), **_own(store, "states/")}
    judged = [_judged(store, run, objects, parts, before) for run, objects in runs.items()]
    needed = _Needed.all_of([needs for needs, _ in judged])
    found = [one for _, garbage in judged for one in garbage]
    found += _unneeded(parts, needed, before)
    trainings, checks, drafts = _own(store, "training/"), _own(store, "probe-"), store.drafts()
    found += _left_trainings(trainings, before)
    found += [Garbage(key, stored, "left by a check of the store that was killed") for key, stored in checks.items()]
    killed = "left by a write that was killed"
    found += [Garbage(name, stored, killed, is_draft=True) for name, stored in drafts.items()]
    return sorted((one for one in found if one.stored.when < before), key=lambda one: one.key)


def _refuse_nothing(store: Store) -> None:
    if not (store.folders("") or _own(store, "probe-") or store.drafts()):
        raise StoreError(f"{store.url}: holds nothing; `neuron-census run JOB.toml --store …` makes a store")


def _own(store: Store, prefix: str) -> Objects:
    """What a census has stored below a prefix: whatever else lies there is somebody's own."""
    return {key: stored for key, stored in store.listing(prefix).items() if _OWN.fullmatch(key)}


def remove_garbage(store: Store, found: Sequence[Garbage]) -> Iterator[Garbage]:
    """Remove what was found and yield it, but for what a run has claimed since, and runs that have gone on since."""
    doomed = {one.key: one.stored for one in found}
    claims = [key for key in _own(store, "runs/") if key.endswith(f"/{CLAIMS}")]
    kept = [key for key in claims if key not in doomed or _goes_on(store, key.split("/")[1], doomed)]
    needed = _Needed.all_of([_Needed.by(read_claims(store, key.split("/")[1])) for key in kept])
    # of a run it is asked at its first object, because what comes before may take hours to remove
    goes_on = cache(lambda run: _goes_on(store, run, doomed))
    # checkpoints last: a cell without one, where the removal ended early, would be of weights that nobody knows
    for one in sorted(found, key=lambda one: one.key.startswith("models/")):
        kind, _, rest = one.key.partition("/")
        run = rest.split("/")[0]
        if not one.is_draft and (
            goes_on(run) or _goes_on(store, run, doomed, below=log_prefix(run))
            if kind == "runs"
            else needed.claim(one.key)
        ):
            continue
        if one.is_draft:
            store.clear(one.key)
        else:
            store.remove(one.key)
        yield one


def _goes_on(store: Store, run: str, doomed: Objects, *, below: str = "") -> bool:
    """Whether a run that was left unfinished has stored something since: its commit may name what is doomed.

    Whoever takes it up writes a log before all else: to list those (`below`) is enough once everything has been.
    """
    own = f"runs/{run}/"
    was_left = any(key.startswith(own) and not key.startswith(f"{own}reduced/") for key in doomed)
    return was_left and any(doomed.get(key) != stored for key, stored in store.listing(below or own).items())


def _unneeded(parts: Objects, needed: _Needed, before: datetime) -> Iterator[Garbage]:
    """Checkpoints and cells that no run claims; no checkpoint of which a cell is too young to go."""
    young = {key.split("/")[1] for key, stored in parts.items() if key.startswith("states/") and stored.when >= before}
    for key, stored in parts.items():
        if not needed.holds(key) and not (key.startswith("models/") and PurePosixPath(key).stem in young):
            yield Garbage(key, stored, "no run needs it")


def _left_trainings(objects: Objects, before: datetime) -> list[Garbage]:
    """What trainings would go on from that have not gone on for longer than the age: they can begin anew."""
    last: dict[str, datetime] = {}
    for key, stored in objects.items():
        lineage = key.split("/")[1]
        last[lineage] = max(stored.when, last.get(lineage, stored.when))
    left = {key: last[key.split("/")[1]] for key in objects}
    return [
        Garbage(key, stored, f"of a training that was left unfinished on {left[key]:%Y-%m-%d}")
        for key, stored in objects.items()
        if left[key] < before
    ]


def _judged(
    store: Store, run: str, objects: Objects, parts: Objects, before: datetime
) -> tuple[_Needed, list[Garbage]]:
    """What a run needs, and what of its own objects nobody does."""
    if manifest_key(run) in objects:
        return _of_committed(store, run, objects, before)
    return _of_open(store, run, objects, parts, before)


def _of_committed(store: Store, run: str, objects: Objects, before: datetime) -> tuple[_Needed, list[Garbage]]:
    if claims_key(run) in objects:
        needed = _Needed.by(read_claims(store, run))
    else:
        needed = _Needed(models=frozenset(read_manifest(store, run).models))
    if objects[manifest_key(run)].when >= before:
        # another driver of the same run may still be reading the rows of its models
        return needed, []
    reduced = [(key, stored) for key, stored in objects.items() if key.startswith(f"runs/{run}/reduced/")]
    return needed, [Garbage(key, stored, "its rows are in the tables of the committed run") for key, stored in reduced]


def _of_open(
    store: Store, run: str, objects: Objects, parts: Objects, before: datetime
) -> tuple[_Needed, list[Garbage]]:
    if claims_key(run) not in objects:
        needed, written = _Needed(unknown=True), list(objects.values())
    else:
        needed = _Needed.by(read_claims(store, run))
        written = [*objects.values(), *(stored for key, stored in parts.items() if needed.holds(key))]
    last = max(stored.when for stored in written)
    if last >= before:
        return needed, []
    reason = f"of a run that was left unfinished on {last:%Y-%m-%d}"
    return _Needed(), [Garbage(key, stored, reason) for key, stored in objects.items()]
