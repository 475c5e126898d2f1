"""The reduce task: merge one model's cells in plan order and write its rows of every table.

Layer 3. Reads each cell once, hashes it as stored, and adds up the ledger. A missing cell is not done, never empty.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from pipeline.arrow_bytes import ArrowStream
from pipeline.base_columns import BASE
from pipeline.cells import Rows
from pipeline.described import described, meanings, names_of
from pipeline.errors import StoreError
from pipeline.flow.discover import Discovery
from pipeline.jackknife import standard_errors
from pipeline.job_sections import Numerics, SiteSelection
from pipeline.loading import Loaded, Probe, keep_only, load
from pipeline.merging import Cells, Reading, grouped_sites
from pipeline.numerics import in_force
from pipeline.origins import columns_of, task_of
from pipeline.resolve import Split
from pipeline.rows.decode import UID_MASK
from pipeline.run_models import Model
from pipeline.running import States
from pipeline.scores import means
from pipeline.site_parts import tables_in_parts
from pipeline.site_table import site_table
from pipeline.sources.base import Chunk
from pipeline.statistics.base import Controls, Statistic
from pipeline.store import Store
from pipeline.tables import arrow_table
from pipeline.unit_tables import arrow_tables, controls_of


@dataclass(frozen=True)
class Measured:
    """One split that a model was measured on, with the statistics and the folders of their states."""

    split: Split
    statistics: tuple[Statistic, ...]
    state_names: Mapping[str, str]


@dataclass(frozen=True)
class ReduceTask:
    """Turn the cells of one model into its rows; of a model that failed, its `failure` into a row of `models`.

    `texts` are those of the files that make them, see `texts.py`.
    """

    run: str
    model: Model
    twin: Model | None
    failure: str | None
    measured: tuple[Measured, ...]
    probe: Probe
    numerics: Numerics
    sites: SiteSelection
    texts: Mapping[str, str]

    units: ClassVar[int] = 1

    def parts(self) -> tuple[()]:
        """Nothing: the task cannot be cut."""
        return ()

    @property
    def models(self) -> tuple[str, ...]:
        """Ids of the models that the task is about."""
        return (self.model.id,)


DONE = "_done.json"


def reduced_key(run: str, model: str, name: str) -> str:
    """Where an object of a model's reduced rows is stored; DONE is the record written last."""
    return f"runs/{run}/reduced/{model}/{name}"


def rows_key(run: str, model: str, table: str) -> str:
    """Where a model's reduced rows of a table are stored, as `arrow_bytes` has them."""
    return reduced_key(run, model, f"{table}.arrow.zst")


def run_reduce(task: ReduceTask, store: Store) -> None:
    """Store the model's rows of each table and then the record that says so."""
    coverage: dict[str, dict[str, int]] = {}
    streams: defaultdict[str, ArrowStream] = defaultdict(ArrowStream)
    if task.failure is None:
        with in_force(task.numerics):
            for name, table in _rows(task, store, coverage):
                streams[name].add(table)
    else:
        streams["models"].add(_model_row(task, {"status": "failed", "reason": task.failure}))
    files: dict[str, dict[str, int]] = {}
    store.put_all(_encoded(task, streams, files))
    record = json.dumps({"files": files, "coverage": coverage, "failure": task.failure}, sort_keys=True)
    store.put_once(reduced_key(task.run, task.model.id, DONE), record.encode())


def _rows(task: ReduceTask, store: Store, coverage: dict[str, dict[str, int]]) -> Iterator[tuple[str, pa.Table]]:
    """The model's rows with the name of their table, some at a time; each split's ledger is put into `coverage`."""
    keep_only([task.model.id, *([task.twin.id] if task.twin else [])])
    loaded = load(task.model, task.probe, task.sites, store)
    twin = load(task.twin, task.probe, task.sites, store).discovery if task.twin is not None else None
    record = loaded.checkpoint.record
    seen = {
        "parameters": sum(value.numel() for value in loaded.module.parameters()),
        "stopped": record.get("stopped"),
        "train_accuracy": record.get("train_accuracy"),
        "train_loss": record.get("train_loss"),
        "sha256": loaded.sha256,
        "status": "ok",
    }
    names = names_of(task.probe, store)
    sites = described(loaded.discovery, task.model, names)
    yield "models", _model_row(task, seen)
    yield "sites", site_table(sites, run=task.run, model=task.model.id, data=task.model.data)
    yield "curves", _curve_table(task, record.get("curve", []))
    yield "meanings", meanings(loaded, task.model, names, run=task.run)
    for measured in task.measured:
        receipts: list[dict[str, Any]] = []
        yield from _split_rows(task, measured, loaded, twin, store, receipts)
        rows = _ledger(task, measured, receipts)
        coverage[f"{measured.split.data}/{measured.split.name}"] = asdict(rows)


def _encoded(
    task: ReduceTask, streams: dict[str, ArrowStream], files: dict[str, dict[str, int]]
) -> Iterator[tuple[str, bytes]]:
    """The tables as they are stored, one at a time; what the record says of each is put into `files`."""
    for name in sorted(streams):
        stream = streams.pop(name)
        content = stream.close()
        files[name] = {"rows": stream.rows, "bytes": len(content)}
        yield rows_key(task.run, task.model.id, name), content


