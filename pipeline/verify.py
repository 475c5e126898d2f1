"""Check committed runs against what is stored: hashes, row counts, ledgers, receipts.

Layer 5: only reads. What is wrong is said; nothing is repaired.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cells import checkpoint_of
from pipeline.counted import counted
from pipeline.errors import StoreError
from pipeline.hashing import sha256
from pipeline.manifest import File, Manifest, commits, read_sound
from pipeline.models.base import checkpoint_key
from pipeline.parquet import read_parquet
from pipeline.query import among
from pipeline.store import MissingObject, Store

# tables that are looked into; of the others the hash says enough
_WHOLE = ("models", "receipts")
_LEDGER = ("total", "rows", "unreadable", "excluded")


@dataclass(frozen=True)
class Report:
    """What checking one run found: `problems` are wrong, `remarks` are worth knowing."""

    run: str
    summary: str
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


def verify_runs(store: Store, *, run: str | None = None, deep: bool = False) -> Iterator[Report]:
    """Check every committed run, or the one whose id begins with `run`; `deep` hashes cells and checkpoints too."""
    found = commits(store)
    sound, spoilt = read_sound(store, {one: found[one] for one in among(store, list(found), run)})
    for one, wrong in spoilt.items():
        yield Report(one, f"run {one}: 1 wrong", (wrong,), ())
    for manifest, _ in sound:
        yield verify_run(store, manifest, deep=deep)


def verify_run(store: Store, manifest: Manifest, *, deep: bool = False) -> Report:
    """Check one run: every file of the manifest, no file besides, every row in the ledger, every receipt."""
    problems: list[str] = []
    read: set[str] = set()
    tables: dict[str, list[pa.Table]] = {}
    for file in manifest.files:
        content, wrong = _checked(store, file)
        problems += wrong
        if content is not None and file.table in _WHOLE:
            read.add(file.key)
            tables.setdefault(file.table, []).append(read_parquet(content))
    problems += _unlisted(store, manifest)
    receipts, models = _rows(tables.get("receipts", [])), _rows(tables.get("models", []))
    problems += _unbalanced(manifest, receipts)
    # of a table that cannot be read, that is said already
    if {file.key for file in manifest.files if file.table in _WHOLE} <= read:
        problems += [*_other_models(manifest, models), *_without_receipt(manifest, models, receipts)]
        problems += _without_rows(manifest, models, receipts)
    hashed = 0
    if deep:
        weights = {str(model["model"]): str(model["sha256"]) for model in models if model["sha256"] is not None}
        hashed = len(weights) + len(receipts)
        for model, expected in sorted(weights.items()):
            problems += _rehash(store, checkpoint_key(model), expected)
        for receipt in sorted(receipts, key=lambda one: str(one["key"])):
            problems += _rehash(store, receipt["key"], receipt["sha256"], weights=weights.get(receipt["model"]))
    rows = sum(file.rows for file in manifest.files)
    summary = f"run {manifest.run} ({manifest.name}): {counted(len(manifest.files), 'file')}, {counted(rows, 'row')}"
    summary += f", {hashed} cells and checkpoints" if deep else ""
    verdict = f": {len(problems)} wrong" if problems else ": sound"
    return Report(manifest.run, summary + verdict, tuple(problems), tuple(_remarks(manifest, receipts)))


def _checked(store: Store, file: File) -> tuple[bytes | None, list[str]]:
    """The content of a file if it is the one that was committed, and what is wrong with it."""
    try:
        content = store.get(file.key)
    except MissingObject:
        return None, [f"{file.key} is missing"]
    if sha256(content) != file.sha256:
        return None, [f"{file.key} was changed: SHA-256 {sha256(content)}, committed {file.sha256}"]
    rows = pq.read_metadata(io.BytesIO(content)).num_rows
    if (len(content), rows) != (file.bytes, file.rows):
        said = f"the manifest says {file.bytes} and {file.rows}"
        return None, [f"{file.key} has {counted(len(content), 'byte')} and {counted(rows, 'row')}, {said}"]
    return content, _beyond(file, content)


def _beyond(file: File, content: bytes) -> list[str]:
    """Rows of models outside the range that the manifest gives, which a question about them would not look for."""
    ids = pq.ParquetFile(io.BytesIO(content), pre_buffer=False).read(columns=["model"], use_threads=False)["model"]
    found = pc.min_max(ids).as_py()
    if not len(ids) or file.first_model <= found["min"] <= found["max"] <= file.last_model:
        return []
    said = f"the manifest says {file.first_model} to {file.last_model}"
    return [f"{file.key} has rows of models {found['min']} to {found['max']}, {said}"]


def _unlisted(store: Store, manifest: Manifest) -> list[str]:
    listed = {file.key for file in manifest.files}
    prefix = f"runs/{manifest.run}/tables/"
    return [f"{key} is not in the manifest" for key in store.keys(prefix) if key not in listed]


def _rows(tables: list[pa.Table]) -> list[dict[str, Any]]:
    return [row for table in tables for row in table.to_pylist()]


def _unbalanced(manifest: Manifest, receipts: list[dict[str, Any]]) -> list[str]:
    """Every receipt adds up, and those of each model, split and statistic to the split's coverage."""
    problems = []
    sums: dict[tuple[str, str, str], Counter[str]] = {}
    for receipt in receipts:
        total, read, unreadable, excluded = (receipt[name] for name in _LEDGER)
        if read + unreadable + excluded != total:
            problems.append(
                f"receipt of {receipt['key']}: {read} + {unreadable} + {excluded} is not {counted(total, 'row')}"
            )
        split = f"{receipt['data']}/{receipt['split']}"
        ledger = sums.setdefault((receipt["model"], split, receipt["statistic"]), Counter())
        ledger.update({"total": total, "read": read, "unreadable": unreadable, "excluded": excluded})
    for (model, split, statistic), ledger in sums.items():
        coverage = manifest.coverage.get(split)
        if coverage is None:
            problems.append(f"model {model} has receipts for {split}, which the manifest does not cover")
        elif any(ledger[name] != getattr(coverage, name) for name in ("total", "read", "unreadable", "excluded")):
            problems.append(
                f"model {model}, {split}, {statistic}: receipts say {dict(ledger)}, the manifest {coverage}"
            )
    return problems


