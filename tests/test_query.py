"""SQL over committed runs: which rows a view holds, whichever runs there are."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.base_columns import BASE
from pipeline.columns import Column
from pipeline.errors import StoreError
from pipeline.manifest import Coverage, manifest_key
from pipeline.query import QueryError, ask, connect
from pipeline.report.dictionary import all_columns
from pipeline.store import Store, open_store
from tests.asked import answers, opened, two_runs
from tests.handmade import model_id, write_run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return two_runs(str(tmp_path_factory.mktemp("store")))


def test_a_view_holds_the_latest_run_of_each_model(store: Store) -> None:
    sql = "SELECT DISTINCT models.name, run, z_mean FROM neurons JOIN models USING (run, model) ORDER BY ALL"
    assert answers(store, sql) == [
        ("cnn-0", "old", -0.5),
        ("cnn-0-init", "old", -0.5),
        ("mlp-0", "young", 1.0),
        ("mlp-0-init", "young", 1.0),
    ]


def test_the_all_view_holds_every_run(store: Store) -> None:
    assert answers(store, "SELECT run, count(*) FROM neurons_all GROUP BY run ORDER BY run") == [
        ("old", 28),
        ("young", 14),
    ]


def test_runs_are_listed_in_order_of_their_commits(store: Store) -> None:
    rows = answers(store, "SELECT run, name, models, failed, rows_read, splits FROM runs")
    assert rows == [("old", "handmade", 4, 0, 90, "digits/test"), ("young", "handmade", 2, 0, 90, "digits/test")]


def test_one_run_alone(store: Store) -> None:
    assert answers(store, "SELECT DISTINCT run FROM neurons", run="o") == [("old",)]
    with pytest.raises(QueryError, match=r"no committed run begins with 'yuong': did you mean 'young'\?"):
        connect(store, run="yuong")


def test_an_ambiguous_run_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "aa")
    write_run(store, "ab")
    with pytest.raises(QueryError, match="ambiguous: aa, ab"):
        connect(store, run="a")


def test_of_runs_of_the_same_time_the_greater_id_is_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    for run in ("b", "a"):
        write_run(store, run)
    same = datetime(2026, 1, 1, tzinfo=UTC)
    modified = store.modified
    monkeypatch.setattr(store, "modified", lambda prefix="": dict.fromkeys(modified(prefix), same))
    assert answers(store, "SELECT DISTINCT run FROM models") == [("b",)]


def test_a_run_on_other_data_does_not_hide_an_older_one(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a", data="digits")
    write_run(store, "b", data="letters")
    assert answers(store, "SELECT DISTINCT data, run FROM neurons ORDER BY ALL") == [("digits", "a"), ("letters", "b")]


def test_of_a_run_on_several_data_sets_only_the_measured_pairs_count(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a", data="letters")
    # the newer run knows the data set `letters`, but measured these models on `digits` alone
    both = {f"{name}/test": Coverage(total=10, read=10) for name in ("digits", "letters")}
    write_run(store, "b", data="digits", coverage=both)
    assert answers(store, "SELECT DISTINCT data, run FROM neurons ORDER BY ALL") == [("digits", "b"), ("letters", "a")]


def test_a_run_on_several_data_sets_hides_an_older_one_on_one(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a", data="digits")
    both = {f"{name}/test": Coverage(total=10, read=10) for name in ("digits", "letters")}
    write_run(store, "b", data="digits", coverage=both)
    assert answers(store, "SELECT DISTINCT data, run FROM neurons") == [("digits", "b")]


@pytest.mark.parametrize("names", [("mlp-0-init",), ()])
def test_a_run_in_which_a_model_failed_hides_none_in_which_it_did_not(tmp_path: Path, names: tuple[str, ...]) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a", tables=("models", "neurons"))
    write_run(store, "b", names, tables=("models", "neurons")[: 1 + len(names)], failed={"mlp-0": "no", "cnn-0": "bad"})
    latest = "SELECT name, run, status, reason FROM models ORDER BY name"
    assert answers(store, latest) == [
        ("cnn-0", "b", "failed", "bad"),
        ("mlp-0", "a", "ok", None),
        ("mlp-0-init", "b" if names else "a", "ok", None),
    ]
    assert answers(store, f"SELECT DISTINCT run FROM neurons WHERE model = '{model_id('mlp-0')}'") == [("a",)]
    write_run(store, "c", ("mlp-0", "cnn-0"), tables=("models", "neurons"))
    assert [(name, run) for name, run, *_ in answers(store, latest)][:2] == [("cnn-0", "c"), ("mlp-0", "c")]


def test_columns_that_only_some_runs_have_are_null_elsewhere(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a", ("mlp-0",))
    write_run(store, "b", ("cnn-0",), change={"later": 2.5}, more=[Column("later", "float64", "of a newer version")])
    rows = answers(store, "SELECT DISTINCT run, later, n FROM neurons ORDER BY run")
    assert rows == [("a", None, 100), ("b", 2.5, 100)]


def test_a_table_that_no_run_has_is_an_empty_view_with_its_columns(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a", tables=("models", "sites", "neurons"))
    with opened(store) as con:
        for table, columns in all_columns().items():
            if table in BASE and table not in ("models", "sites", "neurons"):
                answer = ask(con, f"FROM {table}")
                assert answer.columns == tuple(column.name for column in columns)
                assert list(answer.rows) == []
        assert len(list(ask(con, "SHOW TABLES").rows)) == 2 * len(BASE) + 1


def test_a_store_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no committed run; `neuron-census run JOB\.toml"):
        connect(open_store(str(tmp_path / "nothing")))
    assert not (tmp_path / "nothing").exists()


def test_uncommitted_tables_are_invisible(store: Store, tmp_path: Path) -> None:
    held = open_store(str(tmp_path))
    write_run(held, "a", ("mlp-0",))
    manifest = Path(held.url, manifest_key("a"))
    kept = manifest.read_bytes()
    write_run(held, "b", ("cnn-0",))
    Path(held.url, manifest_key("b")).unlink()
    assert answers(held, "SELECT DISTINCT run FROM neurons_all") == [("a",)]
    assert manifest.read_bytes() == kept
