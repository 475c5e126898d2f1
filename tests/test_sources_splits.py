"""Which splits there are: by the footers where they say it, else by the column itself, read as little as can be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.job_sections import Columns, DataSpec
from pipeline.rows import splits as splits_of_rows
from pipeline.sources.parquet import Parquet
from pipeline.store import open_store
from tests.row_files import corrupt_group, write

COLUMNS = Columns(features=("v",), split="s")
MIXED = ["a", "c", "e"] * 4


def rows(values: Sequence[Any]) -> pa.Table:
    return pa.table({"v": [float(number) for number in range(len(values))], "s": pa.array(values)})


def parquet(url: Path, store: str = "memory://unused") -> Parquet:
    return Parquet("rows", DataSpec(url=str(url), columns=COLUMNS, train="a", measure=("a",)), open_store(store))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """The file and the row groups of every reading of the column."""
    seen: list[tuple[str, list[int]]] = []
    sound = splits_of_rows.read_groups

    def read(url: str, file_id: str, groups: Sequence[int], columns: Sequence[str]) -> Any:
        assert columns == ["s"]
        for group in groups:
            seen.append((Path(url).name, group))
            yield from sound(url, file_id, [group], columns)

    monkeypatch.setattr(splits_of_rows, "read_groups", read)
    return seen


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    values=st.lists(st.sampled_from(["a", "b", "c", None]) | st.none(), max_size=12),
    group_rows=st.integers(1, 5),
    is_arrow=st.booleans(),
)
def test_there_are_the_splits_that_rows_are_of(
    tmp_path_factory: pytest.TempPathFactory, values: list[str | None], group_rows: int, is_arrow: bool
) -> None:
    table = rows([*values, "a"]).slice(0, len(values))
    path = tmp_path_factory.mktemp("rows") / ("rows.arrow" if is_arrow else "rows.parquet")
    if is_arrow:
        pyarrow.feather.write_feather(table, path, chunksize=group_rows)
    else:
        pq.write_table(table, path, row_group_size=group_rows)
    source = parquet(path)
    wanted = sorted({value for value in values if value is not None})
    assert list(source.splits()) == wanted
    for split in ("a", "aa", "b", "c", "z"):
        assert bool(source.chunks(split)) == (split in wanted), split


@pytest.mark.parametrize(
    ("values", "there", "not_there"),
    [([1, 2, 10], "2", "3"), ([True, False, True], "true", "True"), ([True, True, True], "true", "false")],
    ids=str,
)
@pytest.mark.parametrize("group_rows", [1, 3])
def test_splits_that_are_no_text(
    values: list[Any], there: str, not_there: str, group_rows: int, tmp_path: Path
) -> None:
    source = parquet(write(tmp_path / "rows.parquet", rows(values), group_rows=group_rows))
    assert there in source.splits()
    assert source.chunks(there)
    assert not source.chunks(not_there)


def test_extremes_are_splits(reads: list[Any], tmp_path: Path) -> None:
    source = parquet(write(tmp_path / "rows.parquet", rows(MIXED), group_rows=6))
    assert source.chunks("a")
    assert source.chunks("e")
    assert not source.chunks("f")
    assert reads == []


def test_what_lies_between_is_looked_for_until_it_is_found(reads: list[Any], tmp_path: Path) -> None:
    source = parquet(write(tmp_path / "rows.parquet", rows(MIXED), group_rows=3))
    assert source.chunks("c")
    assert reads == [("rows.parquet", 0)]
    assert not source.chunks("b")
    assert reads[1:] == [("rows.parquet", group) for group in range(4)]


def test_groups_that_cannot_hold_it_are_not_read(reads: list[Any], tmp_path: Path) -> None:
    write(tmp_path / "one.parquet", rows(["a", "b", "c", "x", "y", "z"]), group_rows=3)
    write(tmp_path / "two.parquet", rows(["z"] * 5), group_rows=3)
    assert not parquet(tmp_path).chunks("w")
    assert reads == []
    assert not parquet(tmp_path).chunks("xx")
    assert reads == [("one.parquet", 1)]


def test_where_it_was_found_is_stored(reads: list[Any], tmp_path: Path) -> None:
    path, store = write(tmp_path / "rows.parquet", rows(MIXED), group_rows=12), str(tmp_path / "store")
    first = parquet(path, store).chunks("c")
    seen = len(reads)
    assert parquet(path, store).chunks("c") == first
    assert len(reads) == seen == 1
    write(path, rows([*MIXED, "d", "e"]), group_rows=14)
    assert parquet(path, store).chunks("c")
    assert len(reads) == 2


def test_a_damaged_group_may_hold_it(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", rows(MIXED).select(["s", "v"]), group_rows=6)
    corrupt_group(path, 1)
    source = parquet(path)
    assert source.chunks("b")
    assert list(source.splits()) == ["a", "c", "e"]


def test_extremes_that_may_be_cut_off_are_no_values(reads: list[Any], tmp_path: Path) -> None:
    name = "a" * 64
    source = parquet(write(tmp_path / "rows.parquet", rows([name, f"{name}b"])))
    assert source.chunks(name)
    assert len(reads) == 1


@pytest.mark.parametrize("is_damaged_first", [False, True])
def test_extremes_that_are_no_text_say_nothing(is_damaged_first: bool, tmp_path: Path) -> None:
    damaged = b"\xff\xfe" if not is_damaged_first else b"Z\xff"
    texts = pa.array([b"a", damaged, b"c", b"a", damaged, b"c"], pa.binary()).view(pa.string())
    path = write(tmp_path / "rows.parquet", rows(list("acacac")).set_column(1, "s", texts), group_rows=6)
    source = parquet(path)
    assert list(source.splits()) == ["a", "c"]
    assert source.chunks("c")
    assert not source.chunks("b")
    assert sum(batch.rows for batch in source.read(source.chunks("a")[0], 7)) == 2
