"""Whether the rows that a statistic gives of a site are as its columns declare them: Parquet would not always say.

Layer 1: torch, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.base_columns import BASE, is_of_units, unit_keys
from pipeline.columns import Column
from pipeline.errors import ContractError, nearest
from pipeline.tables import unfit

_KINDS = {
    **dict.fromkeys(("int32", "int64"), "integers"),
    **dict.fromkeys(("float32", "float64"), "floats"),
    "bool": "booleans",
}


def refuse_unfit_rows(statistic: Any, site: Any, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """ContractError unless what a statistic gives of a site has its declared columns, their types and equal lengths.

    A column may be left out where its documentation says when it is null; a table but "neurons" has whose row each is.
    """
    where = f"statistic {statistic.name} at site {site.name}"
    if not isinstance(rows, Mapping) or not all(isinstance(values, Mapping) for values in rows.values()):
        found = type(rows).__name__ if not isinstance(rows, Mapping) else "a table that is none"
        raise ContractError(f"{where}: columns() gives {found}; expected values by column by table")
    for table, values in {**rows, "neurons": rows.get("neurons", {})}.items():
        if not is_of_units(table):
            raise ContractError(
                f"{where}: it gives rows of {table}, which is no table of units; expected one of its own"
            )
        columns = _columns(statistic, table)
        lengths: dict[str, int] = {"the units of the site": site.units} if table == "neurons" else {}
        for name, given in values.items():
            column = columns.get(name)
            if column is None:
                known = nearest(name, [one.name for one in statistic.COLUMNS if one.table == table])
                raise ContractError(f"{where}: it declares no column {table}.{name}; {known}")
            if problem := _misfit(column, given):
                raise ContractError(f"{where}: column {table}.{name}: {problem}")
            lengths[f"{table}.{name}"] = len(given[0]) if isinstance(given, tuple) else len(given)
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{count} of {name}" for name, count in lengths.items())
            raise ContractError(f"{where}: expected as many values of each column: {listed}")
        if lacking := [name for name, column in columns.items() if name not in values and "null" not in column.null]:
            name, said = lacking[0], columns[lacking[0]].null
            raise ContractError(
                f"{where}: column {table}.{name} is not given; expected values: of when it is null it says {said!r}"
            )
        if problem := _misnumbered(values.get("unit"), site.units):
            raise ContractError(f"{where}: column {table}.unit: {problem}")


def _columns(statistic: Any, table: str) -> dict[str, Column]:
    """The columns that a statistic may give of a table: which unit a row is of, in `neurons`, is for us to say."""
    ours = {key.name for key in unit_keys(table)} - ({"unit"} if table != "neurons" else set())
    keys = [key for key in BASE.get(table, unit_keys(table)) if key.name not in ours]
    return {column.name: column for column in [*keys, *(one for one in statistic.COLUMNS if one.table == table)]}


def _misnumbered(unit: Any, units: int) -> str | None:
    """What is wrong with the numbers of the units that rows are of, in words."""
    if unit is None:
        return None
    if not isinstance(unit, torch.Tensor):
        return f"got {type(unit).__name__}; expected a tensor"
    if len(unit) and not 0 <= int(unit.min()) <= int(unit.max()) < units:
        return f"got {int(unit.min())} to {int(unit.max())}; expected 0 to {units - 1}, the units of the site"
    return None


def _misfit(column: Column, given: Any) -> str | None:
    """What of values does not fit their column, in words."""
    content, *valid = given if isinstance(given, tuple) else (given,)
    if valid and not (isinstance(valid[0], torch.Tensor) and valid[0].dtype == torch.bool and len(valid) == 1):
        return "got a tuple; expected Nullable, its valid a tensor of booleans"
    if valid and len(valid[0]) != len(content):
        return f"got {len(content)} values, of which {len(valid[0])} are said to be valid or not"
    if isinstance(content, list):
        return unfit(column, given)
    if not isinstance(content, torch.Tensor):
        return f"got {type(content).__name__}; expected a tensor, Nullable or a list"
    axes = 2 if column.dtype.startswith("list") else 1
    if content.ndim != axes:
        return f"got a tensor of shape {tuple(content.shape)}; expected {axes} axis, one value for each row"
    declared = column.dtype.removeprefix("list<").removesuffix(">")
    if _kind(content.dtype) != _KINDS.get(declared):
        return f"got {content.dtype}, declared as {column.dtype}"
    if declared == "float64" and content.dtype != torch.float64:
        return f"got {content.dtype}, declared as {column.dtype}: digits are lost"
    # of these alone a value may be too large
    return unfit(column, given) if declared == "int32" else None


def _kind(dtype: torch.dtype) -> str:
    return "booleans" if dtype == torch.bool else "floats" if dtype.is_floating_point else "integers"
