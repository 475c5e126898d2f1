"""Tables: documented columns, plain types, null apart from NaN, the same bytes for the same rows."""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import pairwise

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import arrow_bytes as arrow_bytes_module
from pipeline import parquet
from pipeline.arrow_bytes import ArrowStream, arrow_bytes, read_arrow, read_batches
from pipeline.columns import Column
from pipeline.looked_over import look_over
from pipeline.parquet import parquet_bytes, read_parquet
from pipeline.report.dictionary import entries
from pipeline.tables import ARROW, arrow_table, dictionary, schema, table_columns

EVERY_TYPE = tuple(
    Column(name=f"c_{number}", dtype=dtype, meaning=f"a column of {dtype}") for number, dtype in enumerate(ARROW)
)


def one_column(dtype: str, values: object) -> pa.Array:
    column = Column(name="x", dtype=dtype, meaning="…")  # type: ignore[arg-type]
    return arrow_table("neurons", [column], {"x": values})["x"].combine_chunks()


def test_every_row_says_whose_it_is():
    for table in ("neurons", "histograms", "exemplars", "classes", "patterns", "edges"):
        names = [column.name for column in table_columns([])[table]]
        assert names[:6] == ["run", "model", "data", "split", "site", "unit"]
    assert all(columns[0].name == "run" for columns in table_columns([]).values())


def test_statistics_add_their_columns_behind_and_standard_errors_beside():
    mean = Column(name="z_mean", dtype="float64", meaning="mean of z", se=True)
    bin_ = Column(name="bin", dtype="int32", meaning="again", table="histograms")
    columns = table_columns([mean, bin_])
    assert [column.name for column in columns["neurons"]][6:] == ["z_mean", "z_mean_se"]
    assert columns["neurons"][-1].dtype == "float64"
    assert [column.name for column in columns["histograms"]].count("bin") == 1


def test_two_statistics_cannot_mean_different_types_by_one_name():
    columns = [Column(name="x", dtype=dtype, meaning="…") for dtype in ("int64", "float64")]
    with pytest.raises(ValueError, match=r"neurons\.x is declared as int64 and float64"):
        table_columns(columns)


def test_a_new_table_gets_the_keys_of_a_unit():
    columns = table_columns([Column(name="x", dtype="int64", meaning="…", table="lifts")])
    assert [column.name for column in columns["lifts"]] == ["run", "model", "data", "split", "site", "unit", "x"]


def test_every_column_of_ours_is_documented():
    for row in dictionary(table_columns([])):
        assert row["meaning"], row
        assert row["null"], row


def test_a_statistic_documents_a_column_of_ours_that_it_repeats():
    class_ = Column(name="class", dtype="int32", meaning="…", unit="class", range="[0, C)", table="classes")
    columns = table_columns([class_])["classes"]
    assert columns == (*table_columns([])["classes"][:-1], class_)
    again = Column(name="class", dtype="int32", meaning="of another statistic", table="classes")
    assert table_columns([class_, again])["classes"] == columns


def test_what_is_measured_has_a_unit():
    units = {(row["table"], row["column"]): row["unit"] for row in entries()}
    patterns = {name: units["patterns", name] for name in ("weight", "raw_weight", "up_weight", "cov", "sta", "bias")}
    assert patterns == dict.fromkeys(["weight", "raw_weight", "up_weight"], units["neurons", "weight_norm"]) | {
        "cov": "a·x",
        "sta": "x",
        "bias": "z",
    }
    assert (units["receipts", "bytes"], units["sites", "error"], units["models", "train_loss"]) == ("bytes", "1", "nat")
    assert (units["classes", "class"], units["exemplars", "rank"]) == ("class", "index")
    assert not [row for row in entries() if row["type"] == "float64" and not row["unit"]]


def test_documentation_travels_in_the_file():
    column = Column(
        name="fire_rate",
        dtype="float64",
        meaning="share of presentations with z > 0",
        range="[0, 1]",
        null="null where the gate is identity",
        formula="n_fired / n",
        source="definition",
        version=3,
    )
    table = arrow_table("neurons", [column], {"fire_rate": torch.tensor([0.5])})
    read = pq.read_schema(io.BytesIO(parquet_bytes(table)))
    metadata = {key.decode(): value.decode() for key, value in read.field("fire_rate").metadata.items()}
    assert metadata == {
        "meaning": "share of presentations with z > 0",
        "unit": "1",
        "range": "[0, 1]",
        "null": "null where the gate is identity",
        "formula": "n_fired / n",
        "source": "definition",
        "version": "3",
    } | {key: value for key, value in metadata.items() if key.startswith("PARQUET:")}
    assert read.metadata[b"table"] == b"neurons"


def test_null_nan_and_zero_stay_apart():
    values = torch.tensor([0.0, float("nan"), 7.0])
    array = one_column("float64", (values, torch.tensor([True, True, False])))
    assert array.null_count == 1
    assert array[0].as_py() == 0.0
    assert np.isnan(array[1].as_py())
    assert array[2].as_py() is None
    assert one_column("float64", values).null_count == 0


