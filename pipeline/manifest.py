"""The manifest of a run: what was measured, how completely, and which objects are its tables. Storing it is the commit.

Layer 1. Nothing in it differs between two drivers of the same run (no time, host or process), so that whichever of them
stores it first, it is the same bytes.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any, NamedTuple

from pipeline.counted import counted
from pipeline.errors import SpoiltObject, StoreError
from pipeline.store import MissingObject, Store

FORMAT = 1
NAME = "_manifest.json"
# manifests are small, and a bucket takes 10 to 100 ms to give one
READERS = 16
# what can change a table's bytes
PACKAGES = ("neuron-census", "torch", "numpy", "pyarrow")


@dataclass(frozen=True)
class Coverage:
    """The ledger of rows of one split: read + unreadable + excluded = total, or SpoiltObject."""

    total: int
    read: int
    unreadable: int = 0
    excluded: int = 0

    def __post_init__(self) -> None:
        if min(self.total, self.read, self.unreadable, self.excluded) < 0 or self.accounted != self.total:
            raise SpoiltObject(f"the ledger of rows does not add up: {self}; run `neuron-census verify --deep`")

    @property
    def accounted(self) -> int:
        """Rows that are in the ledger, whatever became of them."""
        return self.read + self.unreadable + self.excluded

    @classmethod
    def agreed(cls, name: str, seen: Sequence[Coverage], *, total: int) -> Coverage:
        """The one coverage that every model of the split `name` reports; StoreError unless it is of `total` rows."""
        if any(one != seen[0] or one.total != total for one in seen):
            distinct = ", ".join(sorted({str(one) for one in seen}))
            raise StoreError(
                f"the ledgers of {name} ({counted(total, 'row')}) differ between models: {distinct}; "
                "run `neuron-census verify --deep`"
            )
        return seen[0]


@dataclass(frozen=True)
class File:
    """One object of a table: SHA-256 as stored, and the range of model ids that its rows belong to."""

    table: str
    key: str
    sha256: str
    bytes: int
    rows: int
    first_model: str
    last_model: str


@dataclass(frozen=True)
class Failed:
    """A model that failed by itself, and why."""

    model: str
    name: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """The resolved job and everything that a reader needs to find, check and judge its tables.

    `coverage` is by "data/split"; `statistics` maps each name to the identity of its version and parameters.
    """

    run: str
    name: str
    job: Mapping[str, Any]
    models: tuple[str, ...]
    failed: tuple[Failed, ...]
    coverage: Mapping[str, Coverage]
    versions: Mapping[str, str]
    statistics: Mapping[str, str]
    files: tuple[File, ...]
    format: int = FORMAT

    def files_of(self, table: str) -> tuple[File, ...]:
        """The objects of one table, in order of their models."""
        return tuple(file for file in self.files if file.table == table)


class Committed(NamedTuple):
    """The manifest of a run and when it was stored, in UTC: by the store's one clock, which a copy may set anew.

    The run's logs know no better: their names have when a driver began, to the second and by its own clock.
    """

    manifest: Manifest
    when: datetime


def versions() -> dict[str, str]:
    """Versions of what can change a table's bytes."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def manifest_key(run: str) -> str:
    """Where the manifest of a run is stored."""
    return f"runs/{run}/{NAME}"


def encode(manifest: Manifest) -> bytes:
    """The manifest as canonical JSON, one entry a line."""
    return (json.dumps(asdict(manifest), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def decode(content: bytes, *, key: str = NAME) -> Manifest:
    """Read a manifest back; SpoiltObject if it is damaged, or of a newer format than this program knows."""
    try:
        value = json.loads(content)
    except ValueError as error:
        raise _damaged(key, error) from error
    return from_json(value, key=key)


def from_json(value: Any, *, key: str = NAME) -> Manifest:
    """The manifest that a decoded JSON object stands for; SpoiltObject as for `decode`."""
    try:
        if value["format"] > FORMAT:
            raise SpoiltObject(
                f"{key} has format {value['format']}, newer than {FORMAT}: update neuron-census to read it"
            )
        return Manifest(
            **{
                **value,
                "models": tuple(value["models"]),
                "failed": tuple(Failed(**one) for one in value["failed"]),
                "coverage": {name: Coverage(**one) for name, one in value["coverage"].items()},
                "files": tuple(File(**one) for one in value["files"]),
            }
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(key, error) from error


def _damaged(key: str, error: Exception) -> SpoiltObject:
    return SpoiltObject(
        f"{key} is damaged ({type(error).__name__}: {error}); restore it, or remove the run's folder and run again"
    )


def committed_runs(store: Store) -> list[Committed]:
    """The manifest of every committed run and when it was stored, oldest first."""
    return read_manifests(store, commits(store))


def commits(store: Store) -> dict[str, datetime]:
    """The id of every committed run and when its manifest was stored.

    By a small listing of each: one of all would go through the rows of every model, which stay for a while.
    """
    return commits_among(store, store.folders("runs/"))


def commits_among(store: Store, runs: Iterable[str]) -> dict[str, datetime]:
    """Those of the given runs that are committed, with when their manifests were stored, by a small listing of each."""
    with ThreadPoolExecutor(READERS) as pool:
        listings = pool.map(store.modified, [manifest_key(run) for run in runs])
        return {run: when for found in listings for run, when in _of_manifests(found).items()}


def read_sound(store: Store, found: Mapping[str, datetime]) -> tuple[list[Committed], dict[str, str]]:
    """The manifests of the given runs in order, each with its time, and what is wrong with those that are spoilt."""

    def read(run: str) -> Manifest | str:
        try:
            return read_manifest(store, run)
        except (SpoiltObject, MissingObject) as error:
            return str(error)

    with ThreadPoolExecutor(READERS) as pool:
        manifests = dict(zip(found, pool.map(read, found), strict=True))
    sound = in_order(Committed(one, found[run]) for run, one in manifests.items() if isinstance(one, Manifest))
    return sound, {run: one for run, one in sorted(manifests.items()) if isinstance(one, str)}


def read_manifests(store: Store, found: Mapping[str, datetime]) -> list[Committed]:
    """The manifests of the given runs, each with its time, in order of time and run."""
    with ThreadPoolExecutor(READERS) as pool:
        manifests = pool.map(lambda run: read_manifest(store, run), found)
        return in_order(Committed(*one) for one in zip(manifests, found.values(), strict=True))


def read_manifest(store: Store, run: str) -> Manifest:
    """The manifest of a committed run; SpoiltObject as for `decode`, and if it is another run's."""
    key = manifest_key(run)
    manifest = decode(store.get(key), key=key)
    if manifest.run != run:
        raise SpoiltObject(f"{key} is the manifest of run {manifest.run}; restore it, or remove it and run again")
    return manifest


def in_order(runs: Iterable[Committed]) -> list[Committed]:
    """Runs in order of their commits; of the same time, in order of their ids."""
    return sorted(runs, key=lambda one: (one.when, one.manifest.run))


def _of_manifests(found: Mapping[str, datetime]) -> dict[str, datetime]:
    """The runs whose manifests are among the keys of a listing."""
    keys = {key: key.split("/") for key in found}
    return {parts[1]: found[key] for key, parts in keys.items() if parts[2:] == [NAME]}
