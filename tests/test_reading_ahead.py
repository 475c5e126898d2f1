"""What other threads read ahead: order, errors and ends of iterators, and how far ahead they are."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.rows.groups
from pipeline.errors import DataError
from pipeline.inputs import input_file
from pipeline.rows.footers import read_footer
from pipeline.rows.groups import AHEAD, Group, read_groups
from pipeline.rows.reading import in_turn, prefetched

# of an iterator: how many items it has, whether it fails behind them, and how many of them are used
turns = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 5)), max_size=6)


def made(turn: int, items: int, fails: bool) -> Iterator[tuple[int, int]]:
    yield from ((turn, item) for item in range(items))
    if fails:
        raise DataError(f"turn {turn} is bad")


@given(turns, st.integers(1, 4))
def test_each_iterator_gives_its_own_items_and_its_own_error(turns: list[tuple[int, bool, int]], ahead: int) -> None:
    starts = [partial(made, turn, items, fails) for turn, (items, fails, _) in enumerate(turns)]
    for turn, ((items, fails, used), some) in enumerate(zip(turns, in_turn(starts, ahead=ahead), strict=True)):
        for item in range(min(items, used)):
            assert next(some) == (turn, item)
        if used > items and fails:
            with pytest.raises(DataError, match=f"turn {turn} is bad"):
                next(some)
        elif used > items:
            assert list(some) == []


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_so_many_steps_are_made_ahead_over_the_ends_of_iterators(ahead: int) -> None:
    begun, late = threading.Semaphore(0), threading.Event()
    count = itertools.count()

    def items(sizes: int) -> Iterator[int]:
        for _ in range(sizes):
            begun.release()
            late.set()
            yield next(count)

    used = 0
    for some in in_turn([partial(items, size) for size in (2, 1, 0, 3, 1)], ahead=ahead):
        for item in some:
            assert item == used
            used += 1
            # what may be begun is, while nobody asks for more
            for _ in range(1 + ahead if used == 1 else used + ahead <= 7):
                assert begun.acquire(timeout=60)
            late.clear()
            assert not late.wait(timeout=0.01)
    assert used == 7


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


@pytest.mark.parametrize("ahead", [1, 2])
def test_each_is_begun_once_in_order_where_those_before_it_are_left(ahead: int) -> None:
    each = iter([iter([turn]) for turn in range(5)])
    for turn, some in enumerate(in_turn([partial(next, each)] * 5, ahead=ahead)):
        if turn in (3, 4):
            assert list(some) == [turn]


def test_an_iterator_that_was_left_gives_nothing_of_the_next_one() -> None:
    turns = in_turn([partial(made, turn, 3, False) for turn in range(2)])
    first = next(turns)
    assert next(first) == (0, 0)
    assert next(next(turns)) == (1, 0)
    with pytest.raises(RuntimeError, match="turn 0 was left for that of turn 1"):
        next(first)


def test_an_error_keeps_nothing_that_was_made_ahead() -> None:
    class Item:
        pass

    seen: list[weakref.ref[Item]] = []

    def items() -> Iterator[Item]:
        seen.append(weakref.ref(item := Item()))
        yield item

    gc.collect()
    gc.disable()
    try:
        for turn, some in enumerate(in_turn([partial(made, 0, 0, True), items, items], ahead=2)):
            if turn == 0:
                with pytest.raises(DataError):
                    next(some)
        del some
        assert seen
        assert not any(one() for one in seen)
    finally:
        gc.enable()


def test_what_was_used_is_not_kept_while_the_next_item_is_waited_for() -> None:
    class Item:
        pass

    used: list[weakref.ref[Item]] = []

    def items() -> Iterator[Item | bool]:
        yield Item()
        deadline = time.monotonic() + 5
        while not (used and used[0]() is None) and time.monotonic() < deadline:
            time.sleep(0.001)
        yield used[0]() is None

    some = prefetched(items())
    used.append(weakref.ref(next(some)))  # type: ignore[arg-type]
    assert next(some) is True


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


def test_row_groups_that_were_used_are_not_kept(file: tuple[str, str]) -> None:
    seen: list[weakref.ref[Group]] = []
    for group in prefetched(read_groups(*file, range(9), ["x"]), ahead=AHEAD):
        seen.append(weakref.ref(group))
        assert sum(one() is not None for one in seen) <= 2
    del group
    assert not any(one() for one in seen)


def test_a_file_that_is_replaced_while_it_is_read_is_refused_behind_its_last_group(file: tuple[str, str]) -> None:
    groups = read_groups(*file, range(2), ["x"])
    assert next(groups).rows == 10
    pq.write_table(pa.table({"x": range(7)}), f"{file[0]}.new")
    Path(f"{file[0]}.new").replace(file[0])
    with pytest.raises(DataError, match="was replaced while it was read"):
        list(groups)


def is_open(path: str) -> bool:
    return path in map(os.path.realpath, Path("/proc/self/fd").iterdir())


linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not say which files are open")


@linux
def test_a_file_is_closed_when_it_is_left(file: tuple[str, str]) -> None:
    groups = read_groups(*file, range(9), ["x"])
    for _ in range(3):
        next(groups)
    assert is_open(file[0])
    groups.close()  # type: ignore[attr-defined]
    assert not is_open(file[0])


@linux
def test_a_file_stays_open_for_the_next_chunk_and_no_longer_than_its_thread(
    file: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    open_input = pipeline.rows.groups.open_input
    monkeypatch.setattr(pipeline.rows.groups, "open_input", lambda url: opened.append(url) or open_input(url))
    starts = [partial(read_groups, *file, range(first, first + 3), ["x"]) for first in (0, 3, 6)]
    found: list[int] = []
    for chunk in in_turn(starts, ahead=AHEAD):
        found += [row for group in chunk for part in group.parts for row in part["x"].to_pylist()]
        assert opened == [file[0]]
        assert is_open(file[0])
    assert found == list(range(90))
    assert not is_open(file[0])


def test_two_that_read_a_file_in_one_thread_have_it_open_each(file: tuple[str, str]) -> None:
    list(read_groups(*file, range(1), ["x"]))
    both = [read_groups(*file, range(9), ["x"]) for _ in range(2)]
    for number, pair in enumerate(zip(*both, strict=True)):
        for group in pair:
            assert group.parts[0]["x"].to_pylist() == list(range(10 * number, 10 * number + 10))


def test_a_file_that_is_replaced_between_two_chunks_is_not_read_on(file: tuple[str, str]) -> None:
    list(read_groups(*file, range(2), ["x"]))
    pq.write_table(pa.table({"x": range(100, 190)}), f"{file[0]}.new", row_group_size=10)
    Path(f"{file[0]}.new").replace(file[0])
    with pytest.raises(DataError, match="has changed since the run was planned"):
        next(read_groups(*file, range(2), ["x"]))
    now = read_footer(file[0], input_file(file[0])).file_id
    assert next(read_groups(file[0], now, range(2), ["x"])).parts[0]["x"].to_pylist() == list(range(100, 110))


def test_a_file_that_is_written_anew_within_a_tick_of_the_clock_is_not_read_by_its_old_footer(tmp_path: Path) -> None:
    path, sizes, found, written_ns = tmp_path / "a.parquet", [], [], 0
    x, y = np.arange(9), np.arange(9) + 100
    for table in (pa.table({"x": x, "y": y}), pa.table({"y": y, "x": x})):
        content = pa.BufferOutputStream()
        pq.write_table(table, content, compression="none", use_dictionary=False, write_statistics=False)
        path.write_bytes(content.getvalue())
        written_ns = written_ns or path.stat().st_mtime_ns
        os.utime(path, ns=(written_ns, written_ns))
        (group,) = read_groups(str(path), read_footer(str(path), input_file(str(path))).file_id, range(1), ["x"])
        sizes.append(path.stat().st_size)
        found.append(group.parts[0]["x"].to_pylist())
    assert sizes[0] == sizes[1]
    assert found[0] == found[1]


def test_a_file_whose_reading_failed_is_opened_anew(file: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    open_input = pipeline.rows.groups.open_input
    monkeypatch.setattr(pipeline.rows.groups, "open_input", lambda url: opened.append(url) or open_input(url))
    # one that is opened, and one that was open
    for _ in range(2):
        with pytest.raises(IndexError):
            list(read_groups(*file, [0, 99], ["x"]))
        list(read_groups(*file, [0], ["x"]))
        list(read_groups(*file, [1], ["x"]))
    assert opened == [file[0]] * 3