def test_a_column_without_values_is_null_and_one_value_is_for_all():
    columns = table_columns([])["neurons"]
    table = arrow_table("neurons", columns, {"run": "r", "unit": torch.arange(3)})
    assert table["run"].to_pylist() == ["r"] * 3
    assert table["model"].null_count == 3
    assert table.schema == schema("neurons", columns)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.arange(6.0).reshape(2, 3), [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]),
        (torch.arange(6.0).reshape(3, 2).T, [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]),
        ([torch.tensor([1.0]), torch.tensor([])], [[1.0], []]),
        ([torch.tensor([1.0]), None], [[1.0], None]),
        ((torch.ones(2, 2), torch.tensor([False, True])), [None, [1.0, 1.0]]),
        (torch.zeros(0, 3), []),
    ],
)
def test_lists_of_numbers(values: object, expected: list):
    array = one_column("list<float32>", values)
    assert array.type == pa.list_(pa.float32())
    assert array.to_pylist() == expected


def test_bfloat16_and_tensors_with_gradients_are_taken():
    assert one_column("float32", torch.ones(2, requires_grad=True)).to_pylist() == [1.0, 1.0]
    assert one_column("float32", torch.ones(2, dtype=torch.bfloat16)).to_pylist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("int64", torch.tensor([0.5])),
        ("int32", torch.tensor([2**40])),
        ("int64", ["a"]),
        ("string", torch.tensor([1])),
        ("bool", torch.tensor([2])),
    ],
)
def test_values_of_another_type_are_refused(dtype: str, values: object):
    with pytest.raises(ValueError, match=rf"neurons\.x is declared as {dtype}"):
        one_column(dtype, values)


def test_columns_of_other_lengths_or_names_are_refused():
    columns = table_columns([])["neurons"]
    with pytest.raises(ValueError, match="differ in length"):
        arrow_table("neurons", columns, {"unit": torch.arange(3), "site": ["a"]})
    with pytest.raises(ValueError, match=r"no columns \['unitt'\]"):
        arrow_table("neurons", columns, {"unitt": torch.arange(3)})


def every_type(rows: int) -> pa.Table:
    index = torch.arange(rows)
    values: list[object] = [
        index,
        index * 2**40,
        index.float(),
        index.double(),
        [f"row {number}" for number in range(rows)],
        index % 2 == 0,
        [number * 1_000_000 for number in range(rows)],
        torch.rand(rows, 4, generator=torch.Generator().manual_seed(0)),
        [torch.arange(number % 3) for number in range(rows)],
        [[f"name {place}" for place in range(number % 3)] for number in range(rows)],
    ]
    return arrow_table("every", EVERY_TYPE, dict(zip([column.name for column in EVERY_TYPE], values, strict=True)))


def test_every_reader_sees_the_same_rows(tmp_path):
    table = every_type(10)
    path = tmp_path / "every.parquet"
    path.write_bytes(parquet_bytes(table))
    assert pq.read_table(path).equals(table)
    assert pl.read_parquet(path).to_arrow()["c_1"].to_pylist() == table["c_1"].to_pylist()
    assert pd.read_parquet(path)["c_4"].tolist() == table["c_4"].to_pylist()
    with duckdb.connect() as connection:
        rows = connection.execute(
            f"select sum(c_1), count(c_5), max(len(c_7)), typeof(any_value(c_6)), max(len(c_9)) from '{path}'"
        )
        assert rows.fetchone() == (sum(range(10)) * 2**40, 10, 4, "TIMESTAMP WITH TIME ZONE", 2)


@pytest.mark.parametrize(("where", "count"), [("isnan(x)", 2), ("NOT isnan(x)", 3), ("x <= 1", 2), ("x > 1e9", 2)])
def test_readers_that_skip_by_statistics_count_nan_as_they_do_in_memory(tmp_path, where, count):
    table = pa.table({"x": [0.5, float("nan"), 1.0, float("nan"), 2.0], "y": [[1.0], [float("nan")], [], None, [2.0]]})
    path = tmp_path / "nan.parquet"
    path.write_bytes(parquet_bytes(table))
    with duckdb.connect() as connection:
        connection.register("held", table)
        for of in (f"'{path}'", "held"):
            assert connection.execute(f"SELECT count(*) FROM {of} WHERE {where}").fetchone() == (count,)
    assert {pq.read_metadata(path).row_group(0).column(leaf).is_stats_set for leaf in (0, 1)} == {False}


def test_the_same_rows_are_the_same_bytes_however_they_are_chunked():
    table = every_type(1000)
    pieces = pa.concat_tables([table.slice(0, 300), table.slice(300, 1), table.slice(301)])
    assert parquet_bytes(pieces) == parquet_bytes(table)


