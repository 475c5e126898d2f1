"""The dictionary of a job: what `neuron-census keys` prints, made from the sections and from what a job can name.

Layer 5. Importing the statistics imports torch (2 s), so this module is imported only where keys are needed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Mapping, Sequence
from inspect import cleandoc, getmodule, isclass
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.fit.settings import Training
from pipeline.foreign.spec import LoadSpec
from pipeline.job import Job
from pipeline.job_sections import Columns, DataSpec, ModelSpec, Numerics, Resources, SiteSelection
from pipeline.registry import families, sources, statistics
from pipeline.statistics.base import Statistic

_NAMES = {int: "integer", float: "number", str: "string", bool: "true or false", Any: "any value"}
# a parameter of a statistic and what its class says of it
_TOLD = re.compile(r"^(\w+) {2,}(\S.*(?:\n {2,}.*)*)\n?", re.M)
# by the plan, from sample_rows
_RESOLVED = ("sample_shift",)
_HINT = "`neuron-census keys NAME` explains the keys of one."


class Key(NamedTuple):
    """A key of a table of a job: its type in words, its default as TOML has it, its meaning."""

    name: str
    type: str
    default: str
    meaning: str


class Entry(NamedTuple):
    """A table of a job: where it stands, what it is, its keys."""

    name: str
    place: str
    meaning: str
    keys: tuple[Key, ...]


def entries() -> dict[str, Sequence[Entry]]:
    """Every table of a job by kind: its sections, and what each source, family and statistic takes."""
    sections: list[tuple[str, str, type[BaseModel]]] = [
        ("job", "at the top", Job),
        ("numerics", "[numerics]", Numerics),
        ("data", "[data.NAME]", DataSpec),
        ("columns", "[data.NAME.columns]", Columns),
        ("models", "[[models]]", ModelSpec),
        ("training", "training = { … } of [[models]]", Training),
        ("load", "load = { … } of [[models]]", LoadSpec),
        ("sites", "[sites]", SiteSelection),
        ("resources", "[resources]", Resources),
    ]
    return {
        "sections": [Entry(name, place, _said(section), _of_model(section)) for name, place, section in sections],
        "sources": [
            Entry(name, "[data.NAME.options]", _said(getmodule(source), source), _of_model(source.parameters))
            for name, source in sources().items()
        ],
        "families": [
            Entry(name, "hyperparameters = { … } of [[models]]", _of_family(family), _of_model(family.parameters))
            for name, family in families().items()
        ],
        "statistics": [_of_statistic(name, one) for name, one in statistics().items()],
    }


def _of_family(family: Any) -> str:
    return _said(getmodule(type(family)), type(family), family.parameters)


def _said(*described: Any) -> str:
    return "\n\n".join(cleandoc(one.__doc__) for one in described if one.__doc__)


def _of_model(section: type[BaseModel]) -> tuple[Key, ...]:
    def default(field: Any) -> str:
        return "required" if field.is_required() else _toml(field.get_default(call_default_factory=True))

    fields = section.model_fields.items()
    return tuple(Key(name, _type(one.annotation), default(one), one.description or "") for name, one in fields)


def _of_statistic(name: str, statistic: Any) -> Entry:
    """A statistic's class says first what it is, then of each parameter what it means."""
    kind = type(statistic)
    told = {said[1]: " ".join(said[2].split()) for base in (Statistic, kind) for said in _TOLD.finditer(_said(base))}
    hints = get_type_hints(kind)
    keys = [
        Key(field.name, _type(hints[field.name]), _toml(getattr(statistic, field.name)), told.get(field.name, ""))
        for field in dataclasses.fields(statistic)
        if field.name not in _RESOLVED
    ]
    return Entry(name, f"[statistics.{name}]", _TOLD.sub("", _said(kind)).strip(), tuple(keys))


def _toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "{}"
    plain = list(value) if isinstance(value, tuple) else value
    return json.dumps(plain, ensure_ascii=False)


def _type(annotation: Any) -> str:
    """A type as TOML's words say it."""
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " or ".join(json.dumps(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type(one) for one in get_args(annotation) if one is not type(None))
    if get_origin(annotation) is tuple:
        return f"array of {_type(get_args(annotation)[0])}s"
    if get_origin(annotation) is dict or (isclass(annotation) and issubclass(annotation, BaseModel)):
        return "table"
    return _NAMES.get(annotation, str(annotation))


def overview(known: Mapping[str, Sequence[Entry]]) -> RenderableType:
    """Every table of a job, one line each, by kind."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("keys", justify="right", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for kind, listed in known.items():
        table.add_row(Text(kind, style="bold"))
        for one in listed:
            table.add_row(f"  {one.name}", str(len(one.keys)), one.meaning.split("\n\n")[0].replace("\n", " "))
    return Group(table, Text(f"\n{_HINT}", style="dim"))


def explained(one: Entry) -> RenderableType:
    """The keys of one table, each with its type, default and meaning."""
    heading = Text.assemble((f"{one.name}: ", "bold"), one.place, "\n\n", one.meaning, "\n")
    if not one.keys:
        return Group(heading, Text("It has no keys."))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("key", style="bold", no_wrap=True)
    table.add_column("type", ratio=1, overflow="fold")
    table.add_column("default", ratio=1, overflow="fold")
    if any(key.meaning for key in one.keys):
        table.add_column("meaning", ratio=3, overflow="fold")
    for key in one.keys:
        table.add_row(*(key if any(each.meaning for each in one.keys) else key[:3]))
    return Group(heading, table)
