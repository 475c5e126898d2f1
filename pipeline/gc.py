"""Find and remove what no run needs any more: garbage is named first, with the reason, and removed only when asked to.

Layer 5. Nothing is garbage that is younger than an age, that a committed run or an open one has claimed, or that is not
called as a census calls what it stores: a store may lie among other things, and who says `gc` may have said the wrong
place. A run is open while anything that it wrote is younger than the age; whoever takes one up that was left writes so
first. Runs go on meanwhile: what they claim is looked at again and again, and they commit nothing that was removed (see
`marks.py`). Whoever misses what was removed measures it again: a missing cell is not done, never empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import PurePosixPath
from typing import NamedTuple

from pipeline.claims import claims_key, log_prefix, read_claims
from pipeline.errors import StoreError
from pipeline.manifest import manifest_key, read_manifest
from pipeline.marks import DEAD, Mark
from pipeline.marks import PREFIX as MARKS
from pipeline.needed import Claimed, Doomed, Needed, Objects, own
from pipeline.store import Store, Stored

DEFAULT_AGE = timedelta(days=7)
# two clocks that differ by more are worth a word
CLOCKS_AGREE = timedelta(hours=1)


@dataclass(frozen=True)
class Garbage:
    """Something that nobody needs: an object, or the draft of one by a writer that was killed."""

    key: str
    stored: Stored
    reason: str
    is_draft: bool = False


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
    now = now or store.now()
    before = now - age
    runs: dict[str, dict[str, Stored]] = {}
    for key, stored in own(store, "runs/").items():
        runs.setdefault(key.split("/")[1], {})[key] = stored
    parts = {**own(store, "models/"), **own(store, "states/")}
    judged = [_judged(store, run, objects, parts, before) for run, objects in runs.items()]
    needed = Needed.all_of([needs for needs, _ in judged])
    found = [one for _, garbage in judged for one in garbage]
    found += _unneeded(parts, needed, before)
    found += _left_trainings(own(store, "training/"), before)
    checks, marks = own(store, "probe-"), own(store, MARKS)
    found += [Garbage(key, stored, "left by a check of the store that was killed") for key, stored in checks.items()]
    dead = {key: stored for key, stored in marks.items() if stored.when < now - DEAD}
    found += [Garbage(key, stored, "left by a gc that was killed") for key, stored in dead.items()]
    killed = "left by a write that was killed"
    found += [Garbage(name, stored, killed, is_draft=True) for name, stored in store.drafts().items()]
    return sorted((one for one in found if one.stored.when < before), key=lambda one: one.key)


def _refuse_nothing(store: Store) -> None:
    if not (store.folders("") or own(store, "probe-") or own(store, MARKS) or store.drafts()):
        raise StoreError(f"{store.url}: holds nothing; `neuron-census run JOB.toml --store …` makes a store")


def remove_garbage(store: Store, found: Sequence[Garbage]) -> Iterator[Garbage]:
    """Remove what was found and yield it, but for what a run has claimed since, and runs that have gone on since.

    What runs claim is looked at anew every LOOK_S, each time under a new mark. A run that claims behind a look finds
    the mark before it commits: see `marks.py` why nothing that a commit names is removed.
    """
    doomed = Doomed({one.key: one.stored for one in found if not one.is_draft})
    claimed, mark = Claimed(store, doomed), Mark(store)
    # a first look at many runs takes long, and whoever commits would wait for it under a mark
    claimed.look()
    # of a run it is asked at its first object, because what comes before may take hours to remove
    goes_on = cache(lambda run: _goes_on(store, run, doomed))
    try:
        # checkpoints last: a cell without one, where the removal ended early, would be of weights that nobody knows
        for one in sorted(found, key=lambda one: one.key.startswith("models/")):
            if one.is_draft:
                store.clear(one.key)
                yield one
                continue
            if mark.renew():
                claimed.look()
            kind, _, rest = one.key.partition("/")
            run = rest.split("/")[0]
            if kind == "runs" and (goes_on(run) or _goes_on(store, run, doomed, below=log_prefix(run))):
                continue
            if kind in ("models", "states") and claimed.holds(one.key):
                continue
            store.remove(one.key)
            yield one
    finally:
        mark.clear()


def _goes_on(store: Store, run: str, doomed: Doomed, *, below: str = "") -> bool:
    """Whether a run that was left unfinished has stored something since: its commit may name what is doomed.

    Whoever takes it up writes a log before all else: to list those (`below`) is enough once everything has been.
    """
    return doomed.was_left(run) and not doomed.is_all(own(store, below or f"runs/{run}/"))


def _unneeded(parts: Objects, needed: Needed, before: datetime) -> Iterator[Garbage]:
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


def _judged(store: Store, run: str, objects: Objects, parts: Objects, before: datetime) -> tuple[Needed, list[Garbage]]:
    """What a run needs, and what of its own objects nobody does."""
    if manifest_key(run) in objects:
        return _of_committed(store, run, objects, before)
    return _of_open(store, run, objects, parts, before)


def _of_committed(store: Store, run: str, objects: Objects, before: datetime) -> tuple[Needed, list[Garbage]]:
    if claims_key(run) in objects:
        needed = Needed.by(read_claims(store, run))
    else:
        needed = Needed(models=frozenset(read_manifest(store, run).models))
    if objects[manifest_key(run)].when >= before:
        # another driver of the same run may still be reading the rows of its models
        return needed, []
    reduced = [(key, stored) for key, stored in objects.items() if key.startswith(f"runs/{run}/reduced/")]
    return needed, [Garbage(key, stored, "its rows are in the tables of the committed run") for key, stored in reduced]


def _of_open(
    store: Store, run: str, objects: Objects, parts: Objects, before: datetime
) -> tuple[Needed, list[Garbage]]:
    if claims_key(run) not in objects:
        needed, written = Needed(unknown=True), list(objects.values())
    else:
        needed = Needed.by(read_claims(store, run))
        written = [*objects.values(), *(stored for key, stored in parts.items() if needed.holds(key))]
    last = max(stored.when for stored in written)
    if last >= before:
        return needed, []
    reason = f"of a run that was left unfinished on {last:%Y-%m-%d}"
    return Needed(), [Garbage(key, stored, reason) for key, stored in objects.items()]
