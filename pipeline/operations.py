"""Commands for whoever operates a store and a cluster: submit, status, logs, cancel, verify, gc, up.

Layer 6. As in cli.py, every other import is inside the command that needs it.
"""

from __future__ import annotations

import re
import shlex
import sys
from datetime import timedelta
from typing import Any

import click

from pipeline.counted import counted
from pipeline.options import into_option, jobs_help, jobs_option, store_option

FAILED = 1
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class Age(click.ParamType):
    """A span of time as a number and a unit: 90m, 12h, 7d."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Read one; a usage error says what was expected."""
        if isinstance(value, timedelta):
            return value
        if not (match := re.fullmatch(r"(\d+)([smhd])", value)):
            self.fail(f"{value!r}: expected a number and a unit: 90m, 12h, 7d", param, ctx)
        return timedelta(**{UNITS[match[2]]: int(match[1])})


@click.command(short_help="Give a job to a Ray cluster.")
@click.argument("job", metavar="JOB.toml")
@store_option
@jobs_option
@click.option("--follow", is_flag=True, help="Print what it prints until it ends, and exit as it does.")
def submit(job: str, url: str, address: str, follow: bool) -> None:
    """Give a job to a Ray cluster, where it goes on whatever becomes of this machine.

    The same run is never submitted twice: while its job is alive, the command attaches to it; a run that is committed
    is left alone; one that failed or was cancelled goes on where it was. Store and data must be where every node of
    the cluster reaches them, with the nodes' own credentials: none is sent.

    \b
      neuron-census submit job.toml --store s3://bucket --ray http://HOST:8265
    """
    from pipeline.address import shown
    from pipeline.submission import submit as give

    given = give(job, url, address)
    if given.job is None:
        click.echo(f"run {given.run} is already committed")
        return
    verb = "submitted as" if given.is_new else "already at work as"
    click.echo(f"run {given.run}: {verb} {given.job}")
    if given.remark:
        click.echo(given.remark, err=True)
    if follow:
        sys.exit(_followed(address, given.job))
    click.echo(f"neuron-census logs {given.run} --store {shlex.quote(url)} --ray {shown(address)} --follow")


def _followed(address: str, job: str) -> int:
    """Print a job to its end; 0 if it succeeded."""
    from pipeline.cluster.jobs import JobServer

    server = JobServer(address)
    for piece in server.log(job, follow=True):
        click.echo(piece, nl=False)
    return 0 if server.submission(job).status == "SUCCEEDED" else FAILED


@click.command(short_help="List the runs of a store, or the jobs of a cluster.")
@click.argument("run", required=False)
@store_option
@click.option("--ray", "address", metavar="http://HOST:8265", help=f"{jobs_help} Lists its jobs instead.")
def status(run: str | None, url: str, address: str | None) -> None:
    """List the runs of a store, the committed ones and those that are not finished, or the jobs of a cluster.

    With RUN (the beginning of an id is enough) only that run, and which of its models failed and why.

    \b
      neuron-census status --store s3://bucket/census
      neuron-census status 3f2a --ray http://HOST:8265
    """
    from pipeline.report.screen import screen
    from pipeline.report.status import print_status, print_submissions
    from pipeline.store import open_store

    if address is None:
        print_status(open_store(url), screen(), run)
        return
    from pipeline.submission import submissions  # imports ray, which only this needs

    print_submissions(submissions(address, run), address, screen())


@click.command(short_help="Print what a submitted run has printed.")
@click.argument("run")
@jobs_option
@into_option
@click.option("--follow", is_flag=True, help="Go on until it ends, and exit as it does.")
def logs(run: str, address: str, url: str | None, follow: bool) -> None:
    """Print what the job of a run has printed; the beginning of the run's id is enough.

    Of several jobs it is the one at work, else the last; --store says which where they are for several stores.

    \b
      neuron-census logs 3f2a --ray http://HOST:8265 --follow
    """
    from pipeline.cluster.jobs import JobServer
    from pipeline.submission import latest

    job = latest(address, run, url=url).id
    if follow:
        sys.exit(_followed(address, job))
    for piece in JobServer(address).log(job, follow=False):
        click.echo(piece, nl=False)


@click.command(short_help="Stop a submitted run.")
@click.argument("run")
@jobs_option
@into_option
def cancel(run: str, address: str, url: str | None) -> None:
    """Stop the job of a run. What it has stored stays: submitting it again goes on there.

    --store says which where the run is at work for several stores.

    \b
      neuron-census cancel 3f2a --ray http://HOST:8265
    """
    from pipeline.submission import cancel as stop

    ended = stop(address, run, url=url)
    click.echo(f"run {ended.run}: {ended.id} is {ended.status}")


