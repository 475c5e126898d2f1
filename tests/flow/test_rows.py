"""Row rules against content: every element of a tensor is the number of its row, whatever is done to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pipeline.batch import Batch
from pipeline.flow.row_rules import follow
from pipeline.flow.rows import Rows, agreed, along, of_leaf, reshaped, whole
from pipeline.flow.trace import Tracker
from pipeline.flow.values import Call, tensors_in


class Watching(Tracker):
    """Follows rows, and compares them with the content of every tensor that is made."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(nn.Module(), batch)
        self.known, self.lost = 0, 0

    def on_data(self, call: Call):
        out = call.run()
        values = self.settle_data(call, out)
        for tensor, value in zip(tensors_in(out), values, strict=True):
            if value.rows is None:
                self.lost += 1
            elif tensor.dtype == torch.float64:
                self.known += 1
                assert_content(tensor, value.rows)
        return out


def assert_content(tensor: torch.Tensor, rows: Rows) -> None:
    if rows.axis is None:
        assert bool((tensor == rows.one().double()).all())
        return
    of_entry = rows.of_entries(tensor.shape[rows.axis]).double()
    shape = [1] * tensor.dim()
    shape[rows.axis] = -1
    assert bool((tensor == of_entry.view(shape)).all())


def numbered(rows: int, *shape: int, axis: int = 0) -> torch.Tensor:
    """A tensor whose elements are the number of their row."""
    full = list(shape)
    full.insert(axis, rows)
    view = [1] * len(full)
    view[axis] = rows
    return torch.arange(rows, dtype=torch.float64).view(view).expand(full).clone()


def watch(batch: Batch, forward) -> Watching:
    watching = Watching(batch)
    with torch.inference_mode(), watching:
        forward(*batch.inputs)
    return watching


@st.composite
def chains(draw):
    rows = draw(st.integers(2, 4))
    axis = draw(st.integers(0, 2))
    shape = [draw(st.sampled_from([1, 2, 3, 6])) for _ in range(3)]
    steps = draw(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 11)), min_size=1, max_size=8))
    return rows, axis, shape, steps


