"""A store written by hand: two trained models with their untrained twins, on a few rows, with known numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from pipeline.cells import CellState, Rows, cell_key, encode_cell
from pipeline.columns import Column, DType
from pipeline.hashing import digest, sha256
from pipeline.manifest import Coverage, Failed, File, Manifest, encode, manifest_key
from pipeline.models.base import checkpoint_key
from pipeline.parquet import parquet_bytes
from pipeline.store import Store
from pipeline.tables import arrow_table, table_columns

CLASSES = 3

Edit = Callable[[dict[str, Any]], list[dict[str, Any]]]


def _columns(table: str, **kinds: DType) -> list[Column]:
    return [Column(name, kind, f"{name} of a test", table=table) for name, kind in kinds.items()]


MEASURED = [
    *_columns("neurons", n="int64", z_mean="float64", z_std="float64", fire_rate="float64", dead="bool"),
    *_columns("neurons", template_cos="float64", template_cos_other_mean="float64", weight_norm="float64"),
    *_columns("neurons", template_cos_permuted_mean="float64"),
    *_columns("neurons", bias="float64", neighbour_unit="int32", neighbour_cos="float64", best_class="int32"),
    *_columns("neurons", best_class_iou="float64", best_class_precision="float64", best_class_recall="float64"),
    *_columns("neurons", best_class_iou_null="float64"),
    *_columns("patterns", weight="list<float32>", bias="float64", cov="list<float32>", sta="list<float32>"),
    *_columns("patterns", mean_x="list<float32>"),
    *_columns("exemplars", uid="int64", position="int64", z="float64", a="float64", label="int32"),
    *_columns("classes", n="int64", fired="int64", a_mean="float64"),
]
SITES = {"layers.0": ("relu", "pixels", (1, 4, 4), 4), "head": ("identity", "units", (4,), CLASSES)}


def model_id(name: str) -> str:
    return digest(name)


def weights(name: str) -> bytes:
    """What stands for a model's checkpoint."""
    return f"weights of {name}".encode()


def models(
    run: str, names: Sequence[str], data: str, trained_anew: Mapping[str, bytes] = MappingProxyType({})
) -> list[dict[str, Any]]:
    return [
        {
            "run": run,
            "model": model_id(name),
            "name": name,
            "family": name.split("-")[0],
            "data": data,
            "seed": 0,
            "step": 0 if name.endswith("-init") else 100,
            "lineage": digest(name.removesuffix("-init")),
            "control": None if name.endswith("-init") else model_id(f"{name}-init"),
            "control_of": digest(name.removesuffix("-init")) if name.endswith("-init") else None,
            "hyperparameters": json.dumps({"widths": [4]}),
            "parameters": 100,
            "train_accuracy": 0.9,
            "sha256": sha256(trained_anew.get(name, weights(name))),
            "status": "ok",
        }
        for name in sorted(names, key=model_id)
    ]


def sites(run: str, names: Sequence[str], data: str) -> list[dict[str, Any]]:
    return [
        {
            "run": run,
            "model": model_id(name),
            "data": data,
            "site": site,
            "position": position,
            "path": site,
            "call": 0,
            "kind": "dense",
            "gate": gate,
            "units": units,
            "fan_in": int(np.prod(shape)),
            "groups": 1,
            "input_kind": kind,
            "input_shape": list(shape),
            "interpreted": True,
            "parameters": 64,
            "error": 0.0,
        }
        for name in sorted(names, key=model_id)
        for position, (site, (gate, kind, shape, units)) in enumerate(SITES.items())
    ]


def units(run: str, names: Sequence[str], data: str, splits: Sequence[str] = ("test",)) -> list[dict[str, Any]]:
    """The key columns of every unit."""
    return [
        {"run": run, "model": model_id(name), "data": data, "split": split, "site": site, "unit": unit, "name": name}
        for name in sorted(names, key=model_id)
        for split in sorted(splits)
        for site, (_, _, _, count) in sorted(SITES.items())
        for unit in range(count)
    ]


def neuron(key: Mapping[str, Any]) -> dict[str, Any]:
    """Trained units match by 0.75, untrained by 0.25; unit 1 of layers.0 is dead, units 2 and 3 are near-twins."""
    hidden, trained = key["site"] == "layers.0", not key["name"].endswith("-init")
    dead = hidden and key["unit"] == 1
    cosine = float("nan") if dead else 0.75 if trained else 0.25
    row = {
        **{name: value for name, value in key.items() if name != "name"},
        "n": 100,
        "z_mean": -0.5,
        "z_std": 2.0,
        "weight_norm": 1.5,
        "bias": 0.125,
        "template_cos": cosine,
        "template_cos_other_mean": 0.0625,
        "template_cos_permuted_mean": 0.03125,
        "neighbour_unit": (key["unit"] ^ 1) % 4,
        "neighbour_cos": 0.97 if key["unit"] >= 2 and hidden else 0.1,
    }
    if not hidden:
        return row
    return {
        **row,
        "fire_rate": 0.0 if dead else 0.3,
        "dead": dead,
        "best_class": key["unit"] % CLASSES,
        "best_class_iou": 0.1 * key["unit"],
        "best_class_precision": 0.5,
        "best_class_recall": 0.4,
        "best_class_iou_null": 0.05,
    }


