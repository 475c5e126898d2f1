"""Row rules against content: every element of a tensor is the number of its row, whatever is done to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pipeline.batch import Batch
from pipeline.flow.row_joins import Source
from pipeline.flow.row_rules import follow
from pipeline.flow.rows import Rows, agreed, along, of_leaf, reshaped, whole
from pipeline.flow.trace import Tracker
from pipeline.flow.values import Call, tensors_in
from tests.flow.models import Free, linear, numbers
from tests.flow.shown import batch_of, show


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


def _by_index(x, order):
    out = torch.empty_like(x)
    out[order] = x[order]
    return out


def _reversed_in_a_loop(x, order):
    out = x.new_empty(x.shape)
    for row in range(len(x)):
        out[len(x) - 1 - row] = x[row]
    return out


def _by_slices(x, order):
    out = torch.zeros_like(x)
    out[3:], out[:3] = x[:-3], x[-3:]
    return out


def _experts(x, order):
    chosen = x[:, 0] % 2 == 0
    out = torch.empty_like(x)
    out[torch.cat([chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]])] = torch.cat([x[chosen], x[~chosen]])
    return out


def _masked_parts(x, order):
    out, odd = torch.empty_like(x), x[:, 0] % 2 == 1
    out[odd], out[~odd] = x[odd], x[~odd]
    return out


def _tokens(x, order):
    flat = x[:, :, None].expand(-1, -1, 3).reshape(-1, 3)
    at = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(flat)
    out[at[:9]], out[at[9:]] = flat[at[:9]], flat[at[9:]]
    return out + flat * 0


def _over_other_rows(x, order):
    out = x.clone()
    out[0] = x[3]
    return out + 0.0


def _each_line_by_an_index(x, order):
    out = torch.empty_like(x).unsqueeze(1).repeat(1, 3, 1)
    out[torch.arange(len(x)), torch.arange(len(x)) % 3] = x
    out[torch.arange(len(x)), (torch.arange(len(x)) + 1) % 3] = x
    out[torch.arange(len(x)), (torch.arange(len(x)) + 2) % 3] = x
    return out * 1.0


def _both_steps(x, order):
    out = x.new_empty(len(x), 2, x.shape[1])
    out[:, 0], out[:, 1] = x, x * 1.0
    return out * 1.0


FOLLOWED = {
    "an index puts them back": _by_index,
    "put elsewhere by an index": lambda x, order: torch.zeros_like(x).index_put((order,), x),
    "copied elsewhere by an index": lambda x, order: torch.zeros_like(x).index_copy(0, order, x),
    "one by one": _reversed_in_a_loop,
    "by slices": _by_slices,
    "experts one after another": _experts,
    "experts by masks": _masked_parts,
    "tokens of rows": _tokens,
    "each a step": _each_line_by_an_index,
    "step by step": _both_steps,
    "a permutation": lambda x, order: torch.eye(len(x), dtype=x.dtype).roll(3, 1) @ x,
    "a sparse permutation": lambda x, order: torch.eye(len(x), dtype=x.dtype).flip(0).to_sparse() @ x,
    "positions by a mask of positions and rows": lambda x, order: x.t()[(torch.arange(35).view(5, 7) % 3) > 0],
    "positions by a mask behind others": lambda x, order: x.t()[None].repeat(2, 1, 1)[
        :, (torch.arange(35).view(5, 7) % 3) > 0
    ],
    "one row in every place": lambda x, order: torch.zeros_like(x) + x[2:3],
}
LOST = {
    "over other rows": _over_other_rows,
    "along an index": lambda x, order: torch.take_along_dim(x, order[:, None].expand_as(x), 0),
    "turned": lambda x, order: x.rot90(2, (0, 1)),
    "rolled in one line": lambda x, order: x.roll(5),
    "some copied elsewhere": lambda x, order: torch.zeros_like(x).index_copy(0, order[:4], x[:4]),
    "added to others": lambda x, order: x.index_put((order,), x * 0.0 + 1, accumulate=True),
    "a slice elsewhere": lambda x, order: x.slice_scatter(x[3:5], 0, 0, 2),
    "padded": lambda x, order: nn.functional.pad(x, (0, 0, 1, -1)),
    "a layer over the rows": lambda x, order: nn.functional.linear(
        x.t(), torch.ones(7, 7, dtype=x.dtype) + x[0, 0]
    ).t(),
    "a window over the rows": lambda x, order: nn.functional.conv1d(
        x.t()[None], torch.ones(5, 5, 3, dtype=x.dtype) + x[0, 0], padding=1
    )[0].t(),
    "scattered line by line": lambda x, order: torch.zeros_like(x).scatter(
        0, torch.stack([order, *[order.flip(0)] * 4], 1), x
    ),
}


class Ending(Watching):
    """Knows only the last tensor that is made: memory is full of anything until all of it is written."""

    end: tuple[torch.Tensor, Rows | None]

    def on_data(self, call):
        out = call.run()
        self.end = (next(tensors_in(out)), self.settle_data(call, out)[0].rows)
        return out


def ending(form) -> tuple[torch.Tensor, Rows | None]:
    x, order = numbered(7, 5), torch.tensor([3, 0, 5, 4, 6, 2, 1])
    watching = Ending(Batch(inputs=(x,), uid_N=torch.arange(7)))
    with torch.inference_mode(), watching:
        form(x, order) + 0.0
    return watching.end


@pytest.mark.parametrize("form", FOLLOWED)
def test_rows_that_are_put_elsewhere_are_followed(form):
    tensor, rows = ending(FOLLOWED[form])
    assert rows is not None
    assert_content(tensor, rows)


def _one_by_a_mask(x, order):
    y = x.clone()
    y[x[:, 0] == 3] = x[x[:, 0] == 3] * 1.0
    return y


def _one_into_zeros(x, order):
    y = torch.zeros_like(x)
    y[x[:, 0] == 0] = x[x[:, 0] == 0]
    y[x[:, 0] > 0] = x[x[:, 0] > 0]
    return y


def _pictures_among_tokens(x, order):
    tokens = x[:, None].expand(7, 4, 5)
    mask = (torch.arange(28).view(7, 4) % 3 == 0)[..., None].expand(7, 4, 5)
    return tokens.clone().masked_scatter(mask, tokens[mask].view(-1, 5))


@pytest.mark.parametrize("form", [_one_by_a_mask, _one_into_zeros, _pictures_among_tokens])
def test_what_a_mask_picks_is_put_where_it_is_of(form):
    tensor, rows = ending(form)
    assert rows is not None
    assert_content(tensor, rows)


def test_what_a_mask_takes_from_other_rows_is_unknown():
    mask = torch.arange(7)[:, None].expand(7, 5) < 3
    assert ending(lambda x, order: x.masked_scatter(mask, x[order]))[1] is None
    assert ending(lambda x, order: x.masked_scatter(mask[:, :1].expand(7, 5), x.flip(0)))[1] is None


def test_whatever_is_made_of_one_row_is_of_it():
    x = numbered(1, 6)
    watching = watch(Batch(inputs=(x,), uid_N=torch.arange(1)), lambda x: torch.stack([x, x], 1).mean(1).flatten())
    assert watching.lost == 0


def test_what_torch_calls_pointwise_has_a_rule():
    source = Source(Rows(0, 3), (3, 2), torch.zeros(3, 2))
    lost = []
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        forms = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else []
        if any(torch.Tag.pointwise in getattr(packet, form).tags for form in forms):
            plain = name if name.startswith("__") else name.rstrip("_")
            lost += [] if follow(plain, {}, [source], (3, 2)) else [plain]
    assert [name for name in lost if not name.endswith("backward")] == []


def test_quantised_numbers_and_losses_keep_their_rows():
    x = numbered(7, 5)

    def forward(x):
        scaled = torch.fake_quantize_per_tensor_affine(x.float(), 1.0, 0, -128, 127)
        scaled = scaled + torch.fake_quantize_per_channel_affine(
            x.float(), torch.ones(5), torch.zeros(5).int(), 1, -128, 127
        )
        scaled = scaled + torch.quantize_per_tensor(x.float(), 1.0, 0, torch.qint8).dequantize()
        loss = nn.functional.mse_loss(scaled, scaled * 2, reduction="none")
        return loss + torch.searchsorted(torch.arange(3.0), scaled).float() + torch.log10(scaled + 1)

    watching = watch(Batch(inputs=(x,), uid_N=torch.arange(7)), forward)
    assert watching.lost == 0
    reduced = watch(Batch(inputs=(x,), uid_N=torch.arange(7)), lambda x: nn.functional.mse_loss(x.float(), x.float()))
    assert reduced.lost == 1


@pytest.mark.parametrize("form", LOST)
def test_rows_that_cannot_be_told_are_unknown(form):
    assert ending(LOST[form])[1] is None


def test_a_site_behind_rows_that_were_sorted_and_put_back_is_shown_each_as_itself():
    def forward(self, x):
        order = x[:, 1].argsort()
        sorted_back = torch.empty_like(x)
        sorted_back[order] = self.first(x[order]) * 0.0 + x[order]
        return self.second(sorted_back).relu()

    x = numbers(6, 4)
    x[:, 0] = torch.arange(6)
    shown = show(Free(forward, first=linear(4, 4), second=linear(4, 3)), batch_of(x))
    for site in ("first", "second"):
        assert shown.last[site].row_index_L.tolist() == shown.x[site][:, 0, 0, 0].tolist()


def test_rows_that_disagree_are_unknown():
    assert agreed([Rows(0, 3), Rows(1, 3)]) is None
    assert agreed([along(0, torch.tensor([0, 0]), 3), along(0, torch.tensor([0, 1]), 3)]) is None
    assert agreed([whole(1, 3), whole(2, 3)]) is None


def test_sorting_the_rows_loses_them():
    assert follow("sort", {"dim": 0}, [], (3,)) is None
    x = numbered(4, 3)
    watching = watch(Batch(inputs=(x,), uid_N=torch.arange(4)), lambda x: x.sort(0))
    assert watching.lost == 2
