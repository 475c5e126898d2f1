"""What other threads read ahead: order, errors and ends of iterators, and how far ahead they are."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.rows.groups
from pipeline.errors import DataError
from pipeline.inputs import input_file
from pipeline.rows.footers import read_footer
from pipeline.rows.groups import AT_ONCE, Group, begin_groups, read_groups
from pipeline.rows.reading import in_turn

# of an iterator: how many items it has, whether it fails behind them, and how many of them are used
turns = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 5)), max_size=6)


def made(turn: int, items: int, fails: bool) -> Iterator[tuple[int, int]]:
    yield from ((turn, item) for item in range(items))
    if fails:
        raise DataError(f"turn {turn} is bad")


@given(turns)
def test_each_iterator_gives_its_own_items_and_its_own_error(turns: list[tuple[int, bool, int]]) -> None:
    starts = [partial(made, turn, items, fails) for turn, (items, fails, _) in enumerate(turns)]
    for turn, ((items, fails, used), ahead) in enumerate(zip(turns, in_turn(starts), strict=True)):
        for item in range(min(items, used)):
            assert next(ahead) == (turn, item)
        if used > items and fails:
            with pytest.raises(DataError, match=f"turn {turn} is bad"):
                next(ahead)
        elif used > items:
            assert list(ahead) == []


def test_an_iterator_that_cannot_be_begun_concerns_no_other_one() -> None:
    def bad() -> Iterator[int]:
        raise DataError("it is not there")

    first, second, third = in_turn([lambda: iter([1, 2]), bad, lambda: iter([3])]), [], []
    for number, items in enumerate(first):
        if number == 1:
            with pytest.raises(DataError, match="it is not there"):
                next(items)
        else:
            (second if number == 0 else third).extend(items)
    assert (second, third) == ([1, 2], [3])


def test_one_thread_makes_the_first_item_of_an_iterator_while_the_last_of_the_one_before_is_used() -> None:
    begun = [threading.Event() for _ in range(3)]
    threads: set[int] = set()

    def items(turn: int) -> Iterator[int]:
        threads.add(threading.get_ident())
        begun[turn].set()
        yield turn

    for turn, some in enumerate(in_turn([partial(items, turn) for turn in range(3)])):
        assert next(some) == turn
        if turn < 2:
            assert begun[turn + 1].wait(timeout=60)
            # one step ahead, no more
            assert not any(later.is_set() for later in begun[turn + 2 :])
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_whoever_leaves_lets_the_thread_end() -> None:
    before = threading.active_count()
    each = in_turn([partial(made, turn, 3, False) for turn in range(3)])
    assert next(next(each)) == (0, 0)
    each.close()
    assert threading.active_count() == before
    assert list(in_turn([])) == []


# --- row groups -------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> tuple[str, str]:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": range(90)}), path, row_group_size=10)
    return str(path), read_footer(str(path), input_file(str(path))).file_id


def test_no_more_than_two_row_groups_are_read_at_once_and_each_by_a_reader_of_its_own(
    file: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, together = pipeline.rows.groups._read, threading.Barrier(AT_ONCE)
    reading: list[Any] = []
    most: list[int] = []

    def watched(reader: Any, *more: Any) -> Group:
        assert reader not in reading
        reading.append(reader)
        most.append(len(reading))
        together.wait(timeout=60)
        found = read(reader, *more)
        reading.remove(reader)
        return found

    monkeypatch.setattr(pipeline.rows.groups, "_read", watched)
    # nobody waits for what has begun: the next one has to
    begun = list(begin_groups(*file, range(8), ["x"]))
    rows = [row for group in begun for part in group.result().parts for row in part["x"].to_pylist()]
    assert rows == list(range(80))
    assert max(most) == AT_ONCE


def test_row_groups_that_were_used_are_not_kept(file: tuple[str, str]) -> None:
    seen: list[weakref.ref[Group]] = []
    for group in read_groups(*file, range(9), ["x"]):
        seen.append(weakref.ref(group))
        assert sum(one() is not None for one in seen) <= AT_ONCE + 1
    del group
    assert not any(one() for one in seen)


def test_a_file_that_is_replaced_while_it_is_read_is_refused_behind_its_last_group(file: tuple[str, str]) -> None:
    groups = read_groups(*file, range(2), ["x"])
    assert next(groups).rows == 10
    pq.write_table(pa.table({"x": range(7)}), f"{file[0]}.new")
    Path(f"{file[0]}.new").replace(file[0])
    with pytest.raises(DataError, match="was replaced while it was read"):
        list(groups)


def test_a_file_is_closed_when_it_is_left(file: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    open_input = pipeline.rows.groups.open_input
    monkeypatch.setattr(pipeline.rows.groups, "open_input", lambda url: opened.append(open_input(url)) or opened[-1])
    groups = begin_groups(*file, range(9), ["x"])
    for _ in range(3):
        next(groups)
    groups.close()  # type: ignore[attr-defined]
    assert [stream.closed for stream in opened] == [True]