def _other_models(manifest: Manifest, models: list[dict[str, Any]]) -> Iterator[str]:
    """Every model of the manifest has one row in the table of models, which says the same of its failure."""
    rows_of, times_of = Counter(str(row["model"]) for row in models), Counter(manifest.models)
    for model in sorted({*times_of, *rows_of}):
        if rows_of[model] != times_of[model]:
            found, named = counted(rows_of[model], "row"), counted(times_of[model], "time")
            yield f"model {model} has {found} in models, the manifest names it {named}"
    failed = {str(row["model"]) for row in models if row["status"] == "failed"}
    for model in sorted(failed ^ {one.model for one in manifest.failed}):
        yield f"model {model} failed by {'the table of models' if model in failed else 'the manifest'} alone"


def _without_receipt(manifest: Manifest, models: list[dict[str, Any]], receipts: list[dict[str, Any]]) -> Iterator[str]:
    """Every model that did not fail has receipts of every statistic on every split of its data."""
    there = {(row["model"], f"{row['data']}/{row['split']}", row["statistic"]) for row in receipts}
    for row in models:
        splits = [name for name in manifest.coverage if name.rpartition("/")[0] == row["data"]]
        for split, statistic in ((split, one) for split in splits for one in sorted(manifest.statistics)):
            if row["status"] == "ok" and (row["model"], split, statistic) not in there:
                yield f"model {row['model']} has no receipt of {statistic} on {split}"


def _without_rows(manifest: Manifest, models: list[dict[str, Any]], receipts: list[dict[str, Any]]) -> Iterator[str]:
    """No split is covered of which no model has a receipt."""
    there = {f"{receipt['data']}/{receipt['split']}" for receipt in receipts}
    measured = {str(model["data"]) for model in models if model["status"] == "ok"}
    for split in sorted(manifest.coverage.keys() - there):
        # of the data of a model that was measured, that is said of each of its statistics
        if split.rpartition("/")[0] not in measured:
            yield f"the manifest covers {split}, of which no model has a receipt"


def _rehash(store: Store, key: str, expected: str, *, weights: str | None = None) -> list[str]:
    """An object is the one that the run was made from; a cell also of the `weights` that the run names."""
    try:
        content = store.get(key)
        if (found := sha256(content)) != expected:
            return [f"{key} was changed: SHA-256 {found}, at the time of the run {expected}"]
        if weights is not None and (measured := checkpoint_of(content, key=key)) != weights:
            return [f"{key} was measured on other weights: SHA-256 {measured}, those of the run {weights}"]
    except StoreError as error:
        return [str(error)]
    return []


def _remarks(manifest: Manifest, receipts: list[dict[str, Any]]) -> list[str]:
    remarks = []
    devices = Counter(str(receipt["device"]) for receipt in receipts)
    if len(devices) > 1:
        mix = ", ".join(f"{counted(count, 'cell')} on {device}" for device, count in sorted(devices.items()))
        remarks.append(f"computed on different devices, whose float32 results differ in their last bits: {mix}")
    for name, coverage in sorted(manifest.coverage.items()):
        if coverage.unreadable:
            remarks.append(f"{name}: {coverage.unreadable} of {coverage.total} rows could not be read")
    remarks += [f"model {one.name} failed: {one.reason}" for one in manifest.failed]
    return remarks
