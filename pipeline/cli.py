"""The command line: `neuron-census`.

Layer 6. Every other import is inside the command that needs it: help must answer in under 0.3 s, and torch, Ray and
Prefect take seconds. A CensusError is one message on stderr and exit code 2; a run in which a model failed exits 1.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Collection
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from pipeline.errors import CensusError
from pipeline.operations import COMMANDS
from pipeline.options import store_option

if TYPE_CHECKING:
    from pipeline.job import Job
    from pipeline.progress import Progress
    from pipeline.query import Connection
    from pipeline.resolve import Resolved
    from pipeline.run import Outcome
    from pipeline.store import Store

FAILED, INTERRUPTED, TERMINATED = 1, 130, 143
# Ray's workers end in a few seconds. A thread that waits for a server which is silent would be waited for for minutes,
# and whatever is stored is whole whenever its writer ends
ENDING_S = 10.0
# the exit code of the signal that came: Ctrl-C's, or SIGTERM as a container's end sends it
_told_to_end: list[int] = []


class Commands(click.Group):
    """Commands in the order of their use, whose mistakes are messages."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Name the commands in the order in which they stand below."""
        return list(self.commands)

    def invoke(self, context: click.Context) -> Any:
        """Run a command; a CensusError is its message and its exit code, an interruption 130, SIGTERM 143."""
        try:
            return super().invoke(context)
        except CensusError as error:
            click.echo(f"error: {error}", err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            resumed = "; run the same command again to go on" if context.invoked_subcommand == "run" else ""
            click.echo(f"interrupted{resumed}", err=True)
            context.exit(_told_to_end[0] if _told_to_end else INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="neuron-census", prog_name="neuron-census")
def cli() -> None:
    """Take a census of neurons: what each one looks for, how well the data matches it, and when it fires.

    A run writes Parquet tables into a store: a directory, or a bucket as s3://bucket/prefix.

    \b
      neuron-census run jobs/demo.toml
      neuron-census query "SELECT name, family, train_accuracy FROM models"
      neuron-census show mlp-0/hidden0/3
    """


@cli.command(short_help="Run a job: train, measure, commit the tables.")
@click.argument("job", metavar="JOB.toml")
@store_option
@click.option("--ray", default="local", show_default=True, metavar="none|local|ADDRESS", help="Where tasks run.")
@click.option("--prefect", is_flag=True, help="Run inside a Prefect flow; starts a temporary server if none is set.")
def run(job: str, url: str, ray: str, prefect: bool) -> None:
    """Run a job: train or load its models, measure them, commit the tables.

    What the store already holds is not done again; a run that was interrupted goes on where it was. Exits 1 if a model
    failed (the others are committed) or tasks came to nothing (the same command goes on), 2 if the job, the data or the
    store is at fault.

    \b
      neuron-census run jobs/demo.toml
      neuron-census run jobs/demo.toml --store s3://bucket/census --ray HOST:6379
    """
    from pipeline.report.outcome import print_outcome
    from pipeline.report.screen import screen
    from pipeline.report.terminal import terminal_progress
    from pipeline.store import open_store

    with terminal_progress(screen(err=True)) as progress:
        outcome = _run_in_flow(job, url, ray, progress) if prefect else _run(job, url, ray, progress)
    print_outcome(outcome, open_store(url), screen())
    if outcome.failed:
        sys.exit(FAILED)


def _run(job: str, url: str, ray: str, progress: Progress) -> Outcome:
    from pipeline.address import LOCAL, NONE, knock
    from pipeline.executor import InlineExecutor
    from pipeline.named import checked_job
    from pipeline.resolve import resolve
    from pipeline.run import carry_out
    from pipeline.store import open_store

    store = open_store(url)
    asked = checked_job(job, store)
    if ray == NONE:
        return carry_out(_checked(asked, store, ray), store, InlineExecutor(), progress)
    resolved = None
    if ray == LOCAL:
        resolved = _checked(asked, store, ray)
    else:
        # the run looks at the store once the cluster is there: if it is not, nothing is left behind
        knock(ray)
    from pipeline.cluster.executor import executor_at  # imports ray, which only this needs

    with executor_at(ray, asked.allotted, progress.note) as executor:
        return carry_out(resolved or resolve(asked, store), store, executor, progress)


def _run_in_flow(job: str, url: str, ray: str, progress: Progress) -> Outcome:
    from pipeline.named import checked_job
    from pipeline.store import open_store

    store = open_store(url)
    resolved = _checked(checked_job(job, store), store, ray)
    from flows.census import take_census

    return take_census(job, store=url, ray=ray, progress=progress, resolved=resolved)


def _checked(job: Job, store: Store, ray: str) -> Resolved:
    """The job resolved, with mistakes in what was asked for found before the seconds that Ray and Prefect take."""
    from pipeline.address import LOCAL, NONE, knock
    from pipeline.devices import expect_gpus, expect_room
    from pipeline.resolve import resolve
    from pipeline.run import expect_fit, is_committed

    if ray in (NONE, LOCAL):
        expect_gpus(job.allotted)
        if ray == LOCAL:
            expect_room(job.allotted)
    else:
        knock(ray)
    resolved = resolve(job, store)
    if not is_committed(resolved, store):
        expect_fit(resolved, store)
    return resolved


SPEED = "How many times as fast as here a GPU is at the forward and the statistics: measure it on one."


@cli.command(short_help="Say what a job would do.")
@click.argument("job", metavar="JOB.toml")
@store_option
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Workers to group tasks for.")
@click.option("--estimate", is_flag=True, help="Measure what it costs, on the first rows of each data set.")
@click.option("--models", type=click.IntRange(min=1), help="Reckon for so many models of the job's shapes.")
@click.option("--rows", type=click.IntRange(min=1), help="Reckon for so many rows, which every model is shown.")
@click.option("--chunk-rows", type=click.IntRange(min=1), help="Reckon with chunks of so many rows.")
@click.option("--gpus", type=click.IntRange(min=1), help="Reckon for so many GPUs, one for each worker.")
@click.option("--speed", default=1.0, show_default=True, type=click.FloatRange(min=0, min_open=True), help=SPEED)
def plan(
    job: str,
    url: str,
    workers: int,
    estimate: bool,
    models: int | None,
    rows: int | None,
    chunk_rows: int | None,
    gpus: int | None,
    speed: float,
) -> None:
    """Say what a job would do: tasks, rows, bytes of state, and what the store holds already.

    \b
      neuron-census plan jobs/demo.toml
      neuron-census plan jobs/demo.toml --estimate --workers 8
      neuron-census plan jobs/demo.toml --models 1000 --rows 100_000_000 --gpus 64
    """
    from pipeline.estimate import estimate as estimated
    from pipeline.manifest import manifest_key
    from pipeline.named import checked_job
    from pipeline.plan import make_plan
    from pipeline.projection import overheads, project, target_of
    from pipeline.report.plan import costs, planned, projected
    from pipeline.report.screen import screen
    from pipeline.resolve import resolve
    from pipeline.store import open_store

    store = open_store(url)
    resolved = resolve(checked_job(job, store), store)
    key = manifest_key(resolved.run)
    made = make_plan(resolved, store, workers=workers)
    resolved.findings.release()
    screen().print(planned(made, committed=key in store.keys(key)))
    larger = {models, rows, chunk_rows, gpus} != {None}
    if not estimate and not larger:
        return
    units = estimated(resolved, store)
    screen().print(costs(units, made, workers=workers))
    if larger:
        target = target_of(made, models=models, rows=rows, chunk_rows=chunk_rows, workers=gpus or workers, speed=speed)
        screen().print(projected(project(units, overheads(made, store), target)))


@cli.command(short_help="Print what a job can say.")
@click.argument("name", required=False)
def keys(name: str | None) -> None:
    """Print the dictionary of a job: its sections, sources, families and statistics, or the keys of one.

    \b
      neuron-census keys
      neuron-census keys data
      neuron-census keys tabular
    """
    from pipeline.errors import nearest
    from pipeline.report.keys import entries, explained, overview
    from pipeline.report.screen import screen

    known = entries()
    if name is None:
        screen().print(overview(known))
        return
    found = [one for listed in known.values() for one in listed if one.name == name]
    if not found:
        names = [one.name for listed in known.values() for one in listed]
        raise click.UsageError(f"there is nothing {name!r} in a job: {nearest(name, names)}")
    screen().print(*map(explained, found))


@cli.command(short_help="Answer a question in SQL.")
@click.argument("sql", required=False)
@store_option
@click.option(
    "--question",
    metavar="NAME",
    help="Ask a question that is known by name instead: patterns, idle, detectors, collapse, families, words.",
)
@click.option("--run", metavar="ID", help="Only this run; the beginning of its id is enough.")
@click.option("--format", "form", type=click.Choice(["table", "csv", "json", "parquet"]), help="Default: table.")
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="File to write instead of stdout."
)
@click.option(
    "--rows", default=50, show_default=True, type=click.IntRange(min=0), help="Rows of a table; 0: all, up to 10,000."
)
def query(
    sql: str | None, url: str, question: str | None, run: str | None, form: str | None, output: Path | None, rows: int
) -> None:
    """Answer a question in SQL over every committed run (DuckDB); "-" reads it from stdin.

    Views: runs, and of each table of `neuron-census tables` the latest run of every model and data set as NAME, all
    runs as NAME_all. Latest is by when the store has a run's manifest, runs.committed: in a copy of a store that was
    given new times it may be another, so ask by --run there. Nothing can be written. Of several columns of one name
    the later ones are numbered: name, name_1.

    \b
      neuron-census query "SELECT site, avg(fire_rate) FROM neurons GROUP BY site"
      neuron-census query "FROM neurons WHERE dead" --format csv -o dead.csv
      neuron-census query --question patterns
    """
    from pipeline.query import tables_in
    from pipeline.report.answers import write_answer
    from pipeline.report.questions import choose
    from pipeline.report.screen import screen

    chosen = choose(sys.stdin.read() if sql == "-" else sql, question)
    with _connected(url, run, tables=tables_in(chosen.sql)) as con:
        write_answer(con, chosen, screen(), form=form, output=output, limit=rows)


