"""The tables of a run: their columns, their Arrow form with every column's documentation in it.

Layer 1: pyarrow, no I/O. A statistic names its own columns; the columns that say whose row it is are added here. Only
types that DuckDB, Polars, pandas and Spark all read: no fixed-size lists, no float16, no unsigned integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.base_columns import BASE, unit_keys
from pipeline.columns import Column, DType


def _list_of(values: pa.DataType) -> pa.DataType:
    """Lists whose values have the name that Parquet gives them: a table is the same once it has been read back."""
    return pa.list_(pa.field("element", values))


ARROW: dict[DType, pa.DataType] = {
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "list<float32>": _list_of(pa.float32()),
    "list<int64>": _list_of(pa.int64()),
    "list<string>": _list_of(pa.string()),
}

# what Arrow raises of values that are none of a type
_UNFIT = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)
# a cast from or to these would invent a meaning
_EXACT = (pa.string(), pa.bool_())
# what a column's metadata leaves out: it is the field itself, or asks for another column
_NOT_DOCUMENTATION = frozenset({"name", "dtype", "table", "se"})

Values = Any  # a tensor, (values, valid), a list of values or tensors, or one value for all rows


def table_columns(statistic_columns: Sequence[Column]) -> dict[str, tuple[Column, ...]]:
    """The columns of every table, in order: whose row it is, then what the statistics measured.

    A statistic may repeat a column of ours, which it then documents, or of another statistic; ValueError if the types
    differ.

    >>> [column.name for column in table_columns([])["neurons"]]
    ['run', 'model', 'data', 'split', 'site', 'unit']
    """
    tables = {name: {column.name: column for column in columns} for name, columns in BASE.items()}
    for column in statistic_columns:
        table = tables.setdefault(column.table, {one.name: one for one in unit_keys(column.table)})
        for one in [column, *_standard_error(column)]:
            known = table.get(one.name)
            if known is not None and known.dtype != one.dtype:
                raise ValueError(f"column {one.table}.{one.name} is declared as {known.dtype} and {one.dtype}")
            if known is None or known in BASE.get(column.table, ()):
                table[one.name] = one
    return {name: tuple(columns.values()) for name, columns in tables.items()}


def _standard_error(column: Column) -> list[Column]:
    if not column.se:
        return []
    return [
        Column(
            name=f"{column.name}_se",
            dtype="float64",
            meaning=f"Standard error of {column.name}: jackknife that leaves out chunks.",
            unit=column.unit,
            range="≥ 0",
            null="null with fewer than 2 chunks; NaN where the number is undefined with some chunks left out",
            formula="√(1/K · Σ_k (θ̃_k − Σ_j θ̃_j/h_j)²/(h_k − 1)), θ̃_k = h_k·θ − (h_k − 1)·θ₋ₖ, h_k = rows / rows of k; "
            "K ≤ 10 blocks of chunks",
            source="Busing, Meijer & van der Leeden 1999",
            table=column.table,
            version=column.version,
        )
    ]


def schema(table: str, columns: Sequence[Column]) -> pa.Schema:
    """The Arrow schema of a table; each field's metadata is its column's documentation."""
    return pa.schema([_field(column) for column in columns], metadata={"table": table})


@cache
def _field(column: Column) -> pa.Field:
    return pa.field(column.name, ARROW[column.dtype], metadata=_documentation(column))


def _documentation(column: Column) -> dict[str, str]:
    names = [one.name for one in fields(column) if one.name not in _NOT_DOCUMENTATION]
    return {name: str(getattr(column, name)) for name in names}


def arrow_table(table: str, columns: Sequence[Column], rows: Mapping[str, Values]) -> pa.Table:
    """Rows of a table from column → values; a column without values is null.

    Values are a tensor, (values, valid) as tensors, a list of values, None or tensors, or one string or number for all
    rows. ValueError if a column is not one of the table's, lengths differ, or values do not fit the declared type.
    """
    if extra := sorted(rows.keys() - {column.name for column in columns}):
        raise ValueError(f"table {table} has no columns {extra}")
    lengths = {name: _length(values) for name, values in rows.items() if not _is_single(values)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of table {table} differ in length: {lengths}")
    count = next(iter(lengths.values()), 1 if rows else 0)
    arrays = [_column_array(table, column, rows.get(column.name), count) for column in columns]
    return pa.Table.from_arrays(arrays, schema=schema(table, columns))


def unfit(column: Column, values: Values) -> str | None:
    """Why values of all rows cannot be those of a column, in words; None where they can."""
    try:
        _array(ARROW[column.dtype], values)
    except _UNFIT as error:
        return f"declared as {column.dtype}: {error}"
    return None


def _column_array(table: str, column: Column, values: Values, count: int) -> pa.Array:
    kind = ARROW[column.dtype]
    try:
        return _repeated(kind, values, count) if _is_single(values) else _array(kind, values)
    except _UNFIT as error:
        raise ValueError(f"column {table}.{column.name} is declared as {column.dtype}: {error}") from error


def _repeated(kind: pa.DataType, value: Values, count: int) -> pa.Array:
    return pa.repeat(pa.array([value], type=kind)[0], count)


def _is_single(values: Values) -> bool:
    return values is None or isinstance(values, str | int | float)


def _length(values: Values) -> int:
    return len(values[0]) if isinstance(values, tuple) else len(values)


def _array(kind: pa.DataType, values: Values) -> pa.Array:
    if isinstance(values, tuple):
        content, valid = values
        return _masked(_array(kind, content), np.asarray(valid, dtype=bool))
    if isinstance(values, torch.Tensor):
        widened = values.float() if values.dtype == torch.bfloat16 else values
        values = widened.detach().cpu().numpy()
    if isinstance(values, np.ndarray) and values.ndim == 2:
        offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        return pa.ListArray.from_arrays(offsets, _array(kind.value_type, values.ravel()), type=kind)
    if isinstance(values, np.ndarray):
        array = pa.array(values)
        if array.type != kind and (kind in _EXACT or array.type in _EXACT):
            raise pa.ArrowTypeError(f"got {array.type}")
        return array.cast(kind)
    plain = [value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value for value in values]
    return pa.array(plain, type=kind)


def _masked(array: pa.Array, valid: np.ndarray) -> pa.Array:
    # take() with null indices: NaN stays NaN, and lists can be null as well
    return array.take(pa.array(np.arange(len(array)), mask=~valid))


def dictionary(columns: Mapping[str, Sequence[Column]], table: str | None = None) -> list[dict[str, str]]:
    """What `neuron-census tables` prints: one row for each column, of one table or of all.

    >>> dictionary(table_columns([]), "neurons")[0]["column"]
    'run'
    """
    chosen = columns if table is None else {table: columns[table]}
    return [
        {"table": name, "column": column.name, "type": column.dtype, **_documentation(column)}
        for name, described in chosen.items()
        for column in described
    ]
