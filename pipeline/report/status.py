"""The runs of a store, finished or not.

Layer 5.
"""

from __future__ import annotations

from rich.console import Console

from pipeline.errors import StoreError
from pipeline.manifest import Manifest, committed_runs
from pipeline.report.printing import fitted, size
from pipeline.store import Store


def print_status(store: Store, console: Console) -> None:
    """Print a line for every run. StoreError if there is none."""
    committed = committed_runs(store)
    done = {manifest.run for manifest, _ in committed}
    begun = sorted({key.split("/")[1] for key in store.keys("runs/")} - done)
    if not committed and not begun:
        raise StoreError(f"{store.url}: holds no run; `neuron-census run JOB.toml --store …` makes one")
    columns = ("run", "job", "committed (UTC)", "models", "failed", "rows", "tables")
    rows = [_line(manifest, f"{when:%Y-%m-%d %H:%M}") for manifest, when in committed]
    rows += [(run, None, "not yet: run its job again", None, None, None, None) for run in begun]
    console.print(fitted(columns, rows, width=console.width))


def _line(manifest: Manifest, when: str) -> tuple[str | int | None, ...]:
    read = sum(one.read for one in manifest.coverage.values())
    stored = size(sum(file.bytes for file in manifest.files))
    return manifest.run, manifest.name, when, len(manifest.models), len(manifest.failed), read, stored
