"""Everything that the tables say about one neuron, found by a name that a person types.

Layer 5: reads the tables by SQL and nothing else; how it looks is `report/neuron.py`. What is shown together is of one
run, model, data set and split, the untrained twin as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import nearest
from pipeline.query import Connection, QueryError, ask

Row = Mapping[str, Any]

TABLES = ("models", "sites", "neurons", "patterns", "exemplars", "classes", "meanings")


@dataclass(frozen=True)
class Neuron:
    """One unit on one split: its rows of every table, and the same row of its untrained twin where it has one.

    `namesakes` are the rows of other models that bear the model's name, the latest run's first. `labels` is what the
    data calls its classes, where it does and the caller knows.
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
    namesakes: Sequence[Row] = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Listing:
    """What can be named next, where an address ends at a model or a site."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]
    also_measured_on: Sequence[str]
    namesakes: Sequence[Row]


@dataclass(frozen=True)
class _Place:
    """A model as one run measured it on one data set, as far as the address goes a site and unit of it, and a split."""

    model: Row
    sites: Mapping[str, Row]
    site: Row | None = None
    unit: int | None = None
    split: str | None = None

    @property
    def unit_key(self) -> Row:
        """What rows of it have in common, on whichever data."""
        key = {"model": self.model["model"], "site": self.site and self.site["site"], "unit": self.unit}
        return {name: value for name, value in key.items() if value is not None}

    @property
    def key(self) -> Row:
        """What rows of it have in common."""
        chosen = {} if self.split is None else {"split": self.split}
        return {"run": self.model["run"], "data": self.model["data"], **chosen, **self.unit_key}


def find(con: Connection, address: str, *, data: str | None = None, split: str | None = None) -> Neuron | Listing:
    """Find "MODEL/SITE/UNIT"; a MODEL is a name or the beginning of an id. QueryError naming the nearest if unknown.

    Of several models of one name, and of several data sets of one model, it is the latest run's that has what is asked
    for; of splits `test`, or else any other before `train`.
    """
    models = _rows(con, "SELECT models.* FROM models JOIN runs USING (run) ORDER BY committed DESC, run", {})
    meant, rest = _meant(models, address.strip("/"))
    place = _place(con, _measured(meant, data), rest, data, split)
    name, own = place.model["name"], place.model["model"]
    namesakes = [model for model in models if model["name"] == name and model["model"] != own]
    if place.site is None:
        return _sites(con, place, namesakes)
    return _units(con, place, namesakes) if place.unit is None else _neuron(con, place, place.site, namesakes)


def _meant(models: Sequence[Row], address: str) -> tuple[Sequence[Row], str]:
    """The rows of all models that an address may begin with, in the order given, and what follows.

    Those that bear the name come first, then what the same models are called elsewhere.
    """
    parts = address.split("/")
    # names may contain slashes
    for count in range(len(parts), 0, -1):
        typed, rest = "/".join(parts[:count]), "/".join(parts[count:])
        if named := {model["model"] for model in models if typed == model["name"]}:
            meant = [model for model in models if model["model"] in named]
            return sorted(meant, key=lambda model: model["name"] != typed), rest
        begun = {model["model"]: model for model in models if typed and str(model["model"]).startswith(typed)}
        if len(begun) > 1:
            listed = ", ".join(f"{model['model']} ({model['name']})" for model in begun.values())
            raise QueryError(f"the ids of {len(begun)} models begin with {typed!r}: {listed}")
        if begun:
            return [model for model in models if model["model"] in begun], rest
    known = sorted({str(model["name"]) for model in models})
    raise QueryError(f"there is no model {parts[0]!r}: {nearest(parts[0], known)}")


def _measured(meant: Sequence[Row], data: str | None) -> Sequence[Row]:
    """Those that were measured, on a data set if it is given. QueryError if none was, saying why if it failed."""
    measured = [model for model in meant if model["status"] == "ok"]
    if fitting := [model for model in measured if data in (None, model["data"])]:
        return fitting
    name = meant[0]["name"]
    for failed in meant:
        if failed["status"] != "ok" and (not measured or failed["data"] == data):
            on = f" on data {data}" if failed["data"] == data else ""
            raise QueryError(f"model {name} was not measured{on}, it failed: {failed['reason']}")
    known = {str(model["data"]) for model in measured}
    raise QueryError(f"model {name} was not measured on data {data!r}: {nearest(str(data), known)}")


def _place(con: Connection, models: Sequence[Row], rest: str, data: str | None, split: str | None) -> _Place:
    """The first place that has the site, unit and split asked for. QueryError if none has."""
    sites = _sites_of(con, models)
    found = [_at(_Place(model, sites[_of(model)]), rest) for model in models]
    places = [place for place in found if place is not None]
    if split is None and not rest and places:
        return places[0]
    splits = _splits_of(con, places)
    for place in places:
        if fitting := [one for one in splits[_of(place.model)] if split in (None, one)]:
            return replace(place, split=fitting[0])
    name = models[0]["name"]
    if known := [f"{place.model['data']}/{one}" for place in places for one in splits[_of(place.model)]]:
        listed = ", ".join(dict.fromkeys(known))
        asked = f"data {data or 'any'}, split {split or 'any'}"
        raise QueryError(f"model {name} was not measured on {asked}: known: {listed}")
    raise QueryError(_why_not(name, sites[_of(models[0])], rest))


def _of(row: Row) -> tuple[str, str, str]:
    return row["run"], row["model"], row["data"]


def _at(place: _Place, rest: str) -> _Place | None:
    """What follows a model in an address, found among its sites; None if it is not there."""
    if not rest:
        return place
    if rest in place.sites:
        return replace(place, site=place.sites[rest])
    name, _, unit = rest.rpartition("/")
    if name in place.sites and unit.isdecimal() and int(unit) < place.sites[name]["units"]:
        return replace(place, site=place.sites[name], unit=int(unit))
    return None


def _why_not(model: str, sites: Mapping[str, Row], rest: str) -> str:
    """What is wrong with what follows a model in an address."""
    name, _, unit = rest.rpartition("/")
    if rest in sites or not rest:
        return f"{f'site {rest}' if rest else f'model {model}'} was not measured"
    if name not in sites:
        return f"model {model} has no site {name or rest!r}: {nearest(name or rest, sites)}"
    units = sites[name]["units"]
    if unit.isdecimal() and int(unit) < units:
        return f"site {name} was not measured"
    return f"site {name} has no unit {unit!r}: expected 0 to {units - 1}, as MODEL/SITE/UNIT"


def _sites_of(con: Connection, models: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """The sites of models, at once: of a name there may be as many as there are runs."""
    ids = {"models": [model["model"] for model in models]}
    rows = _rows(con, "FROM sites WHERE list_contains($models, model) AND interpreted ORDER BY position", ids)
    found: dict[tuple[str, str, str], dict[str, Row]] = {_of(model): {} for model in models}
    for site in rows:
        found.setdefault(_of(site), {})[site["site"]] = site
    return found


def _splits_of(con: Connection, places: Sequence[_Place]) -> dict[tuple[str, str, str], list[str]]:
    """The splits on which there are rows of each place, the one to show first."""
    found: dict[tuple[str, str, str], list[str]] = {_of(place.model): [] for place in places}
    if places:
        key = {name: value for name, value in places[0].unit_key.items() if name != "model"}
        where = " AND ".join(filter(None, ["list_contains($models, model)", _equal(key)]))
        order = "split <> 'test', split = 'train', split"
        sql = f"SELECT DISTINCT run, model, data, split FROM neurons WHERE {where} ORDER BY {order}"
        for row in _rows(con, sql, {"models": [place.model["model"] for place in places], **key}):
            found.setdefault(_of(row), []).append(row["split"])
    return found


def _also_measured_on(con: Connection, place: _Place) -> Sequence[str]:
    """The other data sets and splits on which there are rows of the same."""
    where = _equal(place.unit_key)
    order = "split <> 'test', data, split = 'train', split"
    sql = f"SELECT DISTINCT data, split FROM neurons WHERE {where} ORDER BY {order}"
    return [
        f"{row['data']}/{row['split']}"
        for row in _rows(con, sql, place.unit_key)
        # a list of sites is that of every split
        if row["data"] != place.model["data"] or place.split not in (None, row["split"])
    ]


def _neuron(con: Connection, place: _Place, site: Row, namesakes: Sequence[Row]) -> Neuron:
    key, where = place.key, _equal(place.key)
    of_model = {name: value for name, value in key.items() if name != "split"}
    # the latest run of a twin that several models share may be another than this model's
    twin = _rows(con, f"FROM neurons_all WHERE {where}", {**key, "model": place.model["control"]})
    pattern = _rows(con, f"FROM patterns WHERE {where}", key)
    return Neuron(
        model=place.model,
        site=site,
        numbers=_rows(con, f"FROM neurons WHERE {where}", key)[0],
        twin=twin[0] if twin else None,
        pattern=pattern[0] if pattern else None,
        exemplars=_rows(con, f"FROM exemplars WHERE {where} ORDER BY kind, rank", key),
        classes=_rows(con, f"FROM classes WHERE {where} ORDER BY class", key),
        meanings=_rows(con, f"FROM meanings WHERE {_equal(of_model)} ORDER BY kind, rank", of_model),
        also_measured_on=_also_measured_on(con, place),
        namesakes=namesakes,
    )


def _sites(con: Connection, place: _Place, namesakes: Sequence[Row]) -> Listing:
    columns = ("site", "kind", "gate", "units", "fan_in", "input_kind")
    rows = [tuple(site[column] for column in columns) for site in place.sites.values()]
    model = place.model
    title = f"{model['name']} ({model['model']}) on {model['data']}: its sites"
    return Listing(title, columns, rows, _also_measured_on(con, place), namesakes)


def _units(con: Connection, place: _Place, namesakes: Sequence[Row]) -> Listing:
    known = ask(con, "FROM neurons LIMIT 0").columns
    wanted = ("unit", "fire_rate", "z_mean", "z_std", "template_cos", "best_class", "best_class_iou", "dead")
    columns = tuple(column for column in wanted if column in known)
    sql = f"SELECT {', '.join(columns)} FROM neurons WHERE {_equal(place.key)} ORDER BY unit"
    rows = list(ask(con, sql, place.key).rows)
    title = f"{place.model['name']}/{place.key['site']} on {place.key['data']}/{place.split}: its units"
    return Listing(title, columns, rows, _also_measured_on(con, place), namesakes)


def _equal(key: Iterable[str]) -> str:
    return " AND ".join(f"{name} = ${name}" for name in key)


def _rows(con: Connection, sql: str, parameters: Row) -> list[Row]:
    answer = ask(con, sql, parameters)
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
