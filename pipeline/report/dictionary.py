"""The dictionary of all tables: what `neuron-census tables` prints, made from the columns themselves.

Layer 5. Importing the statistics imports torch (2 s), so this module is imported only where columns are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.columns import Column
from pipeline.registry import statistics
from pipeline.tables import dictionary, table_columns

_ROWS = {
    "models": "one row for each model: its recipe, control, accuracy, or why it failed",
    "sites": "one row for each site of a model: where it is, its gate, what its inputs are",
    "neurons": "one row for each unit, data set and split: the wide table",
    "histograms": "one row for each filled bin of a unit",
    "exemplars": "one row for each chosen data row of a unit: what fires it most, least, at random",
    "classes": "one row for each unit and class",
    "patterns": "one row for each unit: its pattern, and what fires it, as vectors",
    "edges": "one row for each large contribution of an input to a unit",
    "meanings": "one row for each token, or value of a field, that stands out to a unit which sees it embedded",
    "scores": "one row for each model, split and metric: accuracy, log-loss, AUC, perplexity",
    "curves": "one row for each point of a training curve: loss, learning rate, held-out loss",
    "receipts": "one row for each cell (model, chunk, statistic): what was read, and the hash of what was stored",
    "unreadable": "one row for each stretch of rows that a model was not shown, with file, row and reason",
}

_HINT = (
    "`neuron-census tables NAME` explains the columns of one. In SQL, NAME holds the latest committed run of each "
    "model and data set, NAME_all every run; `runs` lists the runs."
)


def all_columns() -> dict[str, tuple[Column, ...]]:
    """Every table that this program can write, with its columns in order."""
    return table_columns([column for statistic in statistics().values() for column in statistic.COLUMNS])


def entries(table: str | None = None) -> list[dict[str, str]]:
    """One entry for each column of one table or of all."""
    return dictionary(all_columns(), table)


def overview(columns: Mapping[str, Sequence[Column]]) -> RenderableType:
    """All tables, one line each."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("table", style="bold", no_wrap=True)
    table.add_column("columns", justify="right", no_wrap=True)
    table.add_column("rows", overflow="fold")
    for name, described in columns.items():
        table.add_row(name, str(len(described)), _ROWS.get(name, "one row for each unit"))
    return Group(table, Text(f"\n{_HINT}", style="dim"))


def explained(described: Sequence[Mapping[str, str]]) -> RenderableType:
    """The columns of one table, each with its meaning and what there is to know besides."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("column", style="bold", overflow="fold")
    table.add_column("type", no_wrap=True)
    table.add_column("meaning", ratio=1, overflow="fold")
    for entry in described:
        table.add_row(_breakable(entry["column"]), entry["type"], _meaning(entry))
    return table


def _breakable(name: str) -> Text:
    """A long name on two lines, broken behind an underscore."""
    if len(name) <= 24:
        return Text(name)
    cut = name.rfind("_", 0, 24) + 1
    return Text(f"{name[:cut]}\n  {name[cut:]}")


def _meaning(entry: Mapping[str, str]) -> Text:
    """What a column means and, dimmed, what there is to know besides."""
    text = Text(entry["meaning"])
    facts = []
    if entry["unit"] not in ("", "1"):
        facts.append(f"in {entry['unit']}")
    if entry["range"] != "any":
        facts.append(entry["range"])
    if entry["null"] not in ("", "never"):
        facts.append(entry["null"])
    for line in (" · ".join(facts), entry["formula"], entry["source"]):
        if line:
            text.append(f"\n{line}", style="dim")
    return text
