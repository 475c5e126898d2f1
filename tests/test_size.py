"""Questions over a store of many runs: what they read and ask for on S3; and what readers make of files alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow.dataset as ds
import pytest

from benchmarks.queries import Figure, Traffic, Watch, measure
from benchmarks.stores import Made, model_id, write_store
from pipeline.catalogue import write_catalogue
from pipeline.columns import Column
from pipeline.filesystems import _s3
from pipeline.store import open_store
from tests.handmade import write_run
from tests.servers import Seaweed


@pytest.fixture
def traffic() -> Iterator[Traffic]:
    """What the S3 client of this test reads and asks for."""
    _s3.cache_clear()
    with Traffic().counted() as traffic:
        yield traffic
    _s3.cache_clear()


def figures(url: str, made: Made, traffic: Traffic) -> dict[str, Figure]:
    """By name: what each question took with a catalogue, the first time and again."""
    store = open_store(url)
    assert len(list(write_store(store, made))) == made.runs
    write_catalogue(store)
    watch = Watch(traffic)
    measure(store, made, watch)
    return {one.what: one for one in watch.figures}


def test_a_question_asks_a_bucket_for_what_it_needs(s3_url: str, traffic: Traffic) -> None:
    made = Made(runs=6, models=2, sites=2, units=50)
    found = figures(s3_url, made, traffic)
    # listings of catalogues and runs, the list of runs and what is known of two tables; whether each is committed still
    assert found["views over 6 runs"].requests <= 5 + made.runs
    for what in ("one model and site", "one model by name, and site"):
        assert found[what].requests <= 4
        assert 0 < found[what].bytes < 100_000
        assert (found[f"{what}, again"].requests, found[f"{what}, again"].bytes) == (0, 0)
    # the columns in question of every part, and nothing twice
    assert made.runs <= found["an aggregate"].requests <= 5 * made.runs
    assert found["an aggregate, again"].requests == 0


@pytest.mark.slow
@pytest.mark.real
def test_the_bounds_hold_on_a_real_server(seaweed: Seaweed, traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the rows in half of the runs.

    What a selective question reads is ten columns of one row group, of 65,536 rows at most, and what is known of the
    parts: 5 kB for each. An aggregate reads 8 bytes for each row and column, and its time when asked again is decoding.
    """
    for name, value in {"ENDPOINT_URL": seaweed.endpoint, "ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    seaweed.create_bucket("size")
    made = Made(runs=100, models=4, sites=5, units=50)
    found = figures("s3://size/census", made, traffic)
    known = found["views over 100 runs"]
    assert known.seconds < 1
    assert known.requests <= 5 + made.runs
    of_2000_models = 2 * known.bytes
    for what in ("one model and site", "one model by name, and site"):
        assert of_2000_models + found[what].bytes + 10 * 8 * 65_536 < 10e6
        assert found[what].requests < 20
    # 10 million rows are 100 times as many, of which decoding is linear
    again = found["an aggregate, again"]
    assert again.requests == 0
    assert again.seconds < 3


def test_files_alone_answer_where_columns_were_added(tmp_path: Path) -> None:
    """A raw glob over runs of two versions: what only the later has is null in the earlier."""
    store = open_store(str(tmp_path))
    write_run(store, "a", ("mlp-0",))
    write_run(store, "b", ("cnn-0",), change={"later": 2.5}, more=[Column("later", "float64", "of a newer version")])
    glob = f"{tmp_path}/runs/*/tables/neurons/*.parquet"
    expected = [("a", None), ("b", 2.5)]
    sql = f"SELECT DISTINCT run, later FROM read_parquet('{glob}', union_by_name = true) ORDER BY run"
    assert duckdb.connect().execute(sql).fetchall() == expected
    lazy = pl.concat(
        [pl.scan_parquet(path) for path in sorted(tmp_path.glob("runs/*/tables/neurons/*"))], how="diagonal"
    )
    assert lazy.select("run", "later").unique().sort("run").collect().rows() == expected
    frames = [pd.read_parquet(path) for path in sorted(tmp_path.glob("runs/*/tables/neurons/*.parquet"))]
    both = pd.concat([frame.reindex(columns=frames[1].columns) for frame in frames])
    assert both.groupby("run")["later"].first().dropna().to_dict() == {"b": 2.5}
    # Arrow takes the columns of the first file unless it is told those of the last
    newest = ds.dataset(sorted(map(str, tmp_path.glob("runs/b/tables/neurons/*"))))
    every = ds.dataset(sorted(map(str, tmp_path.glob("runs/*/tables/neurons/*"))), schema=newest.schema)
    assert sorted(set(zip(*every.to_table(["run", "later"]).to_pydict().values(), strict=True))) == expected


def test_made_up_rows_are_as_wide_as_the_dictionary(tmp_path: Path) -> None:
    made = Made(runs=1, models=2, sites=2, units=30)
    store = open_store(str(tmp_path))
    (run,) = write_store(store, made)
    table = pl.read_parquet(f"{tmp_path}/runs/{run}/tables/neurons/*.parquet")
    assert table.height == made.rows == 120
    assert table.null_count().sum_horizontal().item() == 0
    assert set(table["model"]) == {model_id(name) for name in made.names(0)}
    keys = table.select("model", "site", "unit").rows()
    assert len(set(keys)) == made.rows
