"""Tables: values by number, numbers of one scale, what training has not seen unknown; counted in one mergeable pass."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError, JobError, SpoiltObject
from pipeline.executor import InlineExecutor
from pipeline.job import load_job
from pipeline.job_sections import Columns, DataSpec
from pipeline.manifest import read_manifest
from pipeline.rows.tally import UNSEEN, Moments, Numbering, Vocabulary, forget_parsed, tallied
from pipeline.run import run
from pipeline.sources.tabular import Tabular
from pipeline.store import open_store
from tests.census import run_inline

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
    forget_parsed()
    monkeypatch.setattr(Tabular, "training_rows", lambda self, features: pytest.fail("counted again"))
    assert tabular(tmp_path, store=store).chunks("test") == before
    monkeypatch.undo()
    pq.write_table(people(40, seed=5, split="test"), tmp_path / "b.parquet")
    assert set(before) < set(tabular(tmp_path, store=store).chunks("test")), "test rows decide no value"
    pq.write_table(people(40, seed=6, split="train"), tmp_path / "c.parquet")
    assert not set(before) & set(tabular(tmp_path, store=store).chunks("test"))


def test_a_process_reads_and_parses_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pq.write_table(people(60), tmp_path / "a.parquet")
    parsed: list[str] = []
    of = Vocabulary.of
    monkeypatch.setattr(Vocabulary, "of", lambda found: parsed.append("once") or of(found))
    names = [tabular(tmp_path, store=str(tmp_path / "store")).names for _ in range(3)]
    assert names[1:] == names[:1] * 2
    assert set(names[0].values[0]) == {UNSEEN, "private", "state", "none"}
    assert parsed == ["once"]
    few = {"categories": CATEGORIES, "max_values": 1}
    assert tabular(tmp_path, store=str(tmp_path / "store"), options=few).categories == (2, 2)
    assert tabular(tmp_path, store=str(tmp_path / "other")).names == names[0]
    assert len(parsed) == 3, "of other options, or in another store, it is another one"


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


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 1e30, -7e-3])
@pytest.mark.parametrize("parts", [[1000], [999, 1], [7] * 30, [0, 3, 0]])
def test_what_never_varies_is_not_blown_up(value: float, parts: list[int]):
    rows = [{"x": pa.array([value] * part, pa.float64())} for part in parts]
    moments = tallied(rows, (), ("x",)).moments["x"]
    assert (moments.std, moments.mean) == (1.0, pytest.approx(value, rel=1e-15))
    varied = tallied([*rows, {"x": pa.array([value * 1.5])}], (), ("x",)).moments["x"]
    assert varied.std == pytest.approx(np.std([*[value] * sum(parts), value * 1.5]), rel=1e-12)
    assert Moments().std == 1.0


def test_a_column_that_training_never_sees_vary_stays_what_it_is(tmp_path: Path):
    train, test = people(1000, split="train"), people(10, seed=1, split="test")
    pq.write_table(train.set_column(1, "hours", pa.array([0.1] * 1000)), tmp_path / "a.parquet", row_group_size=300)
    pq.write_table(test.set_column(1, "hours", pa.array([0.3] * 10)), tmp_path / "b.parquet")
    source = tabular(tmp_path, store=str(tmp_path / "store"))
    assert read(source, "train")[0][:, 1].abs().max() < 1e-9
    np.testing.assert_allclose(read(source, "test")[0][:, 1], 0.2, rtol=1e-6)


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
    with pytest.raises(DataError, match=r"row 1: column 'age' is null, and options\.fill is not set; 1 of 4 rows"):
        read(source, "train")


@pytest.mark.parametrize("fill", [None, 0])
def test_rows_that_are_unreadable_are_not_counted(tmp_path: Path, fill: float | None):
    rows = 200
    table, lacking = people(rows, split="train"), np.arange(rows) % 2 == 1
    hours = table["hours"].to_numpy() + 100 * lacking
    work = np.where(lacking, "only there", table["work"].to_numpy())
    table = table.set_column(0, "age", pa.array(table["age"].to_numpy(), mask=lacking))
    table = table.set_column(1, "hours", pa.array(hours)).set_column(2, "work", pa.array(work))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    options = {"categories": CATEGORIES, **({} if fill is None else {"fill": fill})}
    spec = DataSpec(url=str(tmp_path), columns=COLUMNS, classes=2, options=options, max_unreadable=1.0)
    source = Tabular("rows", spec, open_store(str(tmp_path / "store")))
    x, category = read(source, "train")
    shown = np.ones(rows, dtype=bool) if fill is not None else ~lacking
    assert len(x) == shown.sum()
    expected = (hours[shown] - hours[shown].mean()) / hours[shown].std()
    np.testing.assert_allclose(x[:, 1], expected, rtol=1e-5, atol=1e-5)
    assert ("only there" in source.names.values[0]) == (fill is not None)
    assert (category[:, 0] > 0).all()


def gaps(rows: int = 60) -> pa.Table:
    """Nulls in most rows: as integers, as NaN, and as truth values."""
    some = np.random.default_rng(3).random((3, rows)) < 0.4
    table = people(rows, seed=2)
    age = pa.array(table["age"].to_numpy(), mask=some[0])
    hours = np.where(some[1], np.nan, table["hours"].to_numpy())
    hired = pa.array(np.arange(rows) % 3 == 0, mask=some[2])
    return table.set_column(0, "age", age).set_column(1, "hours", pa.array(hours)).append_column("hired", hired)


@pytest.mark.parametrize("fill", ["mean", 0, -1.5])
@pytest.mark.parametrize("standardise", [True, False])
def test_what_is_missing_is_filled(tmp_path: Path, fill: str | float, standardise: bool):
    table = gaps()
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=25)
    columns = COLUMNS.model_copy(update={"features": ("age", "hours", "hired")})
    options = {"fill": fill, "standardise": standardise, "flagged": ("hired", "age")}
    spec = DataSpec(url=str(tmp_path), columns=columns, classes=2, options=options)
    source = Tabular("rows", spec, open_store(str(tmp_path / "store")))
    x = torch.cat([batch.inputs[0] for chunk in source.chunks("test") for batch in source.read(chunk, 7)])
    numbers = table.to_pandas()[["age", "hours", "hired"]].astype(float)
    of_train, of_test = ((table["split"].to_numpy() == split) for split in ("train", "test"))
    mean, std = numbers[of_train].mean(), numbers[of_train].std(ddof=0)
    filled = numbers.fillna(mean) if fill == "mean" else numbers.fillna(fill)
    expected = (filled - mean) / std if standardise else filled
    np.testing.assert_allclose(x[:, :3].numpy(), expected[of_test].to_numpy(), rtol=1e-5, atol=1e-6)
    assert torch.equal(x[:, 3:], torch.tensor(numbers[["hired", "age"]][of_test].isna().to_numpy()).float())
    assert source.shape == (5,)
    assert source.names.features == ("age", "hours", "hired", "hired is null", "age is null")


def test_filling_makes_other_chunks_and_its_absence_the_same_as_ever(tmp_path: Path):
    pq.write_table(people(60), tmp_path / "a.parquet")
    chunks = {
        str(more): tabular(tmp_path, store=str(tmp_path / "store"), options={"categories": CATEGORIES, **more})
        for more in ({}, {"fill": 0}, {"fill": "mean"}, {"fill": 0, "flagged": ("age",)})
    }
    assert len({source.chunks("test")[0].id for source in chunks.values()}) == 4
    assert set(chunks["{}"].features().identity) == {"numbers", "categories", "values", "scales"}


def test_a_column_that_training_never_has_a_value_of(tmp_path: Path):
    table = people(12, split="train").set_column(0, "age", pa.array([None] * 12, pa.float32()))
    pq.write_table(table, tmp_path / "a.parquet")
    x, _ = read(
        tabular(tmp_path, store=str(tmp_path / "s"), options={"categories": ("work",), "fill": "mean"}), "train"
    )
    assert x[:, 0].tolist() == [0] * 12


def test_models_learn_from_rows_with_gaps(tmp_path: Path):
    """Of 13 columns that are each null in four rows of ten, hardly a row has all."""
    draw = np.random.default_rng(0)
    rows, names = 400, [f"i{number}" for number in range(13)]
    x = draw.normal(size=(13, rows))
    columns = {name: pa.array(values, mask=draw.random(rows) < 0.4) for name, values in zip(names, x, strict=True)}
    split = ["test" if row % 4 == 0 else "train" for row in range(rows)]
    pq.write_table(pa.table({**columns, "y": (x.sum(0) > 0).astype(int), "split": split}), tmp_path / "rows.parquet")
    job = tmp_path / "job.toml"
    job.write_text(GAPS.format(names=names))
    with pytest.raises(DataError, match=r"row \d+: column 'i\d+' is null, and options.fill is not set"):
        run(load_job(job), open_store(str(tmp_path / "refused")), InlineExecutor())
    job.write_text(
        GAPS.format(names=names).replace(
            "[[models]]", f"options = {{ fill = 'mean', flagged = {names} }}\n[[models]]", 1
        )
    )
    outcome, store = run_inline(load_job(job), str(tmp_path / "store"))
    (coverage,) = read_manifest(store, outcome.run).coverage.values()
    assert (coverage.total, coverage.read, coverage.unreadable, coverage.excluded) == (400, 100, 0, 300)
    scores = pq.read_table(io.BytesIO(store.get(f"runs/{outcome.run}/tables/scores/part-00000.parquet"))).to_pandas()
    assert scores[scores["metric"] == "accuracy"]["value"].max() > 0.75


GAPS = """
name = "gaps"
[data.rows]
source = "tabular"
url = "rows.parquet"
classes = 2
columns = {{ features = {names}, label = "y", split = "split" }}
[[models]]
family = "mlp"
data = "rows"
hyperparameters = {{ widths = [8] }}
training = {{ steps = 100, learning_rate = 0.1 }}
[statistics.response]
"""


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


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64()], ids=str)
def test_whole_numbers_that_float64_rounds_are_counted(tmp_path: Path, kind: pa.DataType, null: bool):
    age = [1_700_000_000_000_000_001 + 10**15 * row for row in range(50)]
    column = pa.array([None if null and row == 7 else value for row, value in enumerate(age)], kind)
    pq.write_table(people(50, split="train").set_column(0, "age", column), tmp_path / "a.parquet")
    options = {"categories": ("work",), **({"fill": "mean"} if null else {})}
    x, _ = read(tabular(tmp_path, store=str(tmp_path / "store"), options=options), "train")
    kept = np.array([float(value) for row, value in enumerate(age) if not (null and row == 7)])
    expected = (np.array(age, dtype=float) - kept.mean()) / kept.std()
    expected[7] = 0 if null else expected[7]
    np.testing.assert_allclose(x[:, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("values", [127, 128, 200])
@pytest.mark.parametrize("index", [pa.uint8(), pa.int8(), pa.int32()], ids=str)
def test_a_null_beside_as_many_values_as_a_narrow_type_holds(values: int, index: pa.DataType):
    values = min(values, 128) if index == pa.int8() else values
    names = [f"v{value}" for value in range(values)]
    column = pa.DictionaryArray.from_arrays(pa.array([*range(values), None], index), pa.array(names))
    assert Numbering(names).of(column).tolist() == [*range(1, values + 1), 0]


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b'{"values": {}}', b"\xff", b'{"scales": [], "values": {}}'])
def test_a_damaged_tally_is_named(tmp_path: Path, content: bytes):
    pq.write_table(people(60), tmp_path / "a.parquet")
    store = open_store(str(tmp_path / "store"))
    tabular(tmp_path, store=store.url).chunks("test")
    (key,) = store.keys("data/vocabularies/")
    forget_parsed()
    store.remove(key)
    store.put_once(key, content)
    with pytest.raises(SpoiltObject, match=rf"^{key} is damaged \(.*\); delete it and run again$"):
        tabular(tmp_path, store=store.url).chunks("test")
    store.remove(key)
    assert tabular(tmp_path, store=store.url).chunks("test")


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
        (COLUMNS, {"fill": "median"}, r'options\.fill = "median": expected a number, or "mean"'),
        (COLUMNS, {"fill": float("nan")}, r'options\.fill = NaN: expected a number, or "mean"'),
        (COLUMNS, {"fill": True}, r'options\.fill = true: expected a number, or "mean"'),
        (COLUMNS, {"fill": 0, "flagged": ("aeg",)}, r"options\.flagged = 'aeg': .*did you mean 'age'"),
        (COLUMNS, {"fill": 0, "flagged": ("age", "age")}, r"options\.flagged: 'age' is there twice"),
        (COLUMNS, {"categories": ("work", "work")}, r"categories\[1\] = 'work': that column is in options\.categories"),
        (COLUMNS, {"categories": ("work", "age")}, r"categories\[1\] = 'age': that column is in columns\.features al"),
        (COLUMNS, {"categories": ("rich",)}, r"categories\[0\] = 'rich': that column is in columns\.label already"),
        (COLUMNS, {"flagged": ("age",)}, r"options\.flagged: nothing is filled; expected options\.fill as well"),
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


@pytest.mark.parametrize("options", [{"categories": ("work",)}, {"standardise": False, "categories": ("work",)}, {}])
def test_a_split_that_is_not_there(tmp_path: Path, options: dict[str, Any]):
    pq.write_table(people(4), tmp_path / "a.parquet")
    columns = COLUMNS.model_copy(update={"split": "spilt"})
    source = Tabular(
        "t", DataSpec(url=str(tmp_path), columns=columns, classes=2, options=options), open_store("memory://t")
    )
    with pytest.raises(DataError, match=r"a\.parquet: there is no column 'spilt'; did you mean 'split'"):
        source.chunks("train")


def test_labels_out_of_range(tmp_path: Path):
    pq.write_table(people(3).set_column(4, "rich", pa.array([0, 1, 2])), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: labels 0 to 2 in column 'rich', expected 0 to 1"):
        tabular(tmp_path, store=str(tmp_path / "store")).chunks("train")
