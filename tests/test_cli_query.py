"""`neuron-census query`: formats, files, mistakes, and the questions that it knows."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline.store import open_store
from tests.command_line import call, refused
from tests.handmade import write_run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("store"))
    write_run(open_store(url), "aaaa", ("mlp-0", "mlp-0-init"))
    return url


def test_query_prints_a_table(store: str) -> None:
    result = call("query", "SELECT site, count(*) AS units FROM neurons GROUP BY site ORDER BY site", store=store)
    assert result.stdout.splitlines() == [
        "site      units",
        "───────────────",
        "head          6",
        "layers.0      8",
    ]


def test_a_small_number_is_printed_with_its_digits(store: str) -> None:
    def printed(*numbers: str) -> list[str]:
        sql = f"SELECT x::DOUBLE AS x FROM (VALUES {', '.join(f'({number})' for number in numbers)}) t(x)"
        return [line.strip() for line in call("query", sql, store=store).stdout.splitlines()[2:]]

    assert printed("0.00006", "0.5", "-0.00004") == ["6.0e-05", "0.5000", "-4.0e-05"]
    assert printed("0.5", "0.00099999", "'-0.0'") == ["0.5000", "0.0010", "0.0000"]
    assert printed("0.00083", "-0.0012", "0.7", "0") == ["0.00083", "-0.0012", "0.7000", "0.0000"]
    assert printed("12.5", "0.25", "0.004") == ["12.50", "0.25", "0.0040"]
    assert printed("345.21", "0.25") == ["345.2", "0.25"]


def test_query_reads_stdin_and_says_if_there_are_more_rows(store: str) -> None:
    result = call("query", "-", "--rows", "3", store=store, text="SELECT unit FROM neurons")
    assert result.stdout.splitlines()[-1] == "the first 3 rows; --rows 0 prints all, --format csv writes all"
    assert len(result.stdout.splitlines()) == 6
    assert len(call("query", "SELECT unit FROM neurons", "--rows", "0", store=store).stdout.splitlines()) == 16
    assert call("query", "FROM neurons WHERE unit > 99", store=store).stdout.startswith("no rows (run, model, ")


def test_query_writes_csv(store: str) -> None:
    sql = (
        "SELECT unit, fire_rate, template_cos, weight FROM neurons "
        "JOIN patterns USING (run, model, data, split, site, unit) ORDER BY model, site, unit LIMIT 5"
    )
    rows = list(csv.DictReader(call("query", sql, "--format", "csv", store=store).stdout.splitlines()))
    # null, zero and NaN are three things
    assert rows[0]["fire_rate"] == ""
    assert (float(rows[4]["fire_rate"]), rows[4]["template_cos"]) == (0.0, "nan")
    assert json.loads(rows[0]["weight"])[0] == -1.0


def test_query_writes_json(store: str) -> None:
    sql = "SELECT site, unit, fire_rate, template_cos FROM neurons WHERE unit = 1 ORDER BY site, template_cos"
    rows = json.loads(call("query", sql, "--format", "json", store=store).stdout)
    assert rows[0] == {"site": "head", "unit": 1, "fire_rate": None, "template_cos": 0.25}
    assert rows[-1] == {"site": "layers.0", "unit": 1, "fire_rate": 0.0, "template_cos": "NaN"}
    assert json.loads(call("query", "FROM neurons WHERE unit > 9", "--format", "json", store=store).stdout) == []


def test_a_decimal_is_a_number_in_json(store: str) -> None:
    sql = "SELECT 1.50 AS one, [0.25] AS some, {'a': -2.75} AS named, 1.50::VARCHAR AS text, sum(parameters) AS whole"
    (row,) = json.loads(call("query", f"{sql} FROM models", "--format", "json", store=store).stdout)
    assert row == {"one": 1.5, "some": [0.25], "named": {"a": -2.75}, "text": "1.50", "whole": 200}
    # of more digits than readers keep, all of them
    sql = "SELECT 12345678901234567890.123::DECIMAL(38, 3) AS long"
    assert json.loads(call("query", sql, "--format", "json", store=store).stdout) == [
        {"long": "12345678901234567890.123"}
    ]
    written = call("query", "SELECT 1.50 AS one", "--format", "csv", store=store).stdout
    assert written == "one\n1.50\n"


def test_columns_of_one_name_are_numbered_alike_in_every_format(store: str, tmp_path: Path) -> None:
    sql = (
        "SELECT a.name, b.name, a.parameters, b.parameters + 1 AS parameters, 7 AS name_1 FROM models a "
        "JOIN models b ON b.model = a.control"
    )
    names = ["name", "name_2", "parameters", "parameters_1", "name_1"]
    row = ["mlp-0", "mlp-0-init", 100, 101, 7]
    (written,) = json.loads(call("query", sql, "--format", "json", store=store).stdout)
    assert list(written.items()) == list(zip(names, row, strict=True))
    assert call("query", sql, "--format", "csv", store=store).stdout.splitlines()[0] == ",".join(names)
    assert call("query", sql, store=store).stdout.splitlines()[0].split() == names
    target = tmp_path / "out.parquet"
    assert call("query", sql, "-o", str(target), store=store).exit_code == 0
    for columns in (pq.read_table(target).to_pydict(), pl.read_parquet(target).to_dict(as_series=False)):
        assert list(columns.items()) == [(name, [value]) for name, value in zip(names, row, strict=True)]


def test_query_writes_a_file_whole_or_not_at_all(store: str, tmp_path: Path) -> None:
    target = tmp_path / "out.parquet"
    assert call("query", "FROM neurons", "-o", str(target), store=store).exit_code == 0
    table = pq.read_table(target)
    assert (table.num_rows, str(table.schema.field("unit").type)) == (14, "int32")
    refused(
        call("query", "SELECT site::INT FROM neurons", "-o", str(tmp_path / "bad.csv"), store=store),
        "Could not convert",
    )
    refused(
        call("query", "FROM neurons", "-o", str(tmp_path / "a" / "b.csv"), store=store), "cannot be written: No such"
    )
    refused(call("query", "FROM neurons", "-o", str(tmp_path / "a.txt"), store=store), "name the file .csv, .json or")
    assert os.listdir(tmp_path) == ["out.parquet"]


def test_query_refuses_mistakes(store: str) -> None:
    refused(call("query", "SELECT nme FROM models", store=store), 'Referenced column "nme" not found', "LINE 1:")
    refused(call("query", "DROP VIEW neurons", store=store), "tables of committed runs are never written")
    known = "collapse, detectors, families, idle, patterns, words"
    refused(call("query", store=store), f"expected either SQL or --question NAME; known: {known}")
    refused(call("query", "--question", "pattern", store=store), "did you mean 'patterns'?")
    refused(call("query", "FROM runs", "--run", "b", store=store), "no committed run begins with 'b'")


@pytest.mark.parametrize("columns", [80, 120])
def test_the_three_questions_fit_the_terminal(store: str, columns: int) -> None:
    for name in ("patterns", "idle", "detectors"):
        result = call("query", "--question", name, store=store, columns=columns)
        assert result.exit_code == 0
        assert max(map(len, result.stdout.splitlines())) <= columns
        assert "…" not in result.stdout
        assert "than fit" not in result.stdout


def test_the_questions_are_answered(store: str) -> None:
    def answer(name: str) -> list[list[str]]:
        rows = call("query", "--question", name, "--format", "csv", store=store).stdout.splitlines()
        return list(csv.reader(rows))[1:]

    patterns = answer("patterns")
    # the dead unit's cosine is undefined: three of four units
    assert patterns[0] == ["mlp", "layers.0", "3", "0.25", "0.75", "0.5", "0.0625", "1.0", "digits/test"]
    assert [row[1] for row in patterns] == ["layers.0", "head"]
    assert answer("idle") == [["mlp-0", "layers.0", "digits", "4", "1", "1", "0.97", "2~3"]]
    detectors = answer("detectors")
    # it fires in 30 rows, 20 of them of the 30 rows of class 2
    assert [row[:5] for row in detectors] == [
        [str(c), "mlp-0", "layers.0", "0", str([0.0, 0.2, 0.5][c])] for c in range(3)
    ]


def test_a_question_about_what_was_not_measured_says_so(tmp_path: Path) -> None:
    url = str(tmp_path)
    write_run(open_store(url), "a", tables=("models", "sites"))
    result = call("query", "--question", "idle", store=url)
    assert result.exit_code == 0
