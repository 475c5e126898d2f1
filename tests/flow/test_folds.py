"""Effective weights: norms folded in, reparametrisations resolved, weights tied, derived and sliced."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from tests.flow.models import Free, linear, numbers, weight
from tests.flow.shown import batch_of, show


def assert_explained(shown, tolerance: float = 1e-10) -> None:
    for site in shown.discovery.sites:
        w = site.pattern_UD.view(site.groups, -1, site.fan_in)
        z = torch.einsum("lsgd,gud->lsgu", shown.x[site.name].double(), w).flatten(2) + site.bias_U
        torch.testing.assert_close(z, shown.z[site.name].double(), atol=tolerance, rtol=tolerance)


def test_batch_norm_over_tokens_is_folded_through_views(randomised):
    model = randomised(
        Free(lambda self, x: self.n(self.l(x).mT).mT.relu(), l=linear(3, 4), n=nn.BatchNorm1d(4, dtype=torch.float64))
    ).eval()
    x = numbers(5, 6, 3)
    shown = show(model, batch_of(x))
    assert shown.site("l").folded == ("n",)
    torch.testing.assert_close(shown.a["l"], model(x))
    assert_explained(shown)


def test_batch_norm_behind_a_concatenation_is_folded_part_by_part(randomised):
    model = randomised(
        Free(
            lambda self, x: self.n(torch.cat([self.a(x), self.b(x)], 1)).relu(),
            a=nn.Conv2d(2, 3, 1, dtype=torch.float64),
            b=nn.Conv2d(2, 4, 3, padding=1, dtype=torch.float64),
            n=nn.BatchNorm2d(7, dtype=torch.float64),
        )
    ).eval()
    x = numbers(3, 2, 4, 4)
    shown = show(model, batch_of(x))
    torch.testing.assert_close(torch.cat([shown.a["a"], shown.a["b"]], -1).mT.unflatten(2, (4, 4)), model(x))
    assert_explained(shown)
    assert shown.discovery.unread == ()


def test_batch_norm_before_a_residual_sum_is_folded(randomised):
    model = randomised(
        Free(
            lambda self, x: functional.relu_(self.n(self.c(x)) + x),
            c=nn.Conv2d(3, 3, 3, padding=1, bias=False),
            n=nn.BatchNorm2d(3),
        )
    ).eval()
    x = torch.randn(2, 3, 5, 5)
    shown = show(model, batch_of(x))
    site = shown.site("c")
    assert (site.gate, site.folded) == ("identity", ("n",))
    torch.testing.assert_close(shown.z["c"].mT.unflatten(2, (5, 5)), model.n(model.c(x)))


def test_a_norm_that_two_paths_read_differently_is_not_folded(randomised):
    """DenseNet: each layer has its own norm of the same units; where they disagree, the site's own output stands."""
    model = randomised(
        Free(
            lambda self, x: (lambda z: self.m(z) + self.n(z))(self.c(x)),
            c=nn.Conv1d(2, 3, 1),
            m=nn.BatchNorm1d(3),
            n=nn.BatchNorm1d(3),
        )
    ).eval()
    shown = show(model, batch_of(torch.randn(4, 2, 5)))
    assert shown.site("c").folded == ()
    torch.testing.assert_close(shown.site("c").pattern_UD, shown.site("c").raw_UD)
    assert {unread.name for unread in shown.discovery.unread} == {"m.weight", "m.bias", "n.weight", "n.bias"}


def test_a_frozen_norm_written_as_scale_and_shift_is_folded():
    model = Free(
        lambda self, x: (self.c(x) * self.scale.view(1, -1, 1, 1) + self.shift.view(1, -1, 1, 1)).relu_(),
        c=nn.Conv2d(2, 3, 3, bias=False, dtype=torch.float64),
        scale=nn.Buffer(numbers(3)),
        shift=nn.Buffer(numbers(3)),
    )
    shown = show(model, batch_of(numbers(2, 2, 5, 5)))
    assert shown.site("c").gate == "relu"
    torch.testing.assert_close(shown.site("c").bias_U, model.shift)
    assert_explained(shown)


def test_pooling_between_site_and_norm_keeps_every_position(randomised):
    model = randomised(nn.Sequential(nn.Conv2d(1, 6, 3), nn.MaxPool2d(2), nn.BatchNorm2d(6), nn.ReLU())).eval()
    x = torch.randn(3, 1, 8, 8)
    shown = show(model, batch_of(x))
    site = shown.site("0")
    assert (site.gate, site.folded) == ("relu", ("2",))
    negative = int((model[2].weight < 0).sum())
    assert site.note == f"of {negative} units with a negative gain behind it, the max-pooling keeps the smallest z"
    # where the gain is positive, pooling the activations is the model's own activation
    pooled = functional.max_pool2d(shown.a["0"].mT.unflatten(2, (6, 6)), 2)
    keep = model[2].weight > 0
    torch.testing.assert_close(pooled[:, keep], model(x)[:, keep])