def _transpose(x, n):
    return x.transpose(n % x.dim(), (n // 3) % x.dim())


def _merge(x, n):
    first = n % max(x.dim() - 1, 1)
    return x.flatten(first, first + 1) if x.dim() > 1 else x


def _split(x, n):
    axis = n % x.dim()
    size = x.shape[axis]
    parts = [part for part in (2, 3, 4) if size % part == 0]
    return x.unflatten(axis, (parts[n % len(parts)], -1)) if parts else x


def _slice(x, n):
    return x.narrow(n % x.dim(), 0, max(1, x.shape[n % x.dim()] - 1))


def _select(x, n):
    return x.select(n % x.dim(), 0) if x.dim() > 1 else x


def _index(x, n):
    index = torch.tensor([0, x.shape[n % x.dim()] - 1, 0])
    return x.index_select(n % x.dim(), index)


def _mask(x, n):
    return x[:, torch.arange(x.shape[1]) % 2 == 0] if x.dim() > 1 else x


def _advanced(x, n):
    return x[torch.arange(x.shape[0]), torch.zeros(x.shape[0], dtype=torch.int64)] if x.dim() > 1 else x


STEPS = [
    _transpose,
    _merge,
    _split,
    _slice,
    _select,
    _index,
    _mask,
    _advanced,
    lambda x, n: x.unsqueeze(n % (x.dim() + 1)),
    lambda x, n: x.squeeze(),
    lambda x, n: x.flip(n % x.dim()),
    lambda x, n: x.repeat_interleave(2, n % x.dim()),
    lambda x, n: torch.cat([x, x], n % x.dim()),
    lambda x, n: torch.stack([x, x], n % (x.dim() + 1)),
    lambda x, n: x.repeat(*[2 if axis == n % x.dim() else 1 for axis in range(x.dim())]),
    lambda x, n: x.permute(*[(axis + 1) % x.dim() for axis in range(x.dim())]),
    lambda x, n: x.unbind(n % x.dim())[0] if x.dim() > 1 else x,
    lambda x, n: x.chunk(2, n % x.dim())[-1],
    lambda x, n: x * 1.0 + 0.0,
    lambda x, n: x.mean(n % x.dim(), keepdim=True).round(),
    lambda x, n: x.amax(n % x.dim()) if x.dim() > 1 else x,
    lambda x, n: x.reshape(-1),
    lambda x, n: x.view(x.shape[0], -1),
    lambda x, n: x.expand(2, *x.shape),
]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(chains())
def test_rows_are_right_or_unknown(case):
    rows, axis, shape, steps = case

    def forward(x):
        for step, n in steps:
            if 0 < x.numel() < 5000 and x.dim() < 7:
                try:
                    x = step(x, n)
                except RuntimeError:  # a view that does not exist for these strides
                    continue

    shape.insert(axis, rows)
    x = numbered(rows, *[size for i, size in enumerate(shape) if i != axis], axis=axis)
    found = of_leaf(x.shape, rows)
    if found is None or found.axis != axis:
        return
    watch(Batch(inputs=(x,), uid_N=torch.arange(rows)), forward)


def test_views_of_the_common_kinds_are_never_lost():
    x = numbered(4, 6, 5)

    def forward(x):
        y = x.reshape(-1, 5).view(4, 6, 5).transpose(0, 1).reshape(24, 5).view(6, 4, 5).permute(1, 2, 0)
        y = y.unsqueeze(1).squeeze(1).flatten(1).view(4, 5, 6)
        windows = y.view(4, 5, 2, 3).permute(0, 2, 1, 3).reshape(8, 5, 3)
        windows.view(4, 2, 5, 3).permute(0, 2, 1, 3).reshape(4, 5, 6)

    assert watch(Batch(inputs=(x,), uid_N=torch.arange(4)), forward).lost == 0


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_sequences_keep_their_rows(batch_first):
    x = numbered(4, 5, 2) if batch_first else numbered(4, 5, 2, axis=1)
    lengths = torch.tensor([2, 5, 1, 3])
    ends = []

    class Packing(Watching):
        padded = False

        def on_data(self, call):
            self.padded = self.padded or call.op.name == "_pad_packed_sequence"
            if not self.padded:
                return super().on_data(call)
            out = call.run()  # padding is no row's content
            value, first = self.settle_data(call, out)[0], next(tensors_in(out))
            if first.dim() == 3:
                ends.append(value.rows)
            return out

    watching = Packing(Batch(inputs=(x, lengths), uid_N=torch.arange(4)))
    with torch.inference_mode(), watching:
        packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
        pad_packed_sequence(packed, batch_first=batch_first)
    assert watching.known >= 2
    axis = 0 if batch_first else 1
    assert ends[0].of_entries(4).tolist() == [1, 3, 0, 2]  # longest first
    assert (ends[-1].axis, ends[-1].of_entries(4).tolist()) == (axis, [0, 1, 2, 3])


def test_list_entries_belong_to_their_row():
    images = [torch.full((3, 4), float(i), dtype=torch.float64) for i in range(3)]

    def forward(images):
        torch.stack([image.flatten() for image in images])
        torch.cat([image[None] * 1 for image in images[::-1]])

    watching = watch(Batch(inputs=(images,), uid_N=torch.arange(3)), forward)
    assert watching.lost == 0
    assert watching.known > 0


def test_reshape_is_followed_by_arithmetic_alone():
    rows = reshaped(Rows(0, 4), (4, 3, 2), (12, 2))
    assert (rows.axis, rows.inner) == (0, 3)
    rows = reshaped(Rows(1, 4), (3, 4, 2), (12, 2))
    assert (rows.axis, rows.inner) == (0, 1)
    assert reshaped(Rows(0, 4), (4, 3), (2, 6)) is None
    assert reshaped(along(0, torch.tensor([1, 1, 0, 0]), 2), (4, 3), (2, 2, 3)).of_entries(2).tolist() == [1, 0]


def test_rows_that_disagree_are_unknown():
    assert agreed([Rows(0, 3), Rows(1, 3)]) is None
    assert agreed([along(0, torch.tensor([0, 0]), 3), along(0, torch.tensor([0, 1]), 3)]) is None
    assert agreed([whole(1, 3), whole(2, 3)]) is None


def test_sorting_the_rows_loses_them():
    assert follow("sort", {"dim": 0}, [], (3,)) is None
    x = numbered(4, 3)
    watching = watch(Batch(inputs=(x,), uid_N=torch.arange(4)), lambda x: x.sort(0))
    assert watching.lost == 2
