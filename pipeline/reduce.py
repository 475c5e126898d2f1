"""The reduce task: merge one model's cells in plan order and write its rows of every table.

Layer 3. Reads each cell once, hashes it as stored, and adds up the ledger. A missing cell is not done, never empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from pipeline.arrow_bytes import arrow_bytes
from pipeline.base_columns import BASE
from pipeline.cells import CellState, Rows, cell_key, decode_cell, misfit
from pipeline.described import described, meanings, names_of
from pipeline.entries import Model
from pipeline.errors import SpoiltObject, StoreError
from pipeline.flow.discover import Discovery
from pipeline.hashing import sha256
from pipeline.jackknife import Block, block_of, standard_errors
from pipeline.job import Numerics, SiteSelection
from pipeline.kernels.base import State
from pipeline.loading import Loaded, Probe, keep_only, load
from pipeline.models.base import checkpoint_key
from pipeline.numerics import in_force
from pipeline.origins import columns_of
from pipeline.resolve import Split
from pipeline.rows.decode import UID_MASK
from pipeline.scores import Sums, added, means
from pipeline.site_table import site_table
from pipeline.sites import Site
from pipeline.sources.base import Chunk
from pipeline.statistics.base import Statistic
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
    """Turn the cells of one model into its rows; of a model that failed, its `failure` into a row of `models`."""

    run: str
    model: Model
    twin: Model | None
    failure: str | None
    measured: tuple[Measured, ...]
    probe: Probe
    numerics: Numerics
    sites: SiteSelection

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
    if task.failure is None:
        with in_force(task.numerics):
            parts, coverage = _rows(task, store)
    else:
        parts = {"models": [_model_row(task, {"status": "failed", "reason": task.failure})]}
    files: dict[str, dict[str, int]] = {}
    store.put_all(_encoded(task, parts, files))
    record = json.dumps({"files": files, "coverage": coverage, "failure": task.failure}, sort_keys=True)
    store.put_once(reduced_key(task.run, task.model.id, DONE), record.encode())


def _rows(task: ReduceTask, store: Store) -> tuple[dict[str, list[pa.Table]], dict[str, dict[str, int]]]:
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
    parts = {
        "models": [_model_row(task, seen)],
        "sites": [site_table(sites, run=task.run, model=task.model.id, data=task.model.data)],
        "curves": [_curve_table(task, record.get("curve", []))],
        "meanings": [meanings(loaded, task.model, names, run=task.run)],
    }
    coverage = {}
    for measured in task.measured:
        tables, rows = _split_tables(task, measured, loaded, twin, store)
        coverage[f"{measured.split.data}/{measured.split.name}"] = asdict(rows)
        for name, table in tables.items():
            parts.setdefault(name, []).append(table)
    return parts, coverage


def _encoded(
    task: ReduceTask, parts: Mapping[str, Sequence[pa.Table]], files: dict[str, dict[str, int]]
) -> Iterator[tuple[str, bytes]]:
    """The tables as they are stored, one at a time; what the record says of each is put into `files`."""
    for name, tables in sorted(parts.items()):
        table = pa.concat_tables(tables)
        content = arrow_bytes(table)
        files[name] = {"rows": table.num_rows, "bytes": len(content)}
        yield rows_key(task.run, task.model.id, name), content


def _split_tables(
    task: ReduceTask, measured: Measured, loaded: Loaded, twin: Discovery | None, store: Store
) -> tuple[dict[str, pa.Table], Rows]:
    keys = {"run": task.run, "model": task.model.id, "data": measured.split.data, "split": measured.split.name}
    states: dict[str, dict[str, State]] = {}
    errors: dict[str, dict[str, torch.Tensor]] = {}
    receipts: list[dict[str, Any]] = []
    scores: Sums = {}
    damage: list[dict[str, Any]] = []
    controls = controls_of(loaded.discovery, twin)
    for statistic in measured.statistics:
        merged = _merged(task, measured, statistic, loaded, store)
        states[statistic.name] = merged.states
        receipts += merged.receipts
        scores, damage = merged.scores, merged.damage
        for site in _sites(statistic, loaded.discovery):
            blocks = [Block(of_sites[site.name], rows) for of_sites, rows in merged.blocks]
            found = standard_errors(statistic, site, blocks, merged.states[site.name], controls[site.name])
            errors.setdefault(site.name, {}).update(found)
    tables = arrow_tables(loaded.discovery, states, measured.statistics, keys=keys, controls=controls, errors=errors)
    if "exemplars" in tables:
        tables["exemplars"] = located(tables["exemplars"], measured.split.chunks)
    tables["receipts"] = arrow_table("receipts", BASE["receipts"], {**keys, **_by_column(receipts)})
    tables["unreadable"] = arrow_table("unreadable", BASE["unreadable"], {**keys, **_by_column(damage)})
    values = means(scores)
    rows = {"metric": list(values), "value": list(values.values()), "rows": int(scores.get("labelled", 0))}
    tables["scores"] = arrow_table("scores", BASE["scores"], {**keys, **rows})
    return tables, _ledger(task, measured, receipts)


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


@dataclass(frozen=True, eq=False)
class _Merged:
    """A statistic's cells of one split in plan order: merged whole and in blocks, receipts, scores, damage."""

    states: dict[str, State]
    scores: Sums
    blocks: list[tuple[dict[str, State], int]]
    receipts: list[dict[str, Any]]
    damage: list[dict[str, Any]]