def pattern(key: Mapping[str, Any]) -> dict[str, Any]:
    inputs = int(np.prod(SITES[key["site"]][2]))
    weight = np.linspace(-1, 1, inputs) * (1 + key["unit"])
    vectors = {"weight": weight, "cov": weight / 2, "sta": weight / 4, "mean_x": np.ones(inputs)}
    own = {name: value for name, value in key.items() if name != "name"}
    return {**own, "bias": 0.125, **{name: value.tolist() for name, value in vectors.items()}}


def exemplars(key: Mapping[str, Any]) -> list[dict[str, Any]]:
    own = {name: value for name, value in key.items() if name != "name"}
    return [
        {
            **own,
            "kind": kind,
            "rank": rank,
            "uid": 1000 + rank,
            "position": 0,
            "z": 3.0 - rank,
            "a": 3.0 - rank,
            "label": 2,
        }
        for kind in ("greatest", "random")
        for rank in range(2)
    ]


def classes(key: Mapping[str, Any]) -> list[dict[str, Any]]:
    own = {name: value for name, value in key.items() if name != "name"}
    fires = key["site"] == "layers.0"
    return [{**own, "class": number, "n": 30, "fired": 10 * number if fires else None} for number in range(CLASSES)]


def meanings(key: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each unit looks for a word that is called as the data set is."""
    own = {name: value for name, value in key.items() if name not in ("name", "split")}
    return [{**own, "kind": "greatest", "rank": 0, "input": f"word of {key['data']}", "value": 1.5}]


def write_run(
    store: Store,
    run: str,
    names: Sequence[str] = ("mlp-0", "mlp-0-init"),
    *,
    data: str = "digits",
    splits: Sequence[str] = ("test",),
    tables: Sequence[str] = ("models", "sites", "neurons", "patterns", "exemplars", "classes", "receipts"),
    change: Mapping[str, Any] | None = None,
    change_sites: Mapping[str, Any] | None = None,
    more: Sequence[Column] = (),
    coverage: Mapping[str, Coverage] | None = None,
    devices: Sequence[str] = ("cpu",),
    trained_anew: Mapping[str, bytes] = MappingProxyType({}),
    failed: Mapping[str, str] = MappingProxyType({}),
    edit: Mapping[str, Edit] = MappingProxyType({}),
) -> Manifest:
    """Commit a run; `change` overrides columns of every neuron, `change_sites` of every site, `more` adds columns.

    `trained_anew` gives other checkpoints of some of them, `failed` names further ones that failed, with the reason.
    `edit` says by table what becomes of each row.
    """
    keys = units(run, names, data, splits)
    lost = [
        {"run": run, "model": model_id(name), "name": name, "data": data, "status": "failed", "reason": reason}
        for name, reason in failed.items()
    ]
    rows: dict[str, list[dict[str, Any]]] = {
        "models": sorted([*models(run, names, data, trained_anew), *lost], key=lambda row: str(row["model"])),
        "sites": [{**site, **(change_sites or {})} for site in sites(run, names, data)],
        "neurons": [{**neuron(key), **(change or {})} for key in keys],
        "patterns": [pattern(key) for key in keys],
        "exemplars": [row for key in keys for row in exemplars(key)],
        "classes": [row for key in keys for row in classes(key)],
        "meanings": [row for key in keys if key["split"] == splits[0] for row in meanings(key)],
        "receipts": receipts(store, run, names, data, devices),
    }
    rows |= {table: [made for row in rows[table] for made in edited(row)] for table, edited in edit.items()}
    columns = table_columns([*MEASURED, *more])
    files = tuple(_write(store, run, table, columns[table], rows[table]) for table in sorted(tables))
    manifest = Manifest(
        run=run,
        name="handmade",
        job={"name": "handmade", "data": {data: {}}},
        models=tuple(sorted(row["model"] for row in rows["models"])),
        failed=tuple(Failed(model_id(name), name, reason) for name, reason in sorted(failed.items())),
        coverage=coverage or {f"{data}/test": Coverage(total=100, read=90, unreadable=3, excluded=7)},
        versions={"neuron-census": "0.1.0"},
        statistics={"template": "template-1", **{column.name: "1" for column in more}},
        files=files,
    )
    store.put_once(manifest_key(run), encode(manifest))
    return manifest


def receipts(store: Store, run: str, names: Sequence[str], data: str, devices: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for number, name in enumerate(sorted(names, key=model_id)):
        rows, device = Rows(total=100, read=90, unreadable=3, excluded=7), devices[number % len(devices)]
        checkpoint = store.put_once(checkpoint_key(model_id(name)), weights(name))
        key = cell_key(model_id(name), "template-1", "chunk")
        content = encode_cell(CellState({}, rows, {}, device, checkpoint))
        stored = store.put_once(key, content)
        row = {
            "run": run,
            "model": model_id(name),
            "data": data,
            "split": "test",
            "chunk": "chunk",
            "statistic": "template",
        }
        ledger = {"total": 100, "rows": 90, "unreadable": 3, "excluded": 7, "bytes": len(content), "sha256": stored}
        found.append(
            {
                **row,
                "file": "digits.parquet",
                "first_row": 0,
                "key": key,
                **ledger,
                "device": device,
            }
        )
    return found


def _write(store: Store, run: str, table: str, columns: Sequence[Column], rows: list[dict[str, Any]]) -> File:
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = {name: [row.get(name) for row in rows] for name in names}
    content = parquet_bytes(arrow_table(table, columns, values))
    key = f"runs/{run}/tables/{table}/part-00000.parquet"
    store.put_once(key, content)
    ids = sorted({row["model"] for row in rows})
    return File(table, key, sha256(content), len(content), len(rows), ids[0], ids[-1])
