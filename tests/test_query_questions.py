"""What may be asked: nothing is written, mistakes are explained, answers come in any form."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline import query
from pipeline.errors import StoreError
from pipeline.query import Connection, QueryError, ask, ask_arrow, tables_in
from pipeline.report import printing
from pipeline.store import Store
from tests.asked import answers, opened, two_runs
from tests.handmade import model_id


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return two_runs(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def shared(store: Store) -> Iterator[Connection]:
    with opened(store) as con:
        yield con


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE mine AS FROM neurons",
        "DROP VIEW neurons",
        "COPY neurons TO '{outside}/x.csv'",
        "COPY neurons TO '{inside}/x.csv'",
        "COPY neurons TO 'census://runs/x.csv'",
        # DuckDB parses a COPY in a common table expression as a SELECT
        "WITH x AS (COPY (SELECT 1) TO '{outside}/x.csv') FROM x",
        "WITH x AS (COPY (SELECT 1) TO '{inside}/x.csv') FROM x",
        "WITH x AS (COPY (SELECT 1) TO 'census://runs/x.csv') FROM x",
        "WITH x AS (COPY (SELECT 1) TO 'census://{part}') FROM x",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{inside}/x.csv'",
        "ATTACH '{inside}/x.db'",
        "ATTACH 'census://x.db'",
        "EXPORT DATABASE '{inside}/x'",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "SELECT 1; DROP VIEW neurons",
        "FROM read_text('/etc/hostname')",
        "FROM glob('/*')",
        "FROM sniff_csv('/etc/passwd')",
        "FROM read_parquet('{inside}/{part}')",
        "FROM '{inside}/{part}'",
        "",
    ],
)
def test_nothing_is_written_and_nothing_else_is_read(
    store: Store, shared: Connection, tmp_path: Path, sql: str
) -> None:
    part = store.keys("runs/old/tables/neurons/")[0]
    before = store.modified()
    with pytest.raises((QueryError, StoreError)):
        list(ask(shared, sql.format(outside=tmp_path, inside=store.url, part=part)).rows)
    assert list(tmp_path.iterdir()) == []
    assert store.modified() == before
    assert sorted(path.name for path in Path(store.url).iterdir()) == ["models", "runs", "states"]


def test_mistakes_are_explained(store: Store) -> None:
    with opened(store) as con:
        with pytest.raises(QueryError, match=r"there is no table 'neuron': did you mean 'neurons'\?"):
            ask(con, "FROM neuron")
        with pytest.raises(QueryError, match=r"(?s)Referenced column \"fire_rat\" not found.*\"fire_rate\""):
            ask(con, "SELECT fire_rat FROM neurons")
        with pytest.raises(QueryError, match=r"(?s)syntax error at or near \"selec\".*LINE 1"):
            ask(con, "selec 1")
        with pytest.raises(QueryError, match="Could not convert"):
            list(ask(con, "SELECT site::INTEGER FROM neurons").rows)


def test_a_question_that_failed_leaves_the_connection_usable(store: Store) -> None:
    with opened(store) as con:
        begun = ask(con, "FROM neurons_all")
        next(begun.rows)
        with pytest.raises(QueryError):
            ask(con, "selec 1")
        assert list(ask(con, "SELECT count(*) FROM neurons").rows) == [(28,)]


def test_pivot_describe_explain_and_parameters(store: Store) -> None:
    with opened(store) as con:
        assert ask(con, "PIVOT neurons ON site USING count(*) GROUP BY run").columns == ("run", "head", "layers.0")
        assert ("template_cos", "DOUBLE") in [row[:2] for row in ask(con, "DESCRIBE neurons").rows]
        assert list(ask(con, "EXPLAIN FROM neurons").rows)
        counted = ask(con, "SELECT count(*) FROM neurons WHERE model = $model", {"model": model_id("mlp-0")})
        assert list(counted.rows) == [(7,)]


def test_null_nan_and_zero_stay_apart(store: Store) -> None:
    sql = (
        "SELECT DISTINCT site, unit, template_cos, fire_rate FROM neurons WHERE run = 'young' AND unit = 1 ORDER BY ALL"
    )
    rows = answers(store, sql)
    head, dead = rows[0], rows[-1]
    assert head[3] is None
    assert dead[3] == 0
    assert np.isnan(dead[2])


def test_data_frames_can_be_joined(store: Store) -> None:
    names = pd.DataFrame({"class": [0, 1, 2], "label": ["zero", "one", "two"]})
    with opened(store) as con:
        con.register("names", names)
        rows = con.sql("SELECT DISTINCT label FROM neurons JOIN names ON class = best_class ORDER BY 1").df()
    assert rows["label"].tolist() == ["one", "two", "zero"]


def test_arrow(store: Store) -> None:
    with opened(store) as con:
        table = ask_arrow(
            con,
            "SELECT unit, template_cos, weight FROM neurons JOIN patterns USING (run, model, data, split, site, unit)",
        ).read_all()
    assert table.num_rows == 28
    assert table.schema.types[:2] == [pa.int32(), pa.float64()]
    assert pa.types.is_list(table.schema.types[2])


def test_only_named_tables_are_opened(store: Store) -> None:
    with opened(store, tables={"sites"}) as con:
        assert [name for (name,) in ask(con, "SHOW TABLES").rows] == ["runs", "sites", "sites_all"]
    with opened(store, tables=tables_in("PIVOT neurons ON site USING count(*)")) as con:
        assert [name for (name,) in ask(con, "SHOW TABLES").rows] == ["neurons", "neurons_all", "runs"]
    with opened(store, tables=tables_in("SHOW TABLES")) as con:
        assert len(list(ask(con, "SHOW TABLES").rows)) > 10


def test_doctests() -> None:
    assert doctest.testmod(printing).failed == 0
    assert doctest.testmod(query).failed == 0
