"""Everything that the tables say about one neuron, found by a name that a person types.

Layer 5: reads the tables by SQL and nothing else; how it looks is `report/neuron.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import nearest
from pipeline.query import Connection, QueryError, ask

Row = Mapping[str, Any]

TABLES = ("models", "sites", "neurons", "patterns", "exemplars", "classes", "meanings")


@dataclass(frozen=True)
class Neuron:
    """One unit on one split: its rows of every table, and the same row of its untrained twin where it has one.

    `labels` is what the data calls its classes, where it does and the caller knows.
    """

    model: Row
    site: Row
    numbers: Row
    twin: Row | None
    pattern: Row | None
    exemplars: Sequence[Row]
    classes: Sequence[Row]
    meanings: Sequence[Row]
    also_measured_on: Sequence[str]
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Listing:
    """What can be named next, where an address ends at a model or a site."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]


def find(con: Connection, address: str, *, data: str | None = None, split: str | None = None) -> Neuron | Listing:
    """Find "MODEL/SITE/UNIT"; a MODEL is a name or the beginning of an id. QueryError naming the nearest if unknown."""
    model, rest = _model(con, address.strip("/"))
    if model["status"] != "ok":
        raise QueryError(f"model {model['name']} was not measured, it failed: {model['reason']}")
    sites = _rows(con, "FROM sites WHERE model = $model AND interpreted ORDER BY position", {"model": model["model"]})
    if not rest:
        return _sites(model, sites)
    by_name = {site["site"]: site for site in sites}
    if rest in by_name:
        return _units(con, model, by_name[rest], data, split)
    name, _, unit = rest.rpartition("/")
    if name not in by_name:
        raise QueryError(f"model {model['name']} has no site {name or rest!r}: {nearest(name or rest, by_name)}")
    return _neuron(con, model, by_name[name], _number(by_name[name], unit), data, split)


def _model(con: Connection, address: str) -> tuple[Row, str]:
    """The model that an address begins with, and what follows; of several of one name that of the latest run."""
    models = _rows(con, "SELECT models.* FROM models JOIN runs USING (run) ORDER BY committed DESC, run", {})
    parts = address.split("/")
    # names may contain slashes
    for count in range(len(parts), 0, -1):
        typed, rest = "/".join(parts[:count]), "/".join(parts[count:])
        if named := [model for model in models if typed == model["name"]]:
            return named[0], rest
        found = {model["model"]: model for model in models if typed and str(model["model"]).startswith(typed)}
        if len(found) > 1:
            listed = ", ".join(f"{model['model']} ({model['name']})" for model in found.values())
            raise QueryError(f"the ids of {len(found)} models begin with {typed!r}: {listed}")
        if found:
            return next(iter(found.values())), rest
    known = sorted({str(model["name"]) for model in models})
    raise QueryError(f"there is no model {parts[0]!r}: {nearest(parts[0], known)}")


def _number(site: Row, typed: str) -> int:
    if not typed.isdecimal() or int(typed) >= site["units"]:
        raise QueryError(
            f"site {site['site']} has no unit {typed!r}: expected 0 to {site['units'] - 1}, as MODEL/SITE/UNIT"
        )
    return int(typed)


def _neuron(con: Connection, model: Row, site: Row, unit: int, data: str | None, split: str | None) -> Neuron:
    key = {"model": model["model"], "site": site["site"], "unit": unit}
    chosen, others = _measured_on(con, key, data, split)
    of_model = dict(key)
    key |= chosen
    numbers = _rows(con, f"FROM neurons WHERE {_equal(key)}", key)[0]
    twin = _rows(con, f"FROM neurons WHERE {_equal(key)}", {**key, "model": model["control"]})
    pattern = _rows(con, f"FROM patterns WHERE {_equal(key)}", key)
    return Neuron(
        model=model,
        site=site,
        numbers=numbers,
        twin=twin[0] if twin else None,
        pattern=pattern[0] if pattern else None,
        exemplars=_rows(con, f"FROM exemplars WHERE {_equal(key)} ORDER BY kind, rank", key),
        classes=_rows(con, f"FROM classes WHERE {_equal(key)} ORDER BY class", key),
        meanings=_rows(con, f"FROM meanings WHERE {_equal(of_model)} ORDER BY kind, rank", of_model),
        also_measured_on=others,
    )


def _measured_on(
    con: Connection, key: Row, data: str | None, split: str | None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The data set and split to show, and the others that there are; `test` comes first."""
    sql = f"SELECT DISTINCT data, split FROM neurons WHERE {_equal(key)} ORDER BY split <> 'test', data, split"
    pairs = [(row["data"], row["split"]) for row in _rows(con, sql, key)]
    if not pairs:
        raise QueryError(f"site {key['site']} was not measured")
    fitting = [pair for pair in pairs if data in (None, pair[0]) and split in (None, pair[1])]
    if not fitting:
        known = ", ".join(map("/".join, pairs))
        raise QueryError(f"not measured on data {data or 'any'}, split {split or 'any'}: known: {known}")
    others = tuple("/".join(pair) for pair in pairs if pair != fitting[0])
    return {"data": fitting[0][0], "split": fitting[0][1]}, others


def _sites(model: Row, sites: Sequence[Row]) -> Listing:
    columns = ("site", "kind", "gate", "units", "fan_in", "input_kind")
    rows = [tuple(site[column] for column in columns) for site in sites]
    return Listing(f"{model['name']} ({model['model']}): its sites", columns, rows)


def _units(con: Connection, model: Row, site: Row, data: str | None, split: str | None) -> Listing:
    key = {"model": model["model"], "site": site["site"]}
    chosen, _ = _measured_on(con, key, data, split)
    known = ask(con, "FROM neurons LIMIT 0").columns
    wanted = ("unit", "fire_rate", "z_mean", "z_std", "template_cos", "best_class", "best_class_iou", "dead")
    columns = tuple(column for column in wanted if column in known)
    answer = ask(
        con, f"SELECT {', '.join(columns)} FROM neurons WHERE {_equal(key | chosen)} ORDER BY unit", key | chosen
    )
    title = f"{model['name']}/{site['site']} on {chosen['data']}/{chosen['split']}: its units"
    return Listing(title, columns, list(answer.rows))


def _equal(key: Row) -> str:
    return " AND ".join(f"{name} = ${name}" for name in key)


def _rows(con: Connection, sql: str, parameters: Row) -> list[Row]:
    answer = ask(con, sql, parameters)
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
