"""The runs of a store, finished or not.

Layer 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console

from pipeline.address import shown
from pipeline.counted import few
from pipeline.errors import StoreError, nearest
from pipeline.manifest import Manifest, commits, read_sound
from pipeline.report.printing import fitted, size
from pipeline.runlog import LeftOpen, left_open
from pipeline.store import Store

if TYPE_CHECKING:
    from pipeline.cluster.jobs import Submission


def print_status(store: Store, console: Console, run: str | None = None) -> None:
    """Print a line for every run, or for those whose id begins with `run`, with their failures. StoreError if none."""
    every = commits(store)
    found = {one: when for one, when in every.items() if one.startswith(run or "")}
    begun = sorted(_begun(store, run or "") - found.keys())
    if not found and not begun:
        known = every.keys() | _begun(store, "")
        if run and known:
            raise StoreError(f"{store.url}: holds no run whose id begins with {run!r}; {nearest(run, known)}")
        raise StoreError(f"{store.url}: holds no run; `neuron-census run JOB.toml --store …` makes one")
    committed, spoilt = read_sound(store, found)
    columns = ("run", "job", "committed (UTC)", "models", "failed", "rows", "tables")
    rows = [_line(manifest, f"{when:%Y-%m-%d %H:%M}") for manifest, when in committed]
    rows += [(run, None, "spoilt: verify says how", None, None, None, None) for run in spoilt]
    left = {one: left_open(store, one) for one in begun}
    rows += [(one, None, f"not yet: {_advice(reasons)}", None, None, None, None) for one, reasons in left.items()]
    console.print(fitted(columns, rows, width=console.width))
    for manifest, _ in committed if run else []:
        for failed in manifest.failed:
            console.print(f"{manifest.run}: model {failed.name} failed: {failed.reason}")
    for one, reasons in left.items() if run else []:
        for open_ in reasons:
            console.print(f"{one}: {few(open_.models, 'model')}: {open_.reason}")


def _advice(reasons: Sequence[LeftOpen]) -> str:
    """What an operator should do of a run that is not finished."""
    why = {one.why for one in reasons}
    first = "mend its data, then " if "unread" in why else "see verify, then " if "spoilt" in why else ""
    return f"{first}run its job again"


def _begun(store: Store, beginning: str) -> set[str]:
    """The runs of which anything is stored, and whose id begins so."""
    return {key.split("/")[1] for key in store.keys(f"runs/{beginning}")}


def print_submissions(submissions: Sequence[Submission], address: str, console: Console) -> None:
    """Print a line for every job. StoreError if there is none."""
    if not submissions:
        raise StoreError(
            f"{shown(address)}: no run was submitted there; `neuron-census submit JOB.toml --ray …` does it"
        )
    columns = ("run", "store", "status", "started (UTC)", "ended (UTC)", "says")
    rows = [
        (one.run, one.store, one.status, _minute(one.started), _minute(one.ended), one.message) for one in submissions
    ]
    console.print(fitted(columns, rows, width=console.width))


def _minute(when: datetime | None) -> str | None:
    return None if when is None else f"{when:%Y-%m-%d %H:%M}"


def _line(manifest: Manifest, when: str) -> tuple[str | int | None, ...]:
    read = sum(one.read for one in manifest.coverage.values())
    stored = size(sum(file.bytes for file in manifest.files))
    return manifest.run, manifest.name, when, len(manifest.models), len(manifest.failed), read, stored
