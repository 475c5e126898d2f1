"""What a column of a table is: its name, type and the sentence that a reader of the table needs.

Layer 0: imports nothing of the pipeline. Every table, its Arrow metadata and the printed dictionary come from these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Types that DuckDB, Polars, pandas and Spark all read; see tables.py for their Arrow form.
DType = Literal[
    "int32",
    "int64",
    "float32",
    "float64",
    "string",
    "bool",
    "timestamp",
    "list<float32>",
    "list<int64>",
    "list<string>",
]


@dataclass(frozen=True)
class Column:
    """One documented column.

    `meaning` is one sentence for a person; `unit` what it is counted in ("1" for a pure number); `range` the values it
    can take; `null` when it is null (not computed: only then is it left out) or NaN (undefined); `formula` how it is
    computed; `source` the paper or theory, empty for a plain definition; `se` asks for a delete-one-chunk jackknife
    standard error beside it, in a column named `_se` behind it.
    `version` is raised whenever the formula changes.
    """

    name: str
    dtype: DType
    meaning: str
    unit: str = "1"
    range: str = "any"
    null: str = "never"
    formula: str = ""
    source: str = ""
    table: str = "neurons"
    se: bool = False
    version: int = 1