@click.command(short_help="Check committed runs against what is stored.")
@click.argument("run", required=False)
@store_option
@click.option("--deep", is_flag=True, help="Hash every cell and checkpoint as well.")
def verify(run: str | None, url: str, deep: bool) -> None:
    """Check committed runs (all, or the one whose id begins with RUN): hashes, row counts, ledgers, receipts.

    Exits 1 with a list of what is wrong.

    \b
      neuron-census verify
      neuron-census verify 3f2a --deep
    """
    from pipeline.store import open_store
    from pipeline.verify import verify_runs

    sound = True
    for report in verify_runs(open_store(url), run=run, deep=deep):
        click.echo(report.summary)
        for problem in report.problems:
            click.echo(f"  wrong: {problem}")
        for remark in report.remarks:
            click.echo(f"  note: {remark}")
        sound &= not report.problems
    if not sound:
        sys.exit(FAILED)


@click.command(short_help="Find, and remove, what no run needs.")
@store_option
@click.option("--age", type=Age(), default="7d", show_default=True, help="Keep what is younger: 90m, 12h, 7d.")
@click.option("--delete", is_flag=True, help="Remove what is listed; without it nothing is removed.")
def gc(url: str, age: timedelta, delete: bool) -> None:
    """List what no run needs, with the reason, and remove it with --delete.

    Whatever a committed run was made from stays, and whatever belongs to a run that has written anything within the
    age. What was removed and is asked for again is measured again.

    \b
      neuron-census gc --store s3://bucket/census
      neuron-census gc --store s3://bucket/census --age 30d --delete
    """
    from pipeline.gc import clock, find_garbage, remove_garbage
    from pipeline.report.printing import size
    from pipeline.store import open_store

    store = open_store(url)
    told = clock(store, removes=delete)
    if told.remark:
        click.echo(told.remark, err=True)
    found = find_garbage(store, age=age, now=told.now)
    count = total = 0
    for one in remove_garbage(store, found) if delete else found:
        click.echo(f"{one.stored.when:%Y-%m-%d %H:%M}  {size(one.stored.bytes):>9}  {one.key}: {one.reason}")
        count, total = count + 1, total + one.stored.bytes
    done = "removed" if delete else "would be removed; --delete does it" if found else "to remove"
    click.echo(f"{counted(count, 'object')}, {size(total)} {done}")


@click.command(short_help="Write down where everything is, for quick answers over many runs.")
@store_option
def catalogue(url: str) -> None:
    """Write the catalogue: the manifests of all committed runs and the footers of their tables, in a few objects.

    With many runs in a bucket it spares every question thousands of requests. Nothing depends on it: runs that were
    committed since are found all the same. Write it anew now and then, or after removing a run.

    \b
      neuron-census catalogue --store s3://bucket/census
    """
    from pipeline.catalogue import FOLDER, write_catalogue
    from pipeline.errors import StoreError
    from pipeline.store import open_store

    store = open_store(url)
    if not store.folders("runs/") and not store.keys(FOLDER):
        raise StoreError(f"{store.url}: holds no run; `neuron-census run JOB.toml --store …` makes one")
    written = write_catalogue(store)
    runs, tables = counted(len(written.runs), "run"), counted(len(written.objects), "table")
    files = counted(sum(len(manifest.files) for manifest, _ in written.runs), "file")
    click.echo(f"in the catalogue of {url}: {runs} with {files} of {tables}")


@click.command(short_help="Keep a census up: server, schedule and worker.")
@click.argument("job", metavar="JOB.toml")
@store_option
@click.option("--ray", default="local", show_default=True, metavar="none|local|ADDRESS", help="Where tasks run.")
@click.option("--cron", default="0 2 * * *", show_default=True, help="When it runs, in UTC.")
@click.option("--port", default=4200, show_default=True, type=click.IntRange(1, 65535), help="Of Prefect's server.")
def up(job: str, url: str, ray: str, cron: str, port: int) -> None:
    """Start a Prefect server and a worker on this machine that run a job on a schedule, until Ctrl-C.

    Every run measures what is new since the last: rows, models, statistics. The server listens on this machine only.

    \b
      neuron-census up jobs/demo.toml --cron "0 2 * * *"
    """
    from flows.up import Nightly
    from flows.up import up as keep_up

    keep_up(Nightly(job, url, ray, cron), port=port, say=click.echo)


COMMANDS = (status, verify, gc, catalogue, submit, logs, cancel, up)
