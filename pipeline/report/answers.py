"""The answer to a question, for a person or for a program.

Layer 5.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.text import Text

from pipeline.query import Answer, Connection, QueryError, ask, ask_arrow
from pipeline.report.formats import WRITERS, whole_file, write_parquet
from pipeline.report.printing import fitted
from pipeline.report.question import Question

# a table's columns are as wide as their widest value, and rich takes a millisecond a row
MOST_ROWS = 10_000


def write_answer(
    con: Connection, question: Question, console: Console, *, form: str | None, output: Path | None, limit: int
) -> None:
    """Print the answer as a table of at most `limit` rows (0: all), or write all of it in another format."""
    suffix = output.suffix.removeprefix(".") if output else ""
    form = form or (suffix if suffix in (*WRITERS, "parquet") else "table")
    if form == "table":
        if output:
            raise QueryError(f"{output}: a table is for the terminal; name the file .csv, .json or .parquet")
        print_question(con, question, console, limit=limit)
        return
    if form == "parquet" and output is None and sys.stdout.isatty():
        raise QueryError("Parquet is not for a terminal; use --output FILE, or a pipe")
    target: AbstractContextManager[IO[bytes]] = whole_file(output) if output else nullcontext(sys.stdout.buffer)
    if form == "parquet":
        reader = ask_arrow(con, question.sql)
        with target as sink:
            write_parquet(reader, sink)
        return
    answer = ask(con, question.sql)
    with target as sink:
        WRITERS[form](answer.columns, answer.rows, sink)


def print_question(con: Connection, question: Question, console: Console, *, limit: int) -> None:
    """Print a question's title, its answer, and how it is read."""
    if question.title:
        console.print(Text(f"\n{question.title}", style="bold"))
    if any("." not in need for need in question.needs) and not _has_rows(con, "neurons"):
        console.print(Text("no rows: no model was measured", style="dim"))
        return
    if missing := _not_measured(con, question):
        console.print(Text(f"not measured: the question needs the columns {', '.join(missing)}", style="dim"))
        return
    print_answer(ask(con, question.sql), console, limit=limit)
    if question.reading:
        console.print(Text(question.reading, style="dim"))


def _not_measured(con: Connection, question: Question) -> list[str]:
    needs = {need: need.rpartition(".") for need in question.needs}
    known = {table: _columns(con, table or "neurons") for table, _, _ in needs.values()}
    return [need for need, (table, _, column) in needs.items() if column not in known[table]]


def _columns(con: Connection, table: str) -> set[str]:
    """The columns of a table, none of one without rows: it may be one that no run has."""
    if not _has_rows(con, table):
        return set()
    return set(ask(con, f"FROM {table} LIMIT 0").columns)


def _has_rows(con: Connection, table: str) -> bool:
    return any(True for _ in ask(con, f"SELECT 1 FROM {table} LIMIT 1").rows)


def print_answer(answer: Answer, console: Console, *, limit: int) -> None:
    """Print the first `limit` rows (0: all), and say if there are more. QueryError of more than MOST_ROWS."""
    rows = list(islice(answer.rows, (limit or MOST_ROWS) + 1))
    if len(rows) > MOST_ROWS:
        raise QueryError(f"over {MOST_ROWS:,} rows are too many for a table: expected --format csv, json or parquet")
    shown = rows[:limit] if limit else rows
    if not rows:
        console.print(Text(f"no rows ({', '.join(answer.columns)})", style="dim"), soft_wrap=False)
        return
    console.print(fitted(answer.columns, shown, width=console.width))
    if "uid" in answer.columns:
        console.print(Text("a row itself: neuron-census show MODEL/SITE/UNIT --row UID", style="dim"))
    if len(rows) > len(shown):
        console.print(Text(f"the first {limit} rows; --rows 0 prints all, --format csv writes all", style="dim"))