@pytest.mark.parametrize("readers", ["one", "three sites", "a sum too"])
def test_a_gain_is_folded_where_sites_alone_read_it(readers, randomised):
    def forward(self, x):
        h = self.n(x)
        if readers == "one":
            return self.q(h)
        if readers == "three sites":
            return self.q(h) + self.k(h) * self.v(h.transpose(0, 1)).transpose(0, 1)
        return self.q(h) + h

    parts = {name: linear(4, 4) for name in ("q" if readers != "three sites" else "qkv")}
    model = randomised(Free(forward, n=nn.LayerNorm(4, dtype=torch.float64), **parts))
    x = numbers(5, 3, 4) * 3 + 1
    shown = show(model, batch_of(x))
    assert_explained(shown)
    folded = () if readers == "a sum too" else ("n",)
    assert {site.folded for site in shown.discovery.sites} == {folded}
    expected = model.n(x) if readers == "a sum too" else functional.layer_norm(x, (4,))
    torch.testing.assert_close(shown.x["q"][:, :, 0], expected)
    assert len(shown.discovery.unread) == (2 if readers == "a sum too" else 0)


@pytest.mark.parametrize("form", ["module", "written out", "written out with a bias"])
def test_root_mean_square_norms(form):
    def forward(self, x):
        if form == "module":
            return self.l(self.n(x))
        normalised = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        h = self.g * normalised
        return self.l(h + self.b if form.endswith("bias") else h)

    norm = nn.RMSNorm(4, eps=1e-6, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    model = Free(forward, n=norm, l=linear(4, 3), g=weight(4), b=weight(4))
    x = numbers(5, 4) * 3
    shown = show(model, batch_of(x))
    gain = norm.weight if form == "module" else model.g
    torch.testing.assert_close(shown.site("l").pattern_UD, (model.l.weight * gain).detach())
    torch.testing.assert_close(shown.x["l"][:, 0, 0], functional.rms_norm(x, (4,), eps=1e-6))
    assert_explained(shown)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: parametrizations.spectral_norm(layer),
        lambda layer: parametrizations.orthogonal(layer),
        lambda layer: nn.utils.weight_norm(layer),
        lambda layer: nn.utils.spectral_norm(layer),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_weight_that_acts_is_the_pattern(wrap):
    model = nn.Sequential(wrap(linear(4, 3)), nn.ReLU()).eval()
    x = numbers(5, 4)
    shown = show(model, batch_of(x))
    site = shown.site("0")
    torch.testing.assert_close(shown.a["0"][:, 0], model(x))
    with torch.no_grad():
        model(x)
    torch.testing.assert_close(site.pattern_UD, model[0].weight.detach())
    assert site.gate == "relu"
    assert shown.discovery.unread == ()


def test_weights_made_of_several_parameters():
    model = Free(
        lambda self, x: functional.linear(x, self.weight * self.mask + self.up @ self.down),
        weight=weight(5, 4),
        mask=nn.Buffer((numbers(5, 4) > 0).double()),
        up=weight(5, 2),
        down=weight(2, 4),
    )
    shown = show(model, batch_of(numbers(6, 4)))
    effective = model.weight * model.mask + model.up @ model.down
    torch.testing.assert_close(shown.site("weight").pattern_UD, effective.detach())
    assert shown.discovery.unread == ()


def test_tied_weights_say_what_they_are_tied_to():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, index):
            return self.head(self.body(self.embed(index)).relu())

    shown = show(Tied(), batch_of(torch.randint(7, (3, 5))))
    assert [(site.name, site.alias_of) for site in shown.discovery.sites] == [("body", None), ("head", "embed")]


def test_slices_of_one_parameter_are_sites_of_their_own():
    model = Free(lambda self, x: torch.cat([x @ self.experts[0], x @ self.experts[1]], -1), experts=weight(2, 3, 4))
    shown = show(model, batch_of(numbers(5, 3)))
    assert [site.name for site in shown.discovery.sites] == ["experts.0", "experts.1"]
    torch.testing.assert_close(shown.site("experts.1").pattern_UD, model.experts[1].mT.detach())


def test_constants_that_meet_a_weight_are_a_bias():
    model = Free(
        lambda self, x: (self.l(x) + self.q(torch.ones(1, 3, dtype=x.dtype))).relu(), l=linear(4, 5), q=linear(3, 5)
    )
    shown = show(model, batch_of(numbers(6, 4)))
    expected = model.l.bias + model.q.weight.sum(1) + model.q.bias
    torch.testing.assert_close(shown.site("l").bias_U, expected.detach())
    assert len(shown.discovery.sites) == 1


def test_batch_norm_without_running_statistics_stays_unfolded_and_says_why():
    norm = nn.BatchNorm1d(4, track_running_stats=False, dtype=torch.float64)
    model = Free(lambda self, x: self.n(self.l(x)).relu(), l=linear(3, 4), n=norm)
    x = numbers(5, 3)
    shown = show(model, batch_of(x))
    site = shown.site("l")
    assert (site.gate, site.norm, site.folded) == ("relu", "n", ())
    assert "takes them from each batch" in site.note
    torch.testing.assert_close(site.pattern_UD, model.l.weight.detach())
    torch.testing.assert_close(shown.z["l"][:, 0], norm(model.l(x)).detach())
