"""What cannot be read is said: by an error that names the site, or as a row with the reason; nothing in silence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.errors import ModelError
from pipeline.flow.check import folding_error
from pipeline.flow.discover import discover
from pipeline.flow.tap import tapped_forward
from tests.flow.models import Free, linear, numbers, weight
from tests.flow.shown import batch_of, show


def test_a_torchscript_program_is_refused_saying_what_to_use():
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        program = torch.jit.trace(nn.Linear(3, 2), torch.randn(4, 3))
    with pytest.raises(ModelError, match=r"TorchScript.*safetensors.*torch\.export"):
        discover(program, batch_of(torch.randn(4, 3)))


class Spectral(nn.Module):
    """A layer of complex numbers before one of real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(nn.functional.linear(x.to(torch.complex64), self.mixing).abs())


def test_complex_weights_are_unread_with_the_reason():
    found = discover(Spectral(), batch_of(torch.randn(5, 3)))
    assert [site.name for site in found.sites] == ["layer"]
    assert [(one.name, one.parameters) for one in found.unread] == [("mixing", 12)]
    assert found.unread[0].reason.startswith("its numbers are complex")


def test_a_model_that_changes_its_buffers_is_refused_naming_the_buffer():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += len(x)
            return self.layer(x)

    with pytest.raises(ModelError, match="buffer seen changes"):
        discover(Counting(), batch_of(torch.randn(4, 3)))


def test_a_model_in_training_mode_is_put_in_eval():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    discover(model, batch_of(torch.randn(4, 3)))
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hooks_that_a_forward_installs_once_are_put_back_with_the_flag_that_says_so():
    class Capturing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head, self.seen = linear(3, 3), linear(3, 2), []

        def forward(self, x):
            if not getattr(self, "installed", False):
                self.layer.register_forward_hook(lambda module, args, out: self.seen.append(out))
                self.installed = True
            self.seen.clear()
            self.layer(x)
            (captured,) = self.seen
            return self.head(captured)

    model = Capturing()
    model.seen.append("as it was")
    others = []
    handle = model.layer.register_forward_hook(lambda module, args, out: others.append(out))
    found = discover(model, batch_of(numbers(4, 3)))
    assert [site.name for site in found.sites] == ["layer", "head"]
    assert (model.seen, hasattr(model, "installed"), len(model.layer._forward_hooks)) == (["as it was"], False, 1)
    handle.remove()
    assert not model.layer._forward_hooks


@pytest.mark.parametrize(
    ("model", "x", "place"),
    [
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(5, 2)), torch.randn(4, 3), "site 1: linear of shapes"),
        (nn.Sequential(nn.Conv2d(3, 2, 3)), torch.randn(4, 1, 8, 8), "site 0: conv2d of shapes"),
        (nn.Linear(3, 2), torch.randn(4, 3, dtype=torch.float64), "site weight: linear of shapes"),
    ],
)
def test_inputs_that_do_not_fit_name_the_site(model, x, place):
    with pytest.raises(ModelError, match=place):
        discover(model, batch_of(x))


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (nn.Embedding(5, 3), torch.full((4, 2), 7), "site weight: embedding of shapes"),
        (Free(lambda self, x, y: x), torch.randn(4, 3), "the forward failed: TypeError: .*missing"),
        (
            Free(lambda self, x: torch.autograd.grad(self.l(x.clone().requires_grad_()).sum(), x), l=nn.Linear(3, 2)),
            torch.randn(4, 3),
            "gradients cannot be followed, call it without",
        ),
        (nn.Sequential(nn.LSTM(3, 2)), torch.randn(4, 3, 2, 1), r"the forward failed in module 0: \w*Error: LSTM"),
    ],
)
def test_whatever_a_forward_raises_is_the_model_s_error(model, x, message):
    with pytest.raises(ModelError, match=message):
        discover(model, batch_of(x))


def test_a_lazy_model_is_to_be_run_before():
    with pytest.raises(ModelError, match=r"parameter 1\.weight has no shape yet"):
        discover(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), batch_of(torch.randn(4, 3)))


def test_later_inputs_that_do_not_fit_name_the_site_too():
    model = nn.Sequential(nn.Linear(3, 2))
    found = discover(model, batch_of(torch.randn(4, 3)))
    with pytest.raises(ModelError, match=r"site 0: linear of shapes \(4, 5\)"):
        tapped_forward(model, found, batch_of(torch.randn(4, 5)), lambda p: None)


def accounted(model: nn.Module, found) -> None:
    """Every parameter is in a site or listed, none in both."""
    listed = {unread.name: unread for unread in found.unread}
    named = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
    used = {name for plan in found.plans() for name in plan.names}
    for name in named.values():
        assert (name in listed) != (name in used), name
    assert sum(unread.parameters for unread in found.unread) == sum(
        parameter.numel() for parameter in model.parameters() if named[id(parameter)] in listed
    )