@cli.command(short_help="Print the dictionary of tables and columns.")
@click.argument("name", required=False)
@click.option("--format", "form", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
def tables(name: str | None, form: str) -> None:
    """Print the dictionary: every table, or every column of one, with meaning, unit, range, nulls and formula.

    \b
      neuron-census tables
      neuron-census tables neurons
    """
    from pipeline.errors import nearest
    from pipeline.report.dictionary import all_columns, entries, explained, overview
    from pipeline.report.formats import WRITERS
    from pipeline.report.screen import screen

    known = all_columns()
    if name is not None and name not in known:
        raise click.UsageError(f"no table {name!r}: {nearest(name, known)}")
    if form == "table":
        screen().print(overview(known) if name is None else explained(entries(name)))
        return
    described = entries(name)
    WRITERS[form](list(described[0]), [list(entry.values()) for entry in described], sys.stdout.buffer)


@cli.command(short_help="Print one neuron.")
@click.argument("neuron", nargs=-1, required=True, metavar="MODEL/SITE/UNIT")
@store_option
@click.option("--run", metavar="ID", help="Only this run; the beginning of its id is enough.")
@click.option("--data", metavar="NAME", help="Data set, where a model of that name was measured on several.")
@click.option("--split", metavar="NAME", help="Split. [default: test, or else any other before train]")
@click.option(
    "--row", metavar="UID", type=click.IntRange(0, 2**63 - 1), help="Print this row instead, as it was measured on."
)
@click.option("--job", metavar="JOB.toml", help="For --row: where the data's relative names begin. [default: here]")
def show(
    neuron: tuple[str, ...],
    url: str,
    run: str | None,
    data: str | None,
    split: str | None,
    row: int | None,
    job: str | None,
) -> None:
    """Print one neuron: its pattern and what fires it, its numbers beside its controls', its exemplars.

    MODEL is a name, or the beginning of an id; of several models of one name it is the latest run's that has what is
    asked for. Without UNIT the site's units are listed, without SITE its sites. With --row a row that it was measured
    on, an exemplar say: read anew from the data.

    \b
      neuron-census show mlp-0/hidden0/3
      neuron-census show mlp-0 hidden0 3
      neuron-census show mlp-0/hidden0/3 --row 1234
    """
    from pipeline.report.neuron import page
    from pipeline.report.row import row_page
    from pipeline.report.screen import screen
    from pipeline.row import TABLES as ROW_TABLES
    from pipeline.row import find_row, labels_of
    from pipeline.show import TABLES, Listing, Neuron, find
    from pipeline.store import open_store

    console = screen()
    colour = console.is_terminal and not console.no_color
    with _connected(url, run, tables=(*TABLES, *ROW_TABLES)) as con:
        found = find(con, "/".join(neuron), data=data, split=split)
        if row is None:
            if isinstance(found, Neuron):
                found = replace(found, labels=labels_of(open_store(url), found.numbers))
            console.print(page(found, width=console.width, colour=colour))
            return
        if isinstance(found, Listing):
            raise click.UsageError("--row needs a neuron, MODEL/SITE/UNIT: the row is one that it was measured on")
        shown = find_row(con, open_store(url), found.numbers, row, job=job)
    console.print(row_page(shown, width=console.width, colour=colour))


def _connected(
    url: str, run: str | None, *, tables: Collection[str] | None = None
) -> AbstractContextManager[Connection]:
    from pipeline.query import connect
    from pipeline.store import open_store

    return closing(connect(open_store(url), run=run, tables=tables))


for command in COMMANDS:
    cli.add_command(command)


def _end(number: int, frame: Any) -> NoReturn:
    """End in order, but at once where this was asked for before, and after `ENDING_S` whatever is waited for."""
    if _told_to_end:
        os._exit(_told_to_end[0])
    _told_to_end.append(128 + number)
    last = threading.Timer(ENDING_S, os._exit, _told_to_end)
    last.daemon = True
    last.start()
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Run the command line: the console script."""
    signal.signal(signal.SIGTERM, _end)
    # a shell lets what it runs in the background ignore it
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end)
    cli(prog_name="neuron-census")
    raise AssertionError("unreachable")


if __name__ == "__main__":
    main()
