"""Gates: whatever they are written as, found where they act, and computing what the model computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.flow.models import Free, linear, numbers, weight
from tests.flow.shown import batch_of, show


def gelu_written_out(z):
    return 0.5 * z * (1 + torch.tanh(0.7978845608028654 * (z + 0.044715 * z**3)))


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("relu", functional.relu),
        ("relu", nn.ReLU(inplace=True)),
        ("relu", lambda z: z.clamp(min=0)),
        ("relu", lambda z: torch.maximum(z, torch.zeros((), dtype=z.dtype))),
        ("relu", lambda z: functional.threshold(z, 0, 0)),
        ("relu6", nn.ReLU6()),
        ("relu6", lambda z: z.clamp(0, 6)),
        ("leaky_relu", lambda z: torch.where(z > 0, z, 0.01 * z)),
        ("leaky_relu", lambda z: functional.leaky_relu_(z.clone(), 0.2)),
        ("relu_squared", lambda z: functional.relu(z) ** 2),
        ("gelu", nn.GELU()),
        ("gelu_tanh", nn.GELU("tanh")),
        ("gelu_tanh", gelu_written_out),
        ("gelu", lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5))),
        ("quick_gelu", lambda z: z * torch.sigmoid(1.702 * z)),
        ("silu", nn.SiLU(inplace=True)),
        ("silu", lambda z: z * torch.sigmoid(z)),
        ("silu", lambda z: z / (1 + torch.exp(-z))),
        ("mish", lambda z: z * torch.tanh(functional.softplus(z))),
        ("hardswish", lambda z: z * functional.relu6(z + 3) / 6),
        ("hardswish", nn.Hardswish()),
        ("hardsigmoid", lambda z: functional.relu6(z + 3) / 6),
        ("softsign", lambda z: z / (1 + z.abs())),
        ("elu", nn.ELU(inplace=True)),
        ("selu", nn.SELU()),
        ("softplus", nn.Softplus()),
        ("tanh", torch.tanh),
        ("sigmoid", lambda z: 1 / (1 + torch.exp(-z))),
        ("hardtanh", nn.Hardtanh()),
    ],
)
def test_gates_are_named_by_what_they_compute(name, gate):
    model = Free(lambda self, x: gate(self.l(x)) + 0.0, l=linear(3, 4))
    x = numbers(5, 3) * 3
    shown = show(model, batch_of(x))
    z = model.l(x).detach()
    assert shown.site("l").gate == name
    torch.testing.assert_close(shown.z["l"][:, 0], z)
    torch.testing.assert_close(shown.a["l"][:, 0], gate(z.clone()))


def test_prelu_has_a_slope_for_each_unit():
    act = nn.PReLU(4, dtype=torch.float64)
    nn.init.normal_(act.weight)
    model = nn.Sequential(nn.Conv1d(2, 4, 3, dtype=torch.float64), act)
    x = numbers(3, 2, 6)
    shown = show(model, batch_of(x))
    torch.testing.assert_close(shown.a["0"].transpose(1, 2), model(x))
    assert shown.site("0").gate == "prelu"
    assert shown.discovery.unread == ()


def test_a_learned_scale_inside_the_gate_is_part_of_it():
    model = Free(
        lambda self, x: (lambda z: z * torch.sigmoid(self.beta * z))(self.l(x)), l=linear(3, 4), beta=weight(4)
    )
    x = numbers(5, 3)
    shown = show(model, batch_of(x))
    torch.testing.assert_close(shown.a["l"][:, 0], model(x))
    assert shown.discovery.unread == ()


def test_a_gate_behind_views_dropout_pooling_and_concatenation():
    def forward(self, x):
        a = functional.max_pool2d(self.a(x), 2)
        b = functional.dropout(self.b(x), 0.5, self.training)[:, :, ::2, ::2]
        return functional.relu(torch.cat([a, b], 1)).flatten(1)

    model = Free(forward, a=nn.Conv2d(2, 3, 3, padding=1), b=nn.Conv2d(2, 4, 1))
    x = torch.randn(3, 2, 6, 6)
    shown = show(model, batch_of(x))
    assert [site.gate for site in shown.discovery.sites] == ["relu", "relu"]
    for name in "ab":
        z = getattr(model, name)(x).flatten(2).transpose(1, 2)
        torch.testing.assert_close(shown.z[name], z)
        torch.testing.assert_close(shown.a[name], z.relu())


@pytest.mark.parametrize(
    ("norm", "layout"),
    [
        (nn.GroupNorm(2, 4), "channels first"),
        (nn.InstanceNorm1d(4), "channels first"),
        (nn.BatchNorm1d(4, track_running_stats=False), "channels first"),
        (nn.LayerNorm(4), "channels last"),
    ],
)
def test_a_norm_of_the_data_between_site_and_gate(norm, layout):
    def forward(self, x):
        z = self.c(x)
        z = self.n(z) if layout == "channels first" else self.n(z.transpose(1, 2)).transpose(1, 2)
        return functional.gelu(z)

    model = Free(forward, c=nn.Conv1d(2, 4, 3), n=norm)
    x = torch.randn(5, 2, 9)
    shown = show(model, batch_of(x))
    site = shown.site("c")
    assert (site.norm, site.gate, site.folded) == ("n", "gelu", ())
    torch.testing.assert_close(shown.a["c"].transpose(1, 2), model(x))
    torch.testing.assert_close(functional.gelu(shown.z["c"]), shown.a["c"])
    affine = shown.last["c"].affine_LSU
    torch.testing.assert_close(affine.transpose(1, 2), model.c(x))
    explained = (shown.x["c"][:, :, 0].double() @ site.pattern_UD.T + site.bias_U).float()
    torch.testing.assert_close(affine, explained)


def test_there_is_no_gate_where_a_sum_comes_first():
    model = Free(lambda self, x: functional.relu(self.l(x) + x), l=linear(3, 3))
    shown = show(model, batch_of(numbers(5, 3)))
    assert shown.site("l").gate == "identity"
    assert not shown.site("l").fires
    torch.testing.assert_close(shown.a["l"], shown.z["l"])


def test_a_square_that_only_measures_size_is_no_gate():
    def forward(self, x):
        z = self.l(x)
        return z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)

    assert show(Free(forward, l=linear(3, 4)), batch_of(numbers(5, 3))).site("l").gate == "identity"


def test_a_mask_is_no_gate():
    model = Free(lambda self, x: self.l(x).masked_fill(torch.tensor([True, False, True]), 0.0), l=linear(3, 3))
    assert show(model, batch_of(numbers(5, 3))).site("l").gate == "identity"


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("form", ["two layers", "chunk", "glu", "conv glu"])
def test_gated_pairs_are_one_unit(form, in_place):
    if form == "two layers":
        model = Free(
            lambda self, x: functional.silu(self.g(x), inplace=in_place) * self.u(x), g=linear(3, 4), u=linear(3, 4)
        )
        name, gate = "g", "swiglu"
    elif form == "chunk":
        model = Free(lambda self, x: (lambda u, g: u * functional.gelu(g))(*self.p(x).chunk(2, -1)), p=linear(3, 8))
        name, gate = "p", "geglu"
    elif form == "glu":
        model, name, gate = Free(lambda self, x: functional.glu(self.p(x)), p=linear(3, 8)), "p", "glu"
    else:
        model = Free(lambda self, x: functional.glu(self.c(x.mT), 1).mT, c=nn.Conv1d(3, 8, 1, dtype=torch.float64))
        name, gate = "c", "glu"
    x = numbers(5, 2, 3)
    shown = show(model, batch_of(x))
    (site,) = shown.discovery.sites
    assert (site.name, site.gate, site.units) == (name, gate, 4)
    torch.testing.assert_close(shown.a[name], model(x))
    patches = shown.x[name][:, :, 0]
    torch.testing.assert_close(shown.z[name], patches @ site.pattern_UD.T + site.bias_U)
    ups = shown.a[name] / {"swiglu": functional.silu, "geglu": functional.gelu, "glu": torch.sigmoid}[gate](
        shown.z[name]
    )
    bias = (ups - patches @ site.up_UD.T).flatten(0, 1)
    torch.testing.assert_close(bias, bias[:1].expand_as(bias))
    assert shown.discovery.unread == ()


def test_chunks_with_gates_of_their_own_are_sites_of_their_own():
    def forward(self, x):
        i, f, g, o = self.l(x).chunk(4, -1)
        return torch.sigmoid(o) * torch.tanh(torch.sigmoid(i) * torch.tanh(g) + torch.sigmoid(f))

    model = Free(forward, l=linear(3, 8))
    shown = show(model, batch_of(numbers(5, 3)))
    assert [(site.name, site.gate, site.units) for site in shown.discovery.sites] == [
        ("l.0", "sigmoid", 2),
        ("l.1", "sigmoid", 2),
        ("l.2", "tanh", 2),
        ("l.3", "sigmoid", 2),
    ]
    for part, site in enumerate(shown.discovery.sites):
        torch.testing.assert_close(site.pattern_UD, model.l.weight[2 * part : 2 * part + 2].detach())


def test_uneven_parts_of_a_grouped_convolution_keep_their_own_inputs():
    def forward(self, x):
        z = self.c(x)
        return torch.cat([z[:, :3].relu(), z[:, 3:].tanh()], 1)

    model = Free(forward, c=nn.Conv1d(4, 8, 3, groups=2, dtype=torch.float64))
    x = numbers(3, 4, 6)
    shown = show(model, batch_of(x))
    torch.testing.assert_close(torch.cat([shown.a["c.0"], shown.a["c.1"]], -1).transpose(1, 2), model(x))
    for site in shown.discovery.sites:
        w = site.pattern_UD.view(site.groups, -1, site.fan_in)
        z = torch.einsum("lsgd,gud->lsgu", shown.x[site.name], w).flatten(2) + site.bias_U
        torch.testing.assert_close(z, shown.z[site.name])


def test_gates_may_be_written_onto_the_memory_of_a_view():
    def forward(self, x):
        z = self.l(x)
        z.view(-1).relu_()
        return z

    model = Free(forward, l=linear(3, 4))
    x = numbers(5, 3)
    shown = show(model, batch_of(x))
    assert shown.site("l").gate == "relu"
    torch.testing.assert_close(shown.z["l"][:, 0], model.l(x).detach())
    torch.testing.assert_close(shown.out, model(x))


@pytest.mark.parametrize("rows", [1, 5])
def test_numbers_written_as_tensors_are_constants(rows):
    def forward(self, x):
        z = self.l(x) * torch.tensor(0.5, dtype=torch.float64)
        return torch.where(z > 0, z, torch.tensor(0.0, dtype=torch.float64))

    shown = show(Free(forward, l=linear(3, 4)), batch_of(numbers(rows, 3)))
    assert shown.site("l").gate not in ("identity", "")
    torch.testing.assert_close(shown.a["l"][:, 0], shown.out)


def test_a_doubling_beside_a_square_is_no_gate():
    """The distances of a quantiser, |z|² − 2 z·e + |e|²: nothing here is a function of one unit alone."""

    def forward(self, x):
        z = self.l(x)
        return -(z.pow(2).sum(1, keepdim=True) - 2 * z @ self.e + self.e.pow(2).sum(0, keepdim=True))

    shown = show(Free(forward, l=linear(3, 4), e=nn.Buffer(numbers(4, 6))), batch_of(numbers(5, 3)))
    assert shown.site("l").gate == "identity"


@pytest.mark.parametrize(
    ("before", "scale", "shift", "gate"),
    [
        (lambda z: -z, -1, 0, "relu"),
        (lambda z: 30 * z, 30, 0, "sin"),
        (lambda z: z / 4, 0.25, 0, "tanh"),
        (lambda z: 1 - z, -1, 1, "relu"),
        (lambda z: torch.sub(z, 3, alpha=2), 1, -6, "sigmoid"),
        (lambda z: (z + 0.5) * -2, -2, -1, "relu"),
        (lambda z: z * torch.tensor(0.5, dtype=torch.float64), 0.5, 0, "softplus"),
    ],
)
def test_a_number_before_the_gate_is_part_of_the_pattern(before, scale, shift, gate):
    """z > 0 is to mean that the gate is given more than 0."""
    model = Free(lambda self, x: getattr(torch, gate, functional.softplus)(before(self.l(x))), l=linear(3, 4))
    x = numbers(5, 3)
    shown = show(model, batch_of(x))
    site = shown.site("l")
    assert site.gate == gate
    torch.testing.assert_close(site.pattern_UD, model.l.weight.detach() * scale)
    torch.testing.assert_close(site.bias_U, model.l.bias.detach() * scale + shift)
    torch.testing.assert_close(shown.z["l"][:, 0], before(model.l(x)).detach())
    torch.testing.assert_close(shown.a["l"][:, 0], shown.out)


def test_a_comparison_that_only_chooses_is_no_gate():
    model = Free(lambda self, x: x[self.l(x)[:, 0] > 0.2], l=linear(3, 1))
    assert show(model, batch_of(numbers(8, 3))).site("l").gate == "identity"


def test_a_step_is_a_gate_with_numbers():
    model = Free(lambda self, x: self.h((self.l(x) > 0).to(x.dtype)), l=linear(3, 4), h=linear(4, 2))
    x = numbers(8, 3)
    shown = show(model, batch_of(x))
    assert shown.site("l").gate == "gt"
    torch.testing.assert_close(shown.a["l"][:, 0], (model.l(x) > 0).double())


def test_a_number_without_a_gate_behind_it_is_left_alone():
    model = Free(lambda self, x: (self.q(x) * 0.5) @ self.k(x).T, q=linear(3, 4), k=linear(3, 4))
    shown = show(model, batch_of(numbers(5, 3)))
    torch.testing.assert_close(shown.site("q").pattern_UD, model.q.weight.detach())


def test_both_signs_of_a_layer_called_twice():
    model = Free(lambda self, x: torch.cat([self.l(x), -self.l(x)], 1).relu(), l=linear(3, 4))
    shown = show(model, batch_of(numbers(5, 3)))
    assert [(site.name, site.gate) for site in shown.discovery.sites] == [("l", "relu"), ("l#1", "relu")]
    torch.testing.assert_close(shown.site("l#1").pattern_UD, -model.l.weight.detach())
    torch.testing.assert_close(torch.cat([shown.a["l"], shown.a["l#1"]], -1)[:, 0], shown.out)


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(1), nn.GroupNorm(1, 1)])
def test_one_unit_that_one_row_was_probed_with_is_found_in_every_row(norm):
    layer = nn.Conv2d(2, 1, 2)
    model = nn.Sequential(layer, norm, nn.ReLU()).eval()
    x = numbers(4, 2, 5, 6).float()
    shown = show(model, batch_of(x), probe=batch_of(x[:1]))
    with torch.no_grad():
        expected = model[:2](x)
    assert [site.name for site in shown.discovery.sites] == ["0"]
    torch.testing.assert_close(shown.z["0"], expected.flatten(1)[..., None], rtol=1e-5, atol=1e-6)


def test_a_product_that_is_not_unit_by_unit_is_no_gated_pair():
    def forward(self, x):
        # each unit of the other branch meets two of the gate's
        return functional.silu(self.gate(x)) * self.up(x)[:, :, None].expand(-1, -1, 2).flatten(1)

    shown = show(Free(forward, gate=linear(3, 4), up=linear(3, 2)), batch_of(numbers(5, 3)))
    assert [(site.name, site.gate, site.units) for site in shown.discovery.sites] == [
        ("gate", "silu", 4),
        ("up", "identity", 2),
    ]


@pytest.mark.parametrize("form", ["a part", "a pair"])
def test_a_gate_with_a_number_for_each_unit_of_a_part(form):
    slopes = nn.PReLU(4, dtype=torch.float64)
    with torch.no_grad():
        slopes.weight.copy_(torch.tensor([0.1, 0.5, -0.3, 2.0]))

    def forward(self, x):
        first, second = self.layer(x).chunk(2, -1)
        return self.slopes(second) * first if form == "a pair" else torch.cat([first.tanh(), self.slopes(second)], -1)

    model, x = Free(forward, layer=linear(3, 8), slopes=slopes), numbers(6, 3)
    shown = show(model, batch_of(x))
    first, second = model.layer(x).detach().chunk(2, -1)
    name, gate = ("layer", "prelu_glu") if form == "a pair" else ("layer.1", "prelu")
    expected = slopes(second).detach() * (first if form == "a pair" else 1)
    assert shown.site(name).gate == gate
    torch.testing.assert_close(shown.z[name][:, 0], second)
    torch.testing.assert_close(shown.a[name][:, 0], expected)
    assert shown.discovery.unread == ()


def _zeroed(self, x):
    z = self.layer(x)
    z[z < 0] = 0
    return z


HIDDEN = {
    "glu": (lambda self, x: functional.glu(self.norm(self.layer(x))), (5, 3)),
    "index_put": (_zeroed, (5, 3)),
    "pixel_shuffle": (lambda self, x: functional.pixel_shuffle(self.conv(x), 2).relu(), (5, 3, 4, 4)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_gate_that_is_not_read_has_a_note(name):
    forward, shape = HIDDEN[name]
    parts = {"layer": linear(3, 8), "norm": nn.BatchNorm1d(8).double(), "conv": nn.Conv2d(3, 8, 1).double()}
    site = show(Free(forward, **parts).eval(), batch_of(numbers(*shape))).discovery.sites[0]
    assert (site.gate, site.note) == (
        "identity",
        f"its output meets {name}: what gate that is, or has behind it, is not read",
    )


def test_what_is_written_into_a_cache_has_no_note():
    def forward(self, x):
        return torch.zeros(5, 8, dtype=x.dtype).index_copy(0, torch.arange(5), self.layer(x))

    assert show(Free(forward, layer=linear(3, 8)), batch_of(numbers(5, 3))).discovery.sites[0].note is None


def test_a_norm_in_either_branch_of_a_pair_is_folded(randomised):
    def forward(self, x):
        return functional.silu(self.first(self.l(x))) * self.second(self.up(x))

    norms = {name: nn.BatchNorm1d(4, dtype=torch.float64) for name in ("first", "second")}
    model = randomised(Free(forward, l=linear(3, 4), up=linear(3, 4), **norms)).eval()
    x = numbers(5, 3)
    shown = show(model, batch_of(x))
    assert [(site.name, site.gate) for site in shown.discovery.sites] == [("l", "swiglu")]
    torch.testing.assert_close(shown.a["l"][:, 0], model(x))
    torch.testing.assert_close(shown.z["l"][:, 0], model.first(model.l(x)))
    scale = model.second.weight * (model.second.running_var + model.second.eps).rsqrt()
    torch.testing.assert_close(shown.site("l").up_UD, model.up.weight * scale[:, None])


def test_the_gain_before_a_pair_is_in_both_of_its_patterns(randomised):
    def forward(self, x):
        y = self.norm(x)
        return functional.silu(self.l(y)) * self.up(y)

    model = randomised(Free(forward, l=linear(3, 4), up=linear(3, 4), norm=nn.LayerNorm(3, dtype=torch.float64)))
    site = show(model, batch_of(numbers(5, 3))).site("l")
    assert site.folded == ("norm",)
    torch.testing.assert_close(site.pattern_UD, model.l.weight * model.norm.weight)
    torch.testing.assert_close(site.up_UD, model.up.weight * model.norm.weight)


def test_a_norm_behind_what_is_overwritten_has_the_sum_as_it_was(randomised):
    model = randomised(
        Free(lambda self, x: self.n(self.l(x).mul_(0.5)).relu(), l=linear(3, 4), n=nn.LayerNorm(4, dtype=torch.float64))
    )
    x = numbers(5, 3)
    shown = show(model, batch_of(x))
    assert (shown.site("l").norm, shown.site("l").gate) == ("n", "relu")
    torch.testing.assert_close(shown.last["l"].affine_LSU[:, 0], model.l(x) * 0.5)


def test_a_gate_of_one_position_is_none_of_the_others():
    """A class token: what becomes of the first step says nothing of those that are read elsewhere."""
    model = Free(lambda self, x: (z := self.l(x))[:, 0].relu() + z[:, 1:].mean(1), l=linear(3, 4))
    assert show(model, batch_of(numbers(5, 6, 3))).site("l").gate == "identity"
    alone = Free(lambda self, x: self.l(x)[:, 0].relu(), l=linear(3, 4))
    assert show(alone, batch_of(numbers(5, 6, 3))).site("l").gate == "relu"


def test_numbers_written_into_some_units_end_what_is_seen_of_them():
    def forward(self, x):
        z = self.l(x)
        z[:, 2:] = z[:, 2:].relu()
        return self.out(z)

    shown = show(Free(forward, l=linear(3, 4), out=linear(4, 2)), batch_of(numbers(5, 3)))
    gates = [(site.name, site.gate) for site in shown.discovery.sites]
    assert gates == [("l.0", "identity"), ("l.1", "relu"), ("out", "identity")]