def _split_rows(
    task: ReduceTask,
    measured: Measured,
    loaded: Loaded,
    twin: Discovery | None,
    store: Store,
    receipts: list[dict[str, Any]],
) -> Iterator[tuple[str, pa.Table]]:
    """The rows of one split, of a few sites or a part of one at a time; what was read is put into `receipts`."""
    keys = {"run": task.run, "model": task.model.id, "data": measured.split.data, "split": measured.split.name}
    controls = controls_of(loaded.discovery, twin)
    cells = [
        Cells(task.model.id, loaded.sha256, one, measured.state_names[one.name], measured.split.chunks)
        for one in measured.statistics
    ]
    reading = Reading(loaded.discovery.sites, store, receipts)
    classes = task_of(task.model.origin).outputs
    for group in grouped_sites(loaded.discovery, measured.statistics, classes):
        if group.is_wide:
            site = group.sites[0]
            tables = tables_in_parts(site, reading, cells, keys=keys, controls=controls[site.name], classes=classes)
        else:
            part = replace(loaded.discovery, sites=group.sites)
            tables = _tables_at_once(part, reading, cells, keys=keys, controls=controls)
        for name, table in tables:
            yield name, located(table, measured.split.chunks) if name == "exemplars" else table
    yield "receipts", arrow_table("receipts", BASE["receipts"], {**keys, **_by_column(receipts)})
    yield "unreadable", arrow_table("unreadable", BASE["unreadable"], {**keys, **_by_column(reading.damage)})
    values = means(reading.scores)
    rows = {"metric": list(values), "value": list(values.values()), "rows": int(reading.scores.get("labelled", 0))}
    yield "scores", arrow_table("scores", BASE["scores"], {**keys, **rows})


def _tables_at_once(
    discovery: Discovery,
    reading: Reading,
    cells: Sequence[Cells],
    *,
    keys: Mapping[str, str],
    controls: Mapping[str, Controls],
) -> Iterator[tuple[str, pa.Table]]:
    """The rows of a few sites by table."""
    states: States = {}
    errors: dict[str, dict[str, torch.Tensor]] = {site.name: {} for site in discovery.sites}
    for of_one in cells:
        statistic = of_one.statistic
        found = reading.merged(of_one, discovery.sites)
        states[statistic.name] = found.states
        for site in discovery.sites:
            if statistic.applies(site):
                blocks, whole = found.blocks_of(site), found.states[site.name]
                errors[site.name] |= standard_errors(statistic, site, blocks, whole, controls[site.name])
        del found
    statistics = [one.statistic for one in cells]
    yield from arrow_tables(discovery, states, statistics, keys=keys, controls=controls, errors=errors).items()


def _by_column(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = rows[0] if rows else ("chunk",)
    return {name: [row[name] for row in rows] for name in names}


def located(exemplars: pa.Table, chunks: Sequence[Chunk]) -> pa.Table:
    """The table with `file` and `row` filled in from each row's uid; null where a column names the rows."""
    numbered = [(chunk, chunk.uid_base) for chunk in chunks if chunk.uid_base is not None]
    uid_E = exemplars["uid"].to_numpy()
    file_E, row_E = np.full(len(uid_E), None, dtype=object), np.full(len(uid_E), -1)
    for chunk, base in numbered:
        # uids wrap at 2⁶³, and so does their distance from the base
        offset_E = (uid_E - base) & UID_MASK
        inside_E = (offset_E >= chunk.first_row) & (offset_E < chunk.first_row + chunk.rows)
        file_E[inside_E], row_E[inside_E] = chunk.url, offset_E[inside_E]
    found = {"file": pa.array(file_E, type=pa.string()), "row": pa.array(row_E, mask=row_E < 0)}
    for name, values in found.items():
        index = exemplars.schema.get_field_index(name)
        exemplars = exemplars.set_column(index, exemplars.schema.field(name), values)
    return exemplars


def _ledger(task: ReduceTask, measured: Measured, receipts: list[dict[str, Any]]) -> Rows:
    """The rows of the split: the same for every statistic, and all of them accounted for."""
    totals = {
        statistic.name: Rows(
            total=sum(one["total"] for one in receipts if one["statistic"] == statistic.name),
            read=sum(one["rows"] for one in receipts if one["statistic"] == statistic.name),
            unreadable=sum(one["unreadable"] for one in receipts if one["statistic"] == statistic.name),
            excluded=sum(one["excluded"] for one in receipts if one["statistic"] == statistic.name),
        )
        for statistic in measured.statistics
    }
    expected = measured.split.rows
    for name, rows in totals.items():
        if not rows.balanced or rows.total != expected or rows != next(iter(totals.values())):
            raise StoreError(
                f"the ledger of model {task.model.name}, {measured.split.data}/{measured.split.name}, {name} does not "
                f"add up: {rows} of {expected} rows; run `neuron-census verify --deep`"
            )
    return next(iter(totals.values())) if totals else Rows(total=expected, read=0, excluded=expected)


def _curve_table(task: ReduceTask, curve: Sequence[tuple[int, str, float]]) -> pa.Table:
    step, quantity, value = zip(*curve, strict=True) if curve else ((), (), ())
    points = {"step": list(step), "quantity": list(quantity), "value": list(value)}
    keys = {"run": task.run, "model": task.model.id, "data": task.model.data}
    return arrow_table("curves", BASE["curves"], {**keys, **points})


def _model_row(task: ReduceTask, seen: Mapping[str, Any]) -> pa.Table:
    model = task.model
    row = {
        "run": task.run,
        "model": model.id,
        "data": model.data,
        "name": model.name,
        "step": model.step,
        "control": model.control,
        "control_of": model.control_of,
        **columns_of(model.origin),
        **seen,
    }
    return arrow_table("models", BASE["models"], {name: [value] for name, value in row.items()})
