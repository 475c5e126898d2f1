from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from pipeline.batch import Batch
from pipeline.errors import DataError
from pipeline.fit.rows import (
    DRAWN_FROM,
    SAMPLE_PORTIONS,
    SAMPLE_ROWS,
    SAMPLE_SEED,
    Portion,
    draws,
    is_held_out,
    join,
    least_share,
    order_of,
    passes,
    sampled,
    take,
    windows,
)
from pipeline.fit.settings import Training
from pipeline.hashing import row_hash


def rows(start: int, stop: int) -> Batch:
    uid = torch.arange(start, stop)
    return Batch((uid[:, None].float(),), uid, uid % 3)


class Reader:
    """Chunks of 10 rows in batches of 4, 4 and 2, counting how often each is read."""

    def __init__(self, chunks: int) -> None:
        self.reads = [0] * chunks
        self.portions = [Portion(f"chunk{number}", 10, lambda n=number: self.read(n)) for number in range(chunks)]

    def read(self, number: int) -> Iterator[Batch]:
        self.reads[number] += 1
        for start in range(0, 10, 4):
            yield rows(10 * number + start, 10 * number + min(start + 4, 10))


def every_row(batch: Batch) -> torch.Tensor:
    return torch.ones(batch.rows, dtype=torch.bool)


def test_each_epoch_holds_every_row_once_and_has_its_own_order_of_chunks() -> None:
    reader = Reader(5)
    epochs = [torch.cat([batch.uid_N for batch in epoch]).tolist() for epoch in islice(passes(reader.portions, 0), 4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch[::10]) for epoch in epochs}) == 4
    assert reader.reads == [4] * 5


def test_what_fits_in_memory_is_read_once() -> None:
    reader = Reader(5)
    for epoch in islice(passes(reader.portions, 50), 4):
        list(epoch)
    assert reader.reads == [1] * 5


@pytest.mark.parametrize("shuffle_rows", [8, 20, 50, 1000])
def test_batches_are_full_and_use_every_row_equally_often(shuffle_rows: int) -> None:
    training = Training(batch_rows=8, shuffle_rows=shuffle_rows)
    reader = Reader(5)
    steps = 50 * 8 // 8  # 8 epochs: where windows end is no matter
    drawn = islice(draws(reader.portions, every_row, training, seeds=[1]), steps)
    uids = [window.uid_N[index[0]] for window, index in drawn]
    assert {len(uid) for uid in uids} == {8}
    assert set(torch.cat(uids).bincount().tolist()) == {8}


def test_memory_is_bounded_by_shuffle_rows() -> None:
    training = Training(batch_rows=8, shuffle_rows=20)
    sizes = [window.rows for window in islice(windows(Reader(5).portions, every_row, training), 20)]
    assert max(sizes) == 16
    assert all(size % 8 == 0 for size in sizes)


def test_fewer_rows_than_a_batch_are_drawn_again() -> None:
    training = Training(batch_rows=32)
    window = next(windows(Reader(1).portions, every_row, training))
    assert window.uid_N.bincount().tolist() == [4, 4] + [3] * 8