@pytest.mark.parametrize("bounds", [[0], [300, 300, 301], [7, 640, 930]])
@pytest.mark.parametrize("models", [1, 3, 200])
def test_a_table_that_comes_in_pieces_is_the_same_bytes(
    bounds: list[int], models: int, monkeypatch: pytest.MonkeyPatch
):
    ids = pa.array([f"{number * models // 1000:04}" for number in range(1000)])
    table = every_type(1000).append_column("model", ids)
    # as they are read: that of one model at once, those of several each for itself
    read = [
        read_arrow(arrow_bytes(part)) for part in ([table] if models == 1 else [table.slice(0, 500), table.slice(500)])
    ]
    table = pa.concat_tables(read).combine_chunks()
    for group_bytes in (64 << 20, 90 * table.nbytes // 1000):
        monkeypatch.setattr(parquet, "GROUP_BYTES", group_bytes)
        expected = parquet_bytes(table)
        assert look_over([table]).bytes == table.nbytes
        with monkeypatch.context() as patch:
            patch.setattr(parquet, "PIECE_BYTES", 1)
            parts = [table.slice(first, last - first) for first, last in pairwise([0, *bounds, 1000])]
            assert parquet.parquet_of(lambda parts=parts: iter(parts)) == expected
            assert look_over(parts).bytes == table.nbytes


def test_rows_on_their_way_come_in_batches(monkeypatch: pytest.MonkeyPatch):
    table = every_type(1000)
    whole = arrow_bytes(table)
    stream = ArrowStream()
    for start in range(0, 1000, 100):
        stream.add(table.slice(start, 100))
    assert stream.close() == whole, "a small one is one batch, however it was given"
    monkeypatch.setattr(arrow_bytes_module, "BATCH_BYTES", table.nbytes // 10)
    stream = ArrowStream()
    for start, stop in pairwise([0, 10, 900, 1000]):
        stream.add(table.slice(start, stop - start))
    content = stream.close()
    batches = list(read_batches(content))
    assert stream.rows == 1000
    assert max(one.nbytes for one in batches) < table.nbytes / 5
    assert len(batches) > 8
    assert read_arrow(content).equals(table)
    assert batches[0].schema.equals(table.schema, check_metadata=True)


@pytest.mark.parametrize("rows", [0, 1, 1000])
def test_rows_on_their_way_are_the_same_rows_documentation_and_bytes(rows):
    table = every_type(rows)
    gaps = pa.table(
        [column.take(pa.array([*range(rows), None], pa.int64())) for column in table.columns], schema=table.schema
    )
    for given in (table, gaps, pa.concat_tables([gaps.slice(0, 300), gaps.slice(300)])):
        content = arrow_bytes(given)
        back = read_arrow(content)
        assert back.equals(given)
        assert back.schema.equals(given.schema, check_metadata=True)
        assert parquet_bytes(back) == parquet_bytes(given)
        assert parquet_bytes(read_parquet(parquet_bytes(back))) == parquet_bytes(given)
        assert arrow_bytes(given.combine_chunks()) == arrow_bytes(back) == content


def test_rows_on_their_way_are_refused_if_a_bit_was_changed_or_a_byte_lost():
    content = arrow_bytes(every_type(100))
    changed = [
        content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        for place in [*range(0, len(content), 7), *range(len(content) - 40, len(content))]
    ]
    for bad in (*changed, content[:-1], content[1:], content + b"\0", content[:40], content[:39], b""):
        with pytest.raises(pa.ArrowInvalid, match="not those that were written"):
            next(read_batches(bad))
    with pa.CompressedInputStream(pa.BufferReader(content), "zstd") as frame:
        assert pa.ipc.open_stream(frame).read_all().num_rows == 100, "for other readers an Arrow stream in zstd"


def test_the_same_rows_are_the_same_bytes_in_another_process():
    code = (
        "import sys, hashlib; sys.path.insert(0, 'tests'); import test_tables; "
        "print(hashlib.sha256(test_tables.parquet_bytes(test_tables.every_type(100))).hexdigest())"
    )
    digests = {subprocess.check_output([sys.executable, "-c", code]) for _ in range(2)}
    assert len(digests) == 1


def test_row_groups_are_small_in_rows_and_in_bytes():
    unit = Column(name="unit", dtype="int32", meaning="…")
    long = arrow_table("neurons", [unit], {"unit": torch.arange(200_000)})
    assert pq.read_metadata(io.BytesIO(parquet_bytes(long))).row_group(0).num_rows == 65_536
    pattern = Column(name="weight", dtype="list<float32>", meaning="…")
    wide = arrow_table("patterns", [pattern], {"weight": torch.zeros(3000, 8192)})
    assert pq.read_metadata(io.BytesIO(parquet_bytes(wide))).row_group(0).num_rows < 2100


def test_a_table_without_rows_keeps_its_columns():
    columns = table_columns([])["neurons"]
    table = pq.read_table(io.BytesIO(parquet_bytes(arrow_table("neurons", columns, {"unit": torch.arange(0)}))))
    assert table.num_rows == 0
    assert table.schema.names == [column.name for column in columns]
