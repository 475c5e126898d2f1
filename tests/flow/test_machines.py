"""Factorisation machines and embedding-fed layers against written-out one-hot vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.flow.models import Free, linear, numbers, weight
from tests.flow.shown import batch_of, show

SIZES = (3, 5, 2)


def embedding(values: int, factors: int) -> nn.Embedding:
    return nn.Embedding(values, factors, dtype=torch.float64)


def categories(rows: int) -> torch.Tensor:
    return torch.stack([torch.randint(size, (rows,)) for size in SIZES], 1)


def one_hot(category: torch.Tensor) -> torch.Tensor:
    return torch.cat([nn.functional.one_hot(category[:, k], n).double() for k, n in enumerate(SIZES)], 1)


def interactions(e: torch.Tensor) -> torch.Tensor:
    return 0.5 * (e.sum(1).square() - e.square().sum(1)).sum(1)


def assert_machine(shown, name: str, x: torch.Tensor, v: torch.Tensor) -> None:
    """z_f = Σ v_if x_i with the largest |v| positive, a_f = ½(z_f² − Σ v_if² x_i²), x as it is presented."""
    site = shown.site(name)
    assert (site.kind, site.gate, site.fires) == ("fm", "fm_square", False)
    np.testing.assert_allclose(shown.x[name][:, 0, 0], x)
    np.testing.assert_allclose(site.pattern_UD.abs(), v.T.abs())
    assert bool((site.pattern_UD.gather(1, site.pattern_UD.abs().argmax(1, keepdim=True)) > 0).all())
    sign = torch.sign(site.pattern_UD[:, 0] * v[0])
    np.testing.assert_allclose(shown.z[name][:, 0], (x @ v) * sign, atol=1e-12)
    np.testing.assert_allclose(shown.a[name][:, 0], 0.5 * ((x @ v) ** 2 - x**2 @ v**2), atol=1e-12)
    sums = shown.last[name].input_sums()
    np.testing.assert_allclose(sums.sum_LSG[:, 0, 0], x.sum(1), atol=1e-12)
    np.testing.assert_allclose(sums.square_LSG[:, 0, 0], x.square().sum(1), atol=1e-12)
    centred = (x - x.mean(1, keepdim=True)).square().sum(1)
    np.testing.assert_allclose(sums.centred_LSG[:, 0, 0], centred, atol=1e-12)


@pytest.mark.parametrize("power", [lambda e: e.square(), lambda e: e**2, lambda e: e * e])
def test_one_table_with_offsets(power):
    def forward(self, category):
        e = self.table(category + self.start)
        return 0.5 * (power(e.sum(1)) - power(e).sum(1)).sum(1)

    model = Free(forward, table=embedding(sum(SIZES), 4), start=nn.Buffer(torch.tensor([0, 3, 8])))
    category = categories(6)
    shown = show(model, batch_of(category))
    assert_machine(shown, "table", one_hot(category), model.table.weight.detach())
    assert shown.discovery.unread == ()


def test_a_table_for_each_field_and_numbers_beside_them():
    def forward(self, category, x):
        fields = torch.stack([table(category[:, k]) for k, table in enumerate(self.tables)], 1)
        return interactions(torch.cat([x[:, :, None] * self.numbers, fields], 1))

    model = Free(forward, tables=nn.ModuleList(embedding(n, 4) for n in SIZES), numbers=weight(2, 4))
    category, x = categories(6), numbers(6, 2)
    shown = show(model, batch_of(category, x))
    v = torch.cat([model.numbers, *[table.weight for table in model.tables]]).detach()
    (site,) = shown.discovery.sites
    assert_machine(shown, site.name, torch.cat([x, one_hot(category)], 1), v)


def test_fields_with_values_and_values_that_repeat():
    def forward(self, index, value):
        return interactions(self.table(index) * value[..., None])

    model = Free(forward, table=embedding(5, 3))
    index, value = torch.randint(5, (7, 4)), numbers(7, 4)
    x = torch.zeros(7, 5, dtype=torch.float64).scatter_add(1, index, value)
    shown = show(model, batch_of(index, value))
    # Σ e² over fields is not Σ v² x² where a value repeats; the model's own a stands
    v = model.table.weight.detach()
    sign = torch.sign(shown.site("table").pattern_UD[:, 0] * v[0])
    np.testing.assert_allclose(shown.x["table"][:, 0, 0], x, atol=1e-12)
    np.testing.assert_allclose(shown.z["table"][:, 0], (x @ v) * sign, atol=1e-12)
    np.testing.assert_allclose(shown.a["table"][:, 0].sum(1), model(index, value).detach(), atol=1e-12)


def test_dense_inputs():
    model = Free(
        lambda self, x: self.l(x) + 0.5 * ((x @ self.v) ** 2 - (x**2) @ (self.v**2)).sum(1, keepdim=True),
        l=linear(5, 1),
        v=weight(5, 3),
    )
    x = numbers(6, 5)
    shown = show(model, batch_of(x))
    assert [site.name for site in shown.discovery.sites] == ["l", "v"]
    assert_machine(shown, "v", x, model.v.detach())


def test_layers_fed_by_embeddings_know_their_fields():
    model = Free(
        lambda self, c: self.deep(torch.cat([table(c[:, k]) for k, table in enumerate(self.tables)], 1)).relu(),
        tables=nn.ModuleList(embedding(n, 4) for n in SIZES),
        deep=linear(12, 6),
    )
    category = categories(5)
    shown = show(model, batch_of(category))
    space = shown.site("deep").inputs
    assert (space.kind, space.shape, space.upstream) == ("embeddings", (3, 4), ("tables.0", "tables.1", "tables.2"))
    expected = torch.cat([table(category[:, k]) for k, table in enumerate(model.tables)], 1)
    torch.testing.assert_close(shown.x["deep"][:, 0, 0], expected)
    assert {unread.name for unread in shown.discovery.unread} == {f"tables.{k}.weight" for k in range(3)}
    assert all(unread.reason.startswith("looked up") for unread in shown.discovery.unread)