def test_orders_are_permutations_of_their_own() -> None:
    orders = [order_of(100, seed=seed, window=window).tolist() for seed in range(3) for window in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len(set(map(tuple, orders))) == 9


def test_the_order_of_a_seed_does_not_depend_on_the_others() -> None:
    training = Training(batch_rows=8, shuffle_rows=20)
    together = [index for _, index in islice(draws(Reader(3).portions, every_row, training, seeds=[5, 6, 7]), 9)]
    alone = [index for _, index in islice(draws(Reader(3).portions, every_row, training, seeds=[6]), 9)]
    assert all(torch.equal(many[1], one[0]) for many, one in zip(together, alone, strict=True))


@pytest.mark.parametrize("start", [1, 2, 3, 7, 11])
def test_drawing_goes_on_where_it_was(start: int) -> None:
    training = Training(batch_rows=8, shuffle_rows=20)
    whole = list(islice(draws(Reader(3).portions, every_row, training, seeds=[5]), 14))
    rest = list(islice(draws(Reader(3).portions, every_row, training, seeds=[5], start=start), 14 - start))
    for (window, index), (other, same) in zip(whole[start:], rest, strict=True):
        assert torch.equal(window.uid_N[index], other.uid_N[same])


def test_unwanted_rows_are_never_drawn() -> None:
    training = Training(batch_rows=8)
    drawn = islice(draws(Reader(3).portions, lambda batch: batch.uid_N % 2 == 0, training, seeds=[5]), 20)
    assert all(bool((window.uid_N % 2 == 0).all()) for window, _ in drawn)


def test_no_wanted_row_is_an_error_and_no_endless_search() -> None:
    with pytest.raises(DataError, match="no row to train on"):
        next(windows(Reader(3).portions, lambda batch: batch.uid_N < 0, Training()))


def test_a_share_of_the_rows_is_held_out_whatever_their_order() -> None:
    many = rows(0, 20_000)
    held = is_held_out(many, 0.1)
    assert abs(held.double().mean().item() - 0.1) < 0.01
    order = torch.randperm(20_000)
    assert torch.equal(is_held_out(take(many, order), 0.1), held[order])
    assert not bool(is_held_out(many, 0.0).any())
    # more held out: the same rows and others
    assert bool(is_held_out(many, 0.2)[held].all())


@pytest.mark.parametrize("count", [1, 90, 20_000])
def test_the_least_share_that_holds_a_row_out_holds_hardly_more(count: int) -> None:
    some = rows(0, count)
    share = least_share(some)
    assert bool(is_held_out(some, share).any())
    assert not bool(is_held_out(some, share / 1.11).any())
    assert least_share(take(some, slice(0, 0))) == 1


def test_shorter_sequences_are_filled_up_and_masked() -> None:
    parts = [
        Batch(
            (torch.ones(2, 3, length),), torch.arange(2), None, kwargs={"mask": torch.ones(2, length, dtype=torch.bool)}
        )
        for length in (4, 6, 5)
    ]
    joined = join(parts)
    assert joined.inputs[0].shape == (6, 3, 6)
    assert joined.kwargs["mask"].sum(1).tolist() == [4, 4, 6, 6, 5, 5]
    assert torch.equal(joined.inputs[0][:, 0], joined.kwargs["mask"].float())
    picked = take(joined, torch.tensor([[0, 5], [2, 3]]))
    assert picked.inputs[0].shape == (2, 2, 3, 6)
    assert picked.kwargs["mask"].sum(-1).tolist() == [[4, 5], [6, 6]]


def in_order(chunks: int, size: int, batch_rows: int) -> list[Portion]:
    """Rows of which chunk n has n · size …, each in batches."""

    def read(number: int) -> Iterator[Batch]:
        for start in range(0, size, batch_rows):
            yield rows(number * size + start, number * size + min(start + batch_rows, size))

    return [Portion(f"chunk{number}", size, lambda number=number: read(number)) for number in range(chunks)]


def test_a_sample_is_of_rows_from_everywhere() -> None:
    (sample,) = sampled(in_order(2, 10_000, 256), [every_row])
    assert sample is not None
    assert sample.rows == len(set(sample.uid_N.tolist())) == SAMPLE_ROWS
    # half of them are of the second half, give or take five standard deviations
    assert abs(int((sample.uid_N >= 10_000).sum()) - SAMPLE_ROWS / 2) < 5 * 0.5 * SAMPLE_ROWS**0.5
    # and they come mixed
    assert abs(int((sample.uid_N[:1000] >= 10_000).sum()) - 500) < 5 * 0.5 * 1000**0.5


@pytest.mark.parametrize(("chunks", "size"), [(1, 9_000), (4, 2_250), (90, 100)])
@pytest.mark.parametrize("batch_rows", [7, 100, 10_000])
def test_a_sample_depends_on_its_rows_alone(chunks: int, size: int, batch_rows: int) -> None:
    expected = rows(0, 9_000).uid_N
    order = row_hash(expected, seed=SAMPLE_SEED).argsort()[:SAMPLE_ROWS]
    (sample,) = sampled(in_order(chunks, size, batch_rows), [every_row])
    assert sample is not None
    assert sample.uid_N.tolist() == order.tolist()


@pytest.mark.parametrize("batch_rows", [1000, 4096])
def test_of_more_rows_a_sample_reads_as_many_from_portions_all_over(batch_rows: int) -> None:
    read: Counter[int] = Counter()

    def counted(batch: Batch) -> torch.Tensor:
        for uid in batch.uid_N.tolist():
            read[uid // 2000] += 1
        return every_row(batch)

    portions = in_order(100, 2000, batch_rows)
    (sample,) = sampled(portions, [counted])
    assert set(read.values()) == {DRAWN_FROM // SAMPLE_PORTIONS}
    assert len(read) == SAMPLE_PORTIONS
    assert max(read) - min(read) > 80
    assert sample is not None
    assert sample.rows == SAMPLE_ROWS
    assert set((sample.uid_N // 2000).tolist()) == set(read)


def test_a_sample_reads_on_until_there_is_a_row() -> None:
    portions = in_order(100, 2000, 1000)
    (first,) = sampled(portions, [every_row])
    assert first is not None
    seen = set((first.uid_N // 2000).tolist())
    (last,) = set(range(100)) - seen - set(sorted(set(range(100)) - seen)[1:])

    def of_one(batch: Batch) -> torch.Tensor:
        return batch.uid_N // 2000 == last

    found, none = sampled(portions, [of_one, lambda batch: batch.uid_N < 0])
    assert found is not None
    assert set((found.uid_N // 2000).tolist()) == {last}
    assert none is None
