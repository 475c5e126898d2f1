"""Products of data and weight in every order and notation, against einsum in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ModelError
from pipeline.flow.discover import discover
from pipeline.flow.tap import tapped_forward
from tests.flow.models import Free, linear, numbers, weight
from tests.flow.shown import batch_of, show

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


def explained(shown, name: str) -> np.ndarray:
    """x · w + b of explicit patches, (L, S, U)."""
    site = shown.site(name)
    w = site.pattern_UD.numpy().reshape(site.groups, -1, site.fan_in)
    z = np.einsum("lsgd,gud->lsgu", shown.x[name].numpy(), w)
    return z.reshape(*z.shape[:2], -1) + site.bias_U.numpy()


@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shape", "groups"),
    [
        ("nd,du->nu", (4, 3), (3, 5), 1),
        ("ntd,hde->nthe", (4, 6, 3), (2, 3, 5), 1),
        ("nthd,hde->nthe", (4, 6, 2, 3), (2, 3, 5), 2),
        ("nthe,hed->ntd", (4, 6, 2, 3), (2, 3, 5), 1),
        ("nchw,uc->nuhw", (4, 3, 2, 5), (6, 3), 1),
        ("n...d,du->n...u", (4, 2, 3, 5), (5, 6), 1),
        ("tnd,ud->tnu", (7, 4, 3), (5, 3), 1),
    ],
)
def test_einsum(equation, x_shape, w_shape, groups):
    model = Free(lambda self, x: torch.einsum(equation, x, self.w), w=weight(*w_shape))
    x = numbers(*x_shape)
    shown = show(model, batch_of(x, rows=4))
    site = shown.site("w")
    assert site.groups == groups
    assert site.units * site.fan_in * groups == model.w.numel() * groups
    np.testing.assert_allclose(explained(shown, "w"), shown.z["w"], atol=1e-12)
    assert shown.last["w"].rows == 4
    assert shown.last["w"].row_L is None


@SETTINGS
@given(
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["x @ w", "w @ x", "bmm", "heads", "linear", "addmm"]),
)
def test_products(rows, positions, inputs, units, form):
    if form == "x @ w":
        model, x = Free(lambda self, x: x @ self.w, w=weight(inputs, units)), numbers(rows, positions, inputs)
    elif form == "w @ x":
        model, x = Free(lambda self, x: self.w @ x, w=weight(units, inputs)), numbers(rows, inputs, positions)
    elif form == "bmm":
        model = Free(lambda self, x: torch.bmm(x.transpose(0, 1), self.w), w=weight(positions, inputs, units))
        x = numbers(rows, positions, inputs)
    elif form == "heads":
        model, x = Free(lambda self, x: x[:, None] @ self.w, w=weight(3, inputs, units)), numbers(rows, 2, inputs)
    elif form == "linear":
        model, x = Free(lambda self, x: self.w(x), w=linear(inputs, units)), numbers(rows, positions, inputs)
    else:
        model = Free(lambda self, x: torch.addmm(self.b, x, self.w), w=weight(inputs, units), b=weight(units))
        x = numbers(rows, inputs)
    shown = show(model, batch_of(x))
    (site,) = shown.discovery.sites
    np.testing.assert_allclose(explained(shown, site.name), shown.z[site.name], atol=1e-12)
    made = model(x).detach().numpy()
    np.testing.assert_array_equal(np.sort(shown.z[site.name].numpy().ravel()), np.sort(made.ravel()))


@pytest.mark.parametrize("layout", ["(N, T, D)", "(T, N, D)", "(N·T, D)", "(T·N, D)"])
def test_merged_rows_become_positions_again(layout):
    x = numbers(3, 5, 4)
    model = Free(None, l=linear(4, 2))

    def forward(self, x):
        if layout == "(N, T, D)":
            return self.l(x)
        if layout == "(T, N, D)":
            return self.l(x.transpose(0, 1))
        if layout == "(N·T, D)":
            return self.l(x.reshape(-1, 4))
        return self.l(x.transpose(0, 1).reshape(-1, 4))

    model._forward = forward
    shown = show(model, batch_of(x))
    torch.testing.assert_close(shown.x["l"][:, :, 0], x)
    torch.testing.assert_close(shown.z["l"], model.l(x))
    assert shown.last["l"].row_L is None


def test_windows_keep_their_row():
    """Windows of an image are entries that know their row; every element of x is where the row says."""
    x = numbers(3, 4, 6, 5)

    def forward(self, x):
        windows = x.view(3, 2, 2, 3, 2, 5).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 5)
        return self.l(windows)

    shown = show(Free(forward, l=linear(5, 2)), batch_of(x))
    last = shown.last["l"]
    patches = shown.x["l"][:, :, 0]
    for row in range(3):
        of_row = patches if last.row_L is None else patches[last.row_L == row]
        of_row = of_row[row] if last.row_L is None else of_row
        assert sorted(of_row.flatten().tolist()) == sorted(x[row].flatten().tolist())


@pytest.mark.parametrize(
    "form", [lambda x, w: torch.tensordot(x, w, dims=([1], [0])), lambda x, w: torch.inner(x, w.T)]
)
def test_composite_products_are_followed_inside(form):
    model = Free(lambda self, x: form(x, self.w).relu(), w=weight(4, 5))
    x = numbers(6, 4)
    shown = show(model, batch_of(x))
    torch.testing.assert_close(shown.site("w").pattern_UD, model.w.detach().T)
    assert shown.site("w").gate == "relu"


def test_a_product_without_units_axis():
    shown = show(Free(lambda self, x: x @ self.w, w=weight(4)), batch_of(numbers(6, 4)))
    assert shown.site("w").units == 1
    np.testing.assert_allclose(explained(shown, "w"), shown.z["w"], atol=1e-12)


@pytest.mark.parametrize("form", ["expand", "repeat", "stack"])
def test_a_weight_repeated_for_every_row_is_one_weight(form):
    def forward(self, x):
        if form == "stack":
            w = torch.stack([self.w] * len(x))
        else:
            w = self.w[None].expand(len(x), -1, -1) if form == "expand" else self.w[None].repeat(len(x), 1, 1)
        return torch.bmm(x, w).relu()

    model = Free(forward, w=weight(3, 4))
    x = numbers(5, 6, 3)
    shown = show(model, batch_of(x))
    assert [(site.name, site.gate, site.units, site.groups) for site in shown.discovery.sites] == [("w", "relu", 4, 1)]
    torch.testing.assert_close(shown.z["w"], x @ model.w)
    later = show(model, batch_of(x[:2]), probe=batch_of(x))
    torch.testing.assert_close(later.z["w"], x[:2] @ model.w)


def test_a_bias_of_each_member_of_an_ensemble():
    model = Free(
        lambda self, x: torch.baddbmm(self.b, x.expand(3, *x.shape), self.w).relu(),
        w=weight(3, 2, 4),
        b=weight(3, 1, 4),
    )
    x = numbers(5, 2)
    shown = show(model, batch_of(x))
    (site,) = shown.discovery.sites
    assert (site.units, site.groups, site.gate) == (12, 3, "relu")
    torch.testing.assert_close(site.bias_U, model.b.detach().flatten())
    torch.testing.assert_close(shown.z["w"].view(5, 3, 4), (x @ model.w + model.b).transpose(0, 1).detach())


def test_a_layer_fed_with_positions_makes_no_weight_of_them():
    """Relative positions are projected, then met by the queries: as many "units" as the sequence is long."""

    def forward(self, x):
        steps = torch.arange(1 - x.shape[1], x.shape[1], dtype=x.dtype)
        places = torch.stack([torch.sin(steps), torch.cos(steps)], -1)
        return self.q(x) @ self.place(places).T

    model = Free(forward, q=linear(3, 4), place=linear(2, 4))
    shown = show(model, batch_of(numbers(5, 6, 3)))
    assert [site.name for site in shown.discovery.sites] == ["q"]
    assert {unread.name for unread in shown.discovery.unread} == {"place.weight", "place.bias"}
    assert all("constants" in unread.reason for unread in shown.discovery.unread)


def test_a_weight_met_in_a_form_that_the_probe_did_not_show_is_an_error():
    model = Free(lambda self, x: x @ self.w[: x.shape[1]], w=weight(6, 4))
    found = discover(model, batch_of(numbers(5, 6)))
    with pytest.raises(ModelError, match="weight w: acts through matmul in a form that the probe batch did not show"):
        tapped_forward(model, found, batch_of(numbers(5, 4)), lambda presentations: None)
    assert not discover(model, batch_of(numbers(5, 6)), exclude=["w"]).sites
