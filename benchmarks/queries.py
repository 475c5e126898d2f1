"""What questions over a large store read and take: python -m benchmarks.queries [--json FILE]

Ten million neuron rows of 2,000 models in 200 runs, every column filled, on a real S3 server that is started here (or
on `--store URL`, written first unless it holds runs). Bytes and requests are counted at the S3 client. Everything is
asked twice: as a first question on a new connection, and again. The bounds: a selective question reads < 10 MB, an
aggregate over all rows takes < 3 s when it is asked again, and views over the runs are there in < 1 s.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.stores import DATA, SPLIT, Made, model_id, write_store
from pipeline.catalogue import write_catalogue
from pipeline.filesystems import filesystem
from pipeline.query import Connection, ask, connect
from pipeline.store import Store, open_store

TABLES = ("models", "neurons")
TEN = "unit, z_mean, z_std, fire_rate, template_cos, template_cos_se, weight_norm, bias, best_class, dead"
AGGREGATE = "SELECT site, count(*), avg(template_cos), avg(fire_rate), max(weight_norm) FROM neurons GROUP BY site"


class Traffic:
    """Bytes and requests of every S3 client that is made while it counts."""

    def __init__(self) -> None:
        self.bytes = 0
        self.requests = 0

    @contextmanager
    def counted(self) -> Iterator[Traffic]:
        """Count, on clients that are made inside."""
        import s3fs

        call, read = s3fs.S3FileSystem._call_s3, s3fs.S3FileSystem._cat_file

        async def counting_call(fs: Any, *arguments: Any, **named: Any) -> Any:
            self.requests += 1
            return await call(fs, *arguments, **named)

        async def counting_read(fs: Any, *arguments: Any, **named: Any) -> Any:
            content = await read(fs, *arguments, **named)
            self.bytes += len(content)
            return content

        # what is sent to workers is never pickled from here, so the classes' own names may stand for these for a while
        s3fs.S3FileSystem._call_s3, s3fs.S3FileSystem._cat_file = counting_call, counting_read
        try:
            yield self
        finally:
            s3fs.S3FileSystem._call_s3, s3fs.S3FileSystem._cat_file = call, read


@dataclass(frozen=True)
class Figure:
    """One measurement: wall and CPU seconds of this process, bytes and requests at the S3 client, rows answered."""

    what: str
    seconds: float
    cpu_seconds: float
    bytes: int
    requests: int
    rows: int


class Watch:
    """Measures one thing after the other and prints a line for each."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.figures: list[Figure] = []

    def __call__(self, what: str, work: Callable[[], int]) -> Figure:
        bytes_before, requests_before = self.traffic.bytes, self.traffic.requests
        wall, cpu = time.perf_counter(), time.process_time()
        rows = work()
        figure = Figure(
            what,
            time.perf_counter() - wall,
            time.process_time() - cpu,
            self.traffic.bytes - bytes_before,
            self.traffic.requests - requests_before,
            rows,
        )
        self.figures.append(figure)
        click.echo(
            f"{what:44}{figure.seconds:8.2f} s{figure.cpu_seconds:8.2f} s CPU{figure.bytes / 1e6:10.2f} MB"
            f"{figure.requests:7} requests{rows:9} rows"
        )
        return figure


def selective(made: Made) -> dict[str, str]:
    """One model and one site, ten columns: by the model's id, and by its name."""
    name, site = f"mlp-{made.runs * made.models // 2}", f"hidden{made.sites // 2}"
    return {
        "one model and site": f"SELECT {TEN} FROM neurons WHERE model = '{model_id(name)}' AND site = '{site}'",
        "one model by name, and site": f"SELECT {TEN} FROM neurons JOIN models USING (model) "
        f"WHERE name = '{name}' AND site = '{site}'",
    }


def measure(store: Store, made: Made, watch: Watch) -> None:
    """Views, a selective question in two forms and an aggregate, each on a new connection and again on the same."""
    for again in ("", ", again"):
        watch(f"views over {made.runs} runs{again}", lambda: _views(store))
    for what, sql in selective(made).items():
        with _connected(store) as con:
            for again in ("", ", again"):
                figure = watch(f"{what}{again}", lambda con=con, sql=sql: _rows(con, sql))  # type: ignore[misc]
                assert figure.rows == made.units, figure
    with _connected(store) as con:
        for again in ("", ", again", ", again"):
            assert watch(f"an aggregate{again}", lambda con=con: _rows(con, AGGREGATE)).rows == made.sites  # type: ignore[misc]


def _views(store: Store) -> int:
    with _connected(store) as con:
        return _rows(con, "FROM runs")


@contextmanager
def _connected(store: Store) -> Iterator[Connection]:
    con = connect(store, tables=TABLES)
    try:
        yield con
    finally:
        con.close()


def _rows(con: Connection, sql: str) -> int:
    return len(list(ask(con, sql).rows))


@contextmanager
def served() -> Iterator[str]:
    """A prefix in a bucket of a real S3 server that ends with this block."""
    from tests.servers import started_seaweed

    with tempfile.TemporaryDirectory(prefix="neuron-census-bench-") as folder:
        server = started_seaweed(Path(folder))
        names = {"AWS_ENDPOINT_URL": server.endpoint, "AWS_REGION": "us-east-1"}
        os.environ |= names | {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any-secret"}
        try:
            server.create_bucket("benchmark")
            yield "s3://benchmark/census"
        finally:
            server.close()


def written(store: Store, made: Made) -> None:
    """Write the store, unless it holds runs."""
    if store.folders("runs/"):
        return
    start = time.perf_counter()
    for number, _ in enumerate(write_store(store, made), 1):
        if number % max(1, made.runs // 20) == 0:
            click.echo(f"{number} of {made.runs} runs written, {time.perf_counter() - start:.0f} s", err=True)


@click.command(help=__doc__, epilog="It takes some minutes, most of them to write the store.")
@click.option("--runs", default=200, show_default=True)
@click.option("--models", default=10, show_default=True, help="Models of each run.")
@click.option("--sites", default=10, show_default=True, help="Sites of each model.")
@click.option("--units", default=500, show_default=True, help="Units of each site.")
@click.option("--store", "url", help="A store that exists already or is to be written; default: a server started here.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="File for the figures.")
def main(runs: int, models: int, sites: int, units: int, url: str | None, output: Path | None) -> None:
    made = Made(runs, models, sites, units)
    traffic = Traffic()
    watch = Watch(traffic)
    with traffic.counted(), served() if url is None else _nothing(url) as root:
        store = open_store(root)
        filesystem(root)
        written(store, made)
        click.echo(f"{made.rows} neuron rows of {runs * models} models in {runs} runs ({DATA}/{SPLIT}), {root}")
        for key in store.keys("catalogue/"):
            store.remove(key)
        click.echo("without a catalogue")
        measure(store, made, watch)
        watch("write the catalogue", lambda: len(write_catalogue(store).runs))
        click.echo("with a catalogue")
        measure(store, made, watch)
    if output:
        output.write_text(
            json.dumps({"made": asdict(made), "figures": [asdict(one) for one in watch.figures]}, indent=1)
        )


@contextmanager
def _nothing(url: str) -> Iterator[str]:
    yield url


if __name__ == "__main__":
    main()