def test_every_parameter_is_in_a_site_or_listed_with_its_reason():
    class Everything(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.place = nn.Parameter(torch.randn(6, 4))
            self.norm = nn.LayerNorm(4)
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
            self.pair = nn.Bilinear(4, 4, 3)
            self.unused = nn.Linear(2, 2)
            self.constant = nn.Linear(2, 4)
            self.scale = nn.Parameter(torch.ones(()))
            self.head = nn.Linear(3, 2)

        def forward(self, index):
            h = self.norm(self.embed(index) + self.place)
            h = h + self.attend(h, h, h)[0] + self.constant(torch.ones(2)).softmax(-1) * h
            return self.head(self.pair(h, h)) * self.scale

    model = Everything()
    found = discover(model, batch_of(torch.randint(5, (3, 6))))
    accounted(model, found)
    reasons = {unread.name: unread.reason for unread in found.unread}
    assert "looked up" in reasons["embed.weight"]
    assert "added" in reasons["place"]
    assert "norm" in reasons["norm.weight"]
    assert "bilinear" in reasons["pair.weight"]
    assert "never acts" in reasons["unused.weight"]
    assert "constants" in reasons["constant.weight"]


def test_a_site_whose_rows_cannot_be_followed_is_listed():
    model = Free(lambda self, x: self.l(x.sort(0).values), l=linear(3, 2))
    found = discover(model, batch_of(numbers(4, 3)))
    assert found.sites == ()
    assert {unread.name: unread.reason for unread in found.unread} == dict.fromkeys(
        ("l.weight", "l.bias"), "which rows of the batch its presentations belong to cannot be followed"
    )


def test_a_map_over_the_rows_themselves_is_listed():
    model = Free(lambda self, x: self.w @ x, w=weight(2, 4))
    found = discover(model, batch_of(numbers(4, 3)))
    assert found.sites == ()
    assert len(found.unread) == 1


def test_a_pattern_that_does_not_explain_the_model_is_no_site(monkeypatch):
    monkeypatch.setattr("pipeline.flow.check.folding_error", lambda presentations: 0.5)
    found = discover(nn.Linear(3, 2), batch_of(torch.randn(4, 3)))
    assert found.sites == ()
    assert "differs from the model's own pre-activation by 0.5" in found.unread[0].reason


def test_the_check_sees_a_wrong_pattern():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU())
    found = discover(model, batch_of(torch.randn(3, 2, 5, 5)))
    assert found.sites[0].error < 1e-6
    with torch.no_grad():
        model[0].weight[2, 1, 0, 2] += 1.0
    errors = []
    tapped_forward(model, found, batch_of(torch.randn(3, 2, 5, 5)), lambda p: errors.append(folding_error(p)))
    assert errors[0] > 1e-2


def test_a_pre_activation_that_never_comes_is_an_error():
    model = Free(lambda self, x: self.l(x).relu() if self.gated else self.l(x), l=linear(3, 2), gated=True)
    found = discover(model, batch_of(numbers(4, 3)))
    model.gated = False
    with pytest.raises(ModelError, match="site l: its output did not reach relu"):
        tapped_forward(model, found, batch_of(numbers(4, 3)), lambda p: None)


def test_errors_of_the_observer_are_not_swallowed():
    model = nn.Linear(3, 2)
    found = discover(model, batch_of(torch.randn(4, 3)))

    def observe(presentations):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tapped_forward(model, found, batch_of(torch.randn(4, 3)), observe)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_stay_in_their_rows(value):
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(24, 3)).double()
    x = numbers(4, 2, 6)
    clean = show(model, batch_of(x))
    x[1, 0, 2] = value
    shown = show(model, batch_of(x), probe=batch_of(x))
    assert [site.error < 1e-10 for site in shown.discovery.sites] == [True, True]
    others = torch.tensor([0, 2, 3])
    for name in clean.z:
        torch.testing.assert_close(shown.z[name][others], clean.z[name][others])
    sums, expected = shown.last["0"].input_sums(), clean.last["0"].input_sums()
    untouched = torch.ones(4, 6, dtype=torch.bool)
    untouched[1, 1:4] = False
    for name in ("sum_LSG", "square_LSG", "centred_LSG"):
        torch.testing.assert_close(getattr(sums, name)[untouched], getattr(expected, name)[untouched])
        assert not torch.isfinite(getattr(sums, name)[1, 1:4]).any()


def test_of_sites_that_wait_in_vain_the_first_one_is_named():
    """A reason stands in a table, whose bytes are the same after every run."""
    names = [f"layer{number}" for number in range(9)]

    def forward(self, x):
        made = [getattr(self, name)(x) for name in names]
        return torch.stack([torch.relu(z) for z in made] if float(x.sum()) < 9 else made).sum(0)

    model = Free(forward, **{name: nn.Linear(4, 4) for name in names}).eval()
    found = discover(model, batch_of(torch.zeros(3, 4)))
    for _ in range(3):
        with pytest.raises(ModelError, match=r"site layer0: its output did not reach relu"):
            tapped_forward(model, found, batch_of(torch.ones(3, 4)), lambda _: None)


def _parts_beside_children() -> nn.Module:
    def forward(self, x):
        first, second = (self.m.weight @ x.T).T.chunk(2, -1)
        return self.m[0](first.relu()) + self.m[1](second.tanh())

    model = Free(forward, m=nn.Sequential(linear(3, 3), linear(3, 3)))
    model.m.weight = weight(6, 6)
    return model


def _calls_beside_a_module() -> nn.Module:
    def forward(self, x):
        return self.get_submodule("a#1")(self.a(self.a(x).relu()).tanh())

    return Free(forward, a=linear(6, 6), **{"a#1": linear(6, 6)})


@pytest.mark.parametrize(
    ("make", "names", "left"),
    [(_parts_beside_children, ["m.0", "m.1"], []), (_calls_beside_a_module, ["a#1"], ["a"])],
    ids=["parts", "calls"],
)
def test_two_sites_of_one_name_are_refused_unless_both_are_excluded(make, names, left):
    with pytest.raises(ModelError, match=f"two sites are called {names[0]}: .* rename the module, or exclude both"):
        discover(make(), batch_of(numbers(4, 6)))
    assert [site.name for site in discover(make(), batch_of(numbers(4, 6)), exclude=names).sites] == left
