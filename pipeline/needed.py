"""What runs need of a store, as they claim it, and what of it is known while garbage is removed.

Layer 5: only reads. Of a run that does not say what it needs, everything is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.claims import Claims, claims_key, read_claims
from pipeline.manifest import manifest_key, read_manifest
from pipeline.store import MissingObject, Store, Stored

# claims are small, and a bucket takes 10 to 100 ms to give one
READERS = 16
# what a census stores, for as long as somebody needs it; digests of the lengths that `digest` is asked for
_OWN = re.compile(
    r"""
    models/[0-9a-f]{32}\.safetensors
    | states/[0-9a-f]{32}/[^/]+-[0-9a-f]+/[0-9a-f]{32}\.safetensors
    | training/[0-9a-f]{32}/\d+\.safetensors
    | runs/[0-9a-f]{16}/(_\w+\.json|(log|reduced|tables)/.+)
    | (probe|gc)-[0-9a-f]{32}
    """,
    re.VERBOSE,
)

Objects = Mapping[str, Stored]


def own(store: Store, prefix: str) -> Objects:
    """What a census has stored below a prefix: whatever else lies there is somebody's own."""
    return {key: stored for key, stored in store.listing(prefix).items() if _OWN.fullmatch(key)}


@dataclass(frozen=True)
class Needed:
    """What runs have claimed: checkpoints and cells, every cell of some models, or more than is known."""

    checkpoints: frozenset[str] = frozenset()
    cells: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()
    unknown: bool = False

    @classmethod
    def by(cls, claims: Claims) -> Needed:
        """What a run needs that claims this."""
        cells = (f"{state}/{chunk}" for states, chunks in claims.cells for state in states for chunk in chunks)
        return cls(frozenset(claims.checkpoints), frozenset(cells))

    @classmethod
    def all_of(cls, several: Sequence[Needed]) -> Needed:
        """What several need together."""
        return cls(
            frozenset().union(*(one.checkpoints for one in several)),
            frozenset().union(*(one.cells for one in several)),
            frozenset().union(*(one.models for one in several)),
            any(one.unknown for one in several),
        )

    def holds(self, key: str) -> bool:
        """Whether a run may read this checkpoint or cell."""
        kind, model, *rest = key.removesuffix(".safetensors").split("/")
        if self.unknown or model in self.models:
            return True
        return model in self.checkpoints and (kind == "models" or "/".join(rest) in self.cells)


class Doomed:
    """What is about to be removed; a run of which more than its reduced rows is, was left unfinished."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        parts = (key.split("/") for key in objects if key.startswith("runs/"))
        self._left = {run for _, run, kind, *_ in parts if kind != "reduced"}

    def was_left(self, run: str) -> bool:
        """Whether the run is to go."""
        return run in self._left

    def is_all(self, objects: Objects) -> bool:
        """Whether these are doomed one and all, and nothing has been stored in the place of one."""
        return all(self._objects.get(key) == stored for key, stored in objects.items())


class Claimed:
    """What runs claim while `doomed` is removed.

    The claims of a run never change: a look lists the names of runs, and reads what those say that are not known yet.
    """

    def __init__(self, store: Store, doomed: Doomed) -> None:
        self._store = store
        self._doomed = doomed
        self._known: set[str] = set()
        self._needed = Needed()
        self._is_unknown = False

    def look(self) -> None:
        """Learn what runs claim that have been begun, or taken up, since the last look."""
        runs = [run for run in self._store.folders("runs/") if run not in self._known]
        with ThreadPoolExecutor(READERS) as pool:
            said = dict(zip(runs, pool.map(self._needs, runs), strict=True))
        found = {run: needs for run, needs in said.items() if needs is not None and not needs.unknown}
        self._is_unknown = any(needs is not None and needs.unknown for needs in said.values())
        self._known |= found.keys()
        if found:
            self._needed = Needed.all_of([self._needed, *found.values()])

    def holds(self, key: str) -> bool:
        """Whether a run may read this checkpoint or cell, as far as the last look says."""
        return self._is_unknown or self._needed.holds(key)

    def _needs(self, run: str) -> Needed | None:
        """What a run needs; None where there is none, or one that is to go and has not gone on since."""
        objects = own(self._store, f"runs/{run}/")
        if not objects or (self._doomed.was_left(run) and self._doomed.is_all(objects)):
            return None
        try:
            if claims_key(run) in objects:
                return Needed.by(read_claims(self._store, run))
        except MissingObject:
            return Needed(unknown=True)
        if manifest_key(run) in objects:
            return Needed(models=frozenset(read_manifest(self._store, run).models))
        return Needed(unknown=True)