def _sites(statistic: Statistic, found: Discovery) -> list[Site]:
    return [site for site in found.sites if statistic.applies(site)]


def _merged(task: ReduceTask, measured: Measured, statistic: Statistic, loaded: Loaded, store: Store) -> _Merged:
    sites = _sites(statistic, loaded.discovery)
    keeps_blocks = any(column.se for column in statistic.COLUMNS)
    empty = {site.name: statistic.empty(site) for site in sites}
    whole: Mapping[str, State] = empty
    blocks: list[tuple[dict[str, State], int]] = []
    receipts = []
    damage: list[dict[str, Any]] = []
    scores: list[Sums] = []
    chunks = measured.split.chunks
    for index, chunk in enumerate(chunks):
        key = cell_key(task.model.id, measured.state_names[statistic.name], chunk.id)
        content = store.get(key)
        cell = decode_cell(content, key=key)
        _refuse_misfit(cell, key, task.model.id, loaded.sha256, empty)
        for site in sorted(sites, key=lambda one: one.name):
            _refuse_other_kinds(statistic, site, cell.states[site.name], empty[site.name], key)
        whole = _merge(statistic, sites, whole, cell.states)
        if keeps_blocks and block_of(index, len(chunks)) == len(blocks):
            blocks.append((dict(cell.states), cell.rows.read))
        elif keeps_blocks:
            states, rows = blocks[-1]
            blocks[-1] = (_merge(statistic, sites, states, cell.states), rows + cell.rows.read)
        scores.append(dict(cell.scores))
        receipts.append(_receipt(statistic, chunk, cell, key=key, content=content))
        damage += [{"chunk": chunk.id, "file": chunk.url, **one._asdict()} for one in cell.damage]
    return _Merged(dict(whole), added(scores), blocks, receipts, damage)


def _refuse_misfit(cell: CellState, key: str, model: str, checkpoint: str, empty: Mapping[str, State]) -> None:
    """SpoiltObject unless a cell is of the weights that are stored, and of the sites that they have."""
    if cell.checkpoint != checkpoint:
        raise SpoiltObject(
            f"{key} was measured on other weights (SHA-256 {cell.checkpoint[:12]}…) than {checkpoint_key(model)} holds "
            f"({checkpoint[:12]}…), which was made anew since: delete what is below states/{model}/ and run again"
        )
    if cell.states.keys() != empty.keys():
        raise SpoiltObject(f"{key} holds other sites than the model has; delete it and run again")


def _refuse_other_kinds(statistic: Statistic, site: Site, state: State, empty: State, key: str) -> None:
    """SpoiltObject unless a state is one that the statistic can have of the site."""
    # its other forms are as large as itself, and rare: they are made where they are needed
    if misfit(state, empty) and (wrong := misfit(state, *statistic.forms(site))):
        raise SpoiltObject(f"{key}: {site.name} {wrong}; delete it and run again")


def _merge(
    statistic: Statistic, sites: Sequence[Site], left: Mapping[str, State], right: Mapping[str, State]
) -> dict[str, State]:
    return {site.name: statistic.merge(site, left[site.name], right[site.name]) for site in sites}


def _receipt(statistic: Statistic, chunk: Chunk, cell: CellState, *, key: str, content: bytes) -> dict[str, Any]:
    return {
        "chunk": chunk.id,
        "statistic": statistic.name,
        "file": chunk.url,
        "key": key,
        "rows": cell.rows.read,
        "unreadable": cell.rows.unreadable,
        "excluded": cell.rows.excluded,
        "total": cell.rows.total,
        "bytes": len(content),
        "sha256": sha256(content),
        "device": cell.device,
    }


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
