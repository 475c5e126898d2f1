"""Labels of positions go to a site by which axis counts its positions, never by how many there are.

In every model here as many channels as positions, or as many lines as columns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.flow.discover import discover
from pipeline.flow.tap import tapped_forward
from pipeline.measure import measure
from pipeline.sites import Presentations

ROWS, SIZE = 9, 6
OTHERS = "no position's label is counted: its positions are not those"


class Model(nn.Module):
    """Layers by name, all of SIZE numbers to SIZE, and a forward."""

    def __init__(self, forward: Callable[[Model, torch.Tensor], torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


def dense() -> nn.Linear:
    return nn.Linear(SIZE, SIZE)


def shown_of(model: nn.Module, batch: Batch) -> dict[str, Presentations]:
    found: dict[str, Presentations] = {}
    tapped_forward(model.eval(), discover(model, batch), batch, lambda shown: found.update({shown.site.name: shown}))
    return found


def labelled(*shape: int) -> torch.Tensor:
    """A label of its own for each position of each row."""
    return torch.arange(ROWS * torch.Size(shape).numel()).view(ROWS, *shape)


def mixed(model: Model, x: torch.Tensor) -> torch.Tensor:
    """Channels mixed at each step, then steps in each channel, then channels again."""
    h = model.channels(model.embed(x)).relu()
    return model.after(h + model.steps(h.transpose(1, 2)).relu().transpose(1, 2)).relu()


def test_a_layer_over_the_steps_has_no_step_of_its_own() -> None:
    model = Model(mixed, embed=nn.Embedding(7, SIZE), channels=dense(), steps=dense(), after=dense())
    label_NS = labelled(SIZE)
    token_NS = label_NS % 7
    found = shown_of(model, Batch((token_NS,), torch.arange(ROWS), label_NS=label_NS))
    assert found["steps"].label_LS is None
    assert torch.equal(found["channels"].label_LS, label_NS)
    assert torch.equal(found["after"].label_LS, label_NS)
    tables = measure(model, [(token_NS, label_NS % 3)], classes=3)
    assert set(tables["classes"]["site"].to_pylist()) == {"channels", "after"}
    reasons = dict(zip(tables["sites"]["site"].to_pylist(), tables["sites"]["reason"].to_pylist(), strict=True))
    assert reasons["channels"] is None
    assert reasons["steps"].startswith(OTHERS)
    of_site = {row["site"]: row for row in tables["neurons"].to_pylist()}
    assert of_site["steps"]["class_information"] is None
    assert of_site["after"]["class_information"] is not None


def test_a_mask_is_of_no_other_axis_either() -> None:
    model = Model(mixed, embed=nn.Embedding(7, SIZE), channels=dense(), steps=dense(), after=dense())
    mask_NS = torch.arange(SIZE) < torch.arange(ROWS)[:, None] % SIZE + 1
    found = shown_of(model, Batch((labelled(SIZE) % 7,), torch.arange(ROWS), mask_NS=mask_NS))
    assert found["steps"].mask_LS is None
    assert torch.equal(found["channels"].mask_LS, mask_NS)
    assert torch.equal(found["after"].mask_LS, mask_NS)


def transposed(model: Model, x: torch.Tensor) -> torch.Tensor:
    return model.second(model.first(x).relu().transpose(2, 3)).relu()


def test_lines_that_become_columns_take_their_labels_along() -> None:
    model = Model(transposed, first=nn.Conv2d(1, 4, 3, padding=1), second=nn.Conv2d(4, 3, 3, padding=1))
    label_NHW = labelled(SIZE, SIZE)
    batch = Batch((torch.randn(ROWS, 1, SIZE, SIZE),), torch.arange(ROWS), label_NS=label_NHW.flatten(1))
    found = shown_of(model, batch)
    assert torch.equal(found["first"].label_LS, label_NHW.flatten(1))
    assert torch.equal(found["second"].label_LS, label_NHW.transpose(1, 2).flatten(1))


def causal(model: Model, x: torch.Tensor) -> torch.Tensor:
    h = model.padded(functional.pad(x, (4, 0))).relu()
    h = model.chomped(h)[..., :-2].relu()
    return model.same(h).relu()


def attending(model: Model, x: torch.Tensor) -> torch.Tensor:
    h = torch.cat([model.token.expand(len(x), 1, SIZE), model.embed(x)], 1)
    h = h + model.attention(h, h, h, need_weights=False)[0]
    scores = (h @ h.transpose(1, 2)).masked_fill((x == 0).any(1)[:, None, None], -1e9)
    h = model.norm(scores.softmax(-1) @ h)[:, 1:]
    return model.after(h.flip(1)).relu()


def recurrent(model: Model, x: torch.Tensor) -> torch.Tensor:
    h = model.lstm(x)[0]
    return model.after(h + h[:, -1].unsqueeze(1)).relu()


def flattened(model: Model, x: torch.Tensor) -> torch.Tensor:
    h = model.first(x).relu().flatten(2).transpose(1, 2)
    return model.after(torch.einsum("btd,dk->btk", h, model.weight).flatten(0, 1)).view(len(x), -1, 4)


def series() -> torch.Tensor:
    return torch.randn(ROWS, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def test_a_step_stays_that_step_in_causal_convolutions() -> None:
    conv = nn.Conv1d
    model = Model(
        causal,
        padded=conv(SIZE, 5, 3, dilation=2),
        chomped=conv(5, 5, 3, padding=2),
        same=conv(5, 5, 3, padding="same"),
    )
    batch = Batch((series(),), torch.arange(ROWS), label_NS=labelled(SIZE), position_axes=(-1,))
    found = shown_of(model, batch)
    assert torch.equal(found["padded"].label_LS, batch.label_NS)
    assert torch.equal(found["same"].label_LS, batch.label_NS)
    # two steps more than there are
    assert found["chomped"].label_LS is None


def test_a_token_stays_that_token_through_attention() -> None:
    attention = nn.MultiheadAttention(SIZE, 2, batch_first=True)
    token = nn.Parameter(torch.randn(1, 1, SIZE))
    model = Model(attending, embed=nn.Embedding(7, SIZE), attention=attention, norm=nn.LayerNorm(SIZE), after=dense())
    model.token = token
    batch = Batch((labelled(SIZE) % 7,), torch.arange(ROWS), label_NS=labelled(SIZE))
    found = shown_of(model, batch)
    assert torch.equal(found["after"].label_LS, batch.label_NS.flip(1))
    # with a class token one more than there are
    assert len(found) > 3
    assert all(one.label_LS is None for name, one in found.items() if name != "after")


def test_a_step_stays_that_step_through_a_recurrent_layer() -> None:
    model = Model(recurrent, lstm=nn.LSTM(SIZE, SIZE, batch_first=True), after=dense())
    batch = Batch((series(),), torch.arange(ROWS), label_NS=labelled(SIZE), position_axes=(1,))
    found = shown_of(model, batch)
    assert len(found) == 5
    assert all(torch.equal(one.label_LS, batch.label_NS) for one in found.values())


def test_positions_may_be_folded_into_the_rows() -> None:
    model = Model(flattened, first=nn.Conv2d(1, SIZE, 1), after=nn.Linear(SIZE, 4))
    model.weight = nn.Parameter(torch.randn(SIZE, SIZE))
    batch = Batch((series()[:, None],), torch.arange(ROWS), label_NS=labelled(SIZE * SIZE))
    found = shown_of(model, batch)["after"]
    assert torch.equal(found.label_LS, batch.label_NS)


@pytest.mark.parametrize(("axes", "axis"), [((1,), 1), ((2,), 2), (None, None)])
def test_which_axis_counts_the_steps_is_said_where_two_could(axes: tuple[int, ...] | None, axis: int | None) -> None:
    model = Model(lambda model, x: model.after(x).relu(), after=dense())
    batch = Batch((series(),), torch.arange(ROWS), label_NS=labelled(SIZE), position_axes=axes)
    found = discover(model, batch)
    if axis == 1:
        assert torch.equal(shown_of(model, batch)["after"].label_LS, batch.label_NS)
        assert found.sites[0].note is None
    else:
        assert shown_of(model, batch)["after"].label_LS is None
        wanted = OTHERS if axis else "no position's label is counted: which axis of the input"
        assert (found.sites[0].note or "").startswith(wanted)


def test_a_last_batch_of_one_row_keeps_its_labels() -> None:
    model = Model(mixed, embed=nn.Embedding(7, SIZE), channels=dense(), steps=dense(), after=dense())
    token_NS, label_NS = labelled(SIZE) % 7, labelled(SIZE) % 3
    parts = [(token_NS[:8], label_NS[:8]), (token_NS[8:], label_NS[8:])]
    tables = measure(model, parts, classes=3)
    n = [row["n"] for row in tables["classes"].to_pylist() if (row["site"], row["unit"]) == ("after", 0)]
    assert n == label_NS.flatten().bincount(minlength=3).tolist()


def rearranged(x: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Six draws of what moves numbers about and changes none, or adds 0; no other axis than the rows' has 5 entries."""
    for _ in range(6):
        others = [axis for axis, size in enumerate(x.shape) if size != 5]
        axis, other = (int(random.choice(others)) for _ in range(2))
        match int(random.integers(0, 9)):
            case 0:
                x = x.permute(*random.permutation(x.dim()).tolist())
            case 1:
                x = x.flip(axis)
            case 2:
                x = x.transpose(axis, other).contiguous()
            case 3:
                x = functional.pad(x, (2, 1)).narrow(-1, 2, x.shape[-1])
            case 4:
                x = torch.cat([x.narrow(axis, 0, 1) * 0, x], axis).narrow(axis, 1, x.shape[axis])
            case 5:
                x = torch.stack(x.unbind(axis), other)
            case 6 if axis + 1 < x.dim():
                x = x.flatten(axis, axis + 1).unflatten(axis, x.shape[axis : axis + 2])
            case 7:
                x = x.index_select(axis, torch.from_numpy(random.permutation(x.shape[axis])))
            case _:
                x = torch.cat(x.split(1, axis), axis) + x.new_zeros(1)
    return x


@pytest.mark.parametrize("seed", range(40))
def test_however_numbers_are_moved_about_their_labels_are_theirs(seed: int) -> None:
    """Each number says which position of which row it is, so that what a site is shown says what its label must be."""

    def forward(model: Model, x: torch.Tensor) -> torch.Tensor:
        moved = rearranged(x, np.random.default_rng(seed))
        return model.after(moved.movedim((moved.shape.index(5), moved.shape.index(3)), (0, -1))).relu()

    number_NHW = torch.arange(5 * 8).view(5, 2, 4)
    x = number_NHW[:, None].expand(5, 3, 2, 4).float().contiguous()
    model = Model(forward, after=nn.Linear(3, 2))
    found = shown_of(model, Batch((x,), torch.arange(5), label_NS=number_NHW.flatten(1)))["after"]
    shown_LS = found.patches(0, found.entries)[..., 0, 0].long()
    assert found.label_LS is not None
    assert torch.equal(found.label_LS, shown_LS)
