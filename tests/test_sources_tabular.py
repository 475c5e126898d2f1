"""Tables: values by number, numbers of one scale, what training has not seen unknown; counted in one mergeable pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError, JobError
from pipeline.job import Columns, DataSpec
from pipeline.rows.tally import Moments, Numbering, tallied
from pipeline.sources.tabular import Tabular
from pipeline.store import open_store

COLUMNS = Columns(features=("age", "hours"), label="rich", split="split")
CATEGORIES = ("work", "code")


def people(rows: int, *, seed: int = 0, split: str | None = None) -> pa.Table:
    generator = np.random.default_rng(seed)
    return pa.table(
        {
            "age": pa.array(generator.integers(17, 90, rows)),
            "hours": generator.normal(40, 10, rows),
            "work": pa.array(generator.choice(["private", "state", "none"], rows, p=[0.7, 0.2, 0.1])),
            "code": pa.array(generator.integers(0, 4, rows)),
            "rich": generator.integers(0, 2, rows),
            "split": [split] * rows if split else generator.choice(["train", "test"], rows).tolist(),
        }
    )


def tabular(url: Path, *, store: str = "memory://tabular", options: dict[str, Any] | None = None) -> Tabular:
    given = {"categories": CATEGORIES} if options is None else options
    return Tabular("rows", DataSpec(url=str(url), columns=COLUMNS, classes=2, options=given), open_store(store))


def read(source: Tabular, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [batch for chunk in source.chunks(split) for batch in source.read(chunk, 7)]
    return tuple(torch.cat([batch.inputs[index] for batch in batches]) for index in (0, 1))  # type: ignore[return-value]


def test_rows_are_numbers_of_one_scale_and_numbered_categories(tmp_path: Path):
    table = people(200)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    source = tabular(tmp_path, store=str(tmp_path / "store"))
    rows = table.to_pandas()
    train, test = rows[rows.split == "train"], rows[rows.split == "test"]
    x, category = read(source, "test")
    expected = (test[["age", "hours"]] - train[["age", "hours"]].mean()) / train[["age", "hours"]].std(ddof=0)
    np.testing.assert_allclose(x.numpy(), expected.to_numpy(), rtol=1e-5, atol=1e-6)
    for column, name in enumerate(CATEGORIES):
        counts = train[name].astype(str).value_counts()
        order = sorted(counts.index, key=lambda value: (-counts[value], value))
        assert category[:, column].tolist() == [order.index(str(value)) + 1 for value in test[name]]
        assert source.categories[column] == len(order) + 1
    assert (source.shape, source.classes) == ((2,), 2)


def test_what_training_has_not_seen_is_unknown(tmp_path: Path):
    seen = people(50, split="train")
    new = people(3, seed=1, split="test").set_column(2, "work", pa.array(["abroad", None, "private"]))
    pq.write_table(seen, tmp_path / "a.parquet")
    pq.write_table(new, tmp_path / "b.parquet")
    _, category = read(tabular(tmp_path, store=str(tmp_path / "store")), "test")
    assert category[:, 0].tolist() == [0, 0, 1]


def test_rare_values_are_unknown_and_the_most_frequent_are_kept(tmp_path: Path):
    work = ["a"] * 5 + ["b"] * 3 + ["c"] * 3 + ["d"]
    pq.write_table(people(12, split="train").set_column(2, "work", pa.array(work)), tmp_path / "a.parquet")
    options = {"categories": ("work",), "min_count": 2, "max_values": 2}
    source = tabular(tmp_path, store=str(tmp_path / "store"), options=options)
    assert read(source, "train")[1][:, 0].tolist() == [1] * 5 + [2] * 3 + [0] * 4


def test_it_is_counted_once_and_decides_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pq.write_table(people(60), tmp_path / "a.parquet")
    store = str(tmp_path / "store")
    source = tabular(tmp_path, store=store)
    before = source.chunks("test")
    monkeypatch.setattr(Tabular, "training_rows", lambda self, features: pytest.fail("counted again"))
    assert tabular(tmp_path, store=store).chunks("test") == before
    monkeypatch.undo()
    pq.write_table(people(40, seed=5, split="test"), tmp_path / "b.parquet")
    assert set(before) < set(tabular(tmp_path, store=store).chunks("test")), "test rows decide no value"
    pq.write_table(people(40, seed=6, split="train"), tmp_path / "c.parquet")
    assert not set(before) & set(tabular(tmp_path, store=store).chunks("test"))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from([None, "a", "b", "c"]), st.one_of(st.none(), st.floats(-1e6, 1e6))), max_size=40
    ),
    st.integers(0, 40),
)
def test_a_tally_is_that_of_its_parts(rows: list[tuple[str | None, float | None]], cut: int):
    def table(part: list[tuple[str | None, float | None]]) -> dict[str, pa.Array]:
        texts, numbers = ([row[index] for row in part] for index in (0, 1))
        return {"t": pa.array(texts, pa.string()), "n": pa.array(numbers, pa.float64())}

    merged = tallied([table(rows[:cut])], ["t"], ["n"]).merge(tallied([table(rows[cut:])], ["t"], ["n"]))
    together = tallied([table(rows[:cut]), table(rows[cut:])], ["t"], ["n"])
    assert merged.counts == together.counts
    numbers = [number for _, number in rows if number is not None]
    for found in (merged.moments["n"], together.moments["n"]):
        assert found.n == len(numbers)
        if numbers:
            np.testing.assert_allclose(found.mean, np.mean(numbers), rtol=1e-9, atol=1e-6)
            np.testing.assert_allclose(found.square, np.var(numbers) * len(numbers), rtol=1e-6, atol=1e-3)


def test_what_never_varies_is_not_blown_up():
    assert Moments(3, 5.0, 0.0).std == 1.0


@pytest.mark.parametrize("more", [0, 200])
def test_dictionaries_that_differ_are_told_apart(more: int):
    numbering = Numbering(("red", "green", "blue", *map(str, range(more))))
    words = ["red", "blue", "pink", None, "green"]
    for _ in range(3):
        for order in (words, words[::-1]):
            column = pa.array(order, pa.string()).dictionary_encode()
            expected = [{"red": 1, "green": 2, "blue": 3}.get(word or "", 0) for word in order]
            assert numbering.of(column).tolist() == expected
            assert numbering.of(column.slice(2)).tolist() == expected[2:]
            assert numbering.of(pa.array(order)).tolist() == expected


def test_a_null_number_is_unreadable_and_a_null_category_is_not(tmp_path: Path):
    table = people(4, split="train").set_column(0, "age", pa.array([20, None, 40, 60]))
    pq.write_table(table.set_column(2, "work", pa.array(["x", "y", None, "x"])), tmp_path / "a.parquet")
    source = tabular(tmp_path, store=str(tmp_path / "store"))
    with pytest.raises(DataError, match="row 1: column 'age' is null; 1 of 4 rows"):
        read(source, "train")


def not_utf8(texts: list[bytes]) -> pa.Array:
    """Strings as a damaged file, or a careless writer, has them."""
    return pa.array(texts, pa.binary()).view(pa.string())


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("values", [4, 200])
def test_a_category_that_is_no_text_is_unknown(tmp_path: Path, values: int, encoded: bool):
    names = [str(value).encode() for value in range(values)]
    work = not_utf8([*names, b"\xffx"])
    train = people(values + 1, split="train").set_column(2, "work", work.dictionary_encode() if encoded else work)
    few = not_utf8([b"3", b"\xffx"])
    test = people(2, split="test").set_column(2, "work", few.dictionary_encode() if encoded else few)
    pq.write_table(train, tmp_path / "a.parquet")
    pq.write_table(test, tmp_path / "b.parquet")
    source = tabular(tmp_path, store=str(tmp_path / "store"))
    assert source.categories[0] == values + 1
    (known, unknown), _ = read(source, "test")[1].T
    assert (known > 0, unknown) == (True, 0)


def test_numbers_beyond_float32_are_in_no_scale():
    given = pa.array([1e300, -1e200, 1.0, 3.0, float("inf")])
    moments = tallied([{"x": given}, {"x": pa.array([2.0, 1e250])}], (), ("x",)).moments["x"]
    assert (moments.n, moments.mean) == (3, 2.0)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (Columns(features="age", split="split"), {}, r"columns\.features: a table has an array of names"),
        (Columns(split="split"), {}, r"options\.categories: missing, as are columns\.features"),
        (COLUMNS, {"category": ("work",)}, r"options\.category = .*did you mean 'categories'"),
    ],
)
def test_what_the_job_gets_wrong_is_named(tmp_path: Path, columns: Columns, options: dict[str, Any], message: str):
    pq.write_table(people(4), tmp_path / "a.parquet")
    with pytest.raises(JobError, match=message):
        Tabular(
            "t", DataSpec(url=str(tmp_path), columns=columns, classes=2, options=options), open_store("memory://t")
        ).chunks("train")


def test_columns_that_are_not_there(tmp_path: Path):
    pq.write_table(people(4), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: there is no column 'wrok'; did you mean 'work'"):
        tabular(tmp_path, options={"categories": ("wrok",)}, store=str(tmp_path / "store")).chunks("train")


def test_labels_out_of_range(tmp_path: Path):
    pq.write_table(people(3).set_column(4, "rich", pa.array([0, 1, 2])), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: labels 0 to 2 in column 'rich', expected 0 to 1"):
        tabular(tmp_path, store=str(tmp_path / "store")).chunks("train")
