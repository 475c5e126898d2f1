"""Forwards along a script present what the tap presents, bit by bit; what no script can follow is left to the tap."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.errors import ModelError
from pipeline.flow import lazy
from pipeline.flow.discover import discover
from pipeline.flow.forwards import DEPARTURES, Forwards
from pipeline.flow.tap import tapped_forward
from pipeline.kernels import choose, native_sums
from pipeline.models.base import Task
from pipeline.sites import Presentations
from tests.flow.models import Free
from tests.flow.shown import batch_of, copied, expect_equal, expect_the_same_by_script
from tests.models.build import build

IMAGES, SERIES, TOKENS = Task((3, 8, 8), 4), Task((3, 12), 4), Task((6,), 4, vocabulary=20)


def _numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _shown(run: Callable[[Callable[[Presentations], None]], Any]) -> tuple[list[Presentations], Any]:
    kept: list[Presentations] = []
    return kept, run(lambda presented: kept.append(copied(presented)))


def _expect_as_tapped(forwards: Forwards, model: nn.Module, batch: Batch) -> None:
    """The next forward presents, and returns, what the tap does."""
    found = forwards.discovery
    seen, out = _shown(lambda observe: forwards.run(model, batch, observe))
    wanted, expected = _shown(lambda observe: tapped_forward(model, found, batch, observe))
    assert [one.site.name for one in seen] == [one.site.name for one in wanted]
    for one, other in zip(seen, wanted, strict=True):
        expect_equal(one, other)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


FAMILIES: dict[str, tuple[Task, dict[str, Any], Callable[[int, int], Any]]] = {
    "mlp": (Task((5,), 3), {}, lambda rows, seed: _numbers(rows, 5, seed=seed)),
    "cnn": (IMAGES, {}, lambda rows, seed: _numbers(rows, 3, 8, 8, seed=seed)),
    "resnet": (IMAGES, {}, lambda rows, seed: _numbers(rows, 3, 8, 8, seed=seed)),
    "tcn": (SERIES, {}, lambda rows, seed: _numbers(rows, 3, 12, seed=seed)),
    "transformer": (
        TOKENS,
        {"layers": 2, "width": 8, "heads": 2},
        lambda rows, seed: torch.randint(20, (rows, 6), generator=torch.Generator().manual_seed(seed)),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_followed_by_one_script_for_each_shape(name: str) -> None:
    task, settings_of, draw = FAMILIES[name]
    model = build(name, task, **settings_of).eval()
    forwards = Forwards(discover(model, batch_of(draw(4, 0))))
    for seed, rows in enumerate([4, 4, 4, 3, 4, 3, 3]):
        _expect_as_tapped(forwards, model, batch_of(draw(rows, seed)))
    assert forwards.scripts == 2


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(2, 6), st.booleans()), min_size=3, max_size=9))
def test_batches_of_any_shape_and_mask_in_any_order(shapes: list[tuple[int, int, bool]]) -> None:
    forwards, model = _ENCODER
    for seed, (rows, length, masked) in enumerate(shapes):
        draws = torch.Generator().manual_seed(seed)
        token = torch.randint(20, (rows, length), generator=draws)
        mask_NS = torch.rand((rows, length), generator=draws) < 0.7 if masked else None
        batch = batch_of(token, mask_NS=mask_NS, kwargs={} if mask_NS is None else {"mask": mask_NS})
        _expect_as_tapped(forwards, model, batch)


def _encoder() -> tuple[Forwards, nn.Module]:
    model = build("transformer", TOKENS, layers=1, width=8, heads=2).eval()
    return Forwards(discover(model, batch_of(torch.zeros((3, 6), dtype=torch.int64)))), model


_ENCODER = _encoder()


class Odd(nn.Module):
    """One layer into another by some way; `form` names it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.dropout = nn.LayerNorm(6), nn.Dropout(0.5)
        self.wide, self.third = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, f"_{self.form}")(x)

    def _in_place(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(functional.relu(self.first(x), inplace=True))

    def _residual_in_place(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu_(self.first(x))
        y += x
        return self.second(y)

    def _tied(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.gelu(self.first(functional.relu(self.first(x)))), self.first.weight.t())

    def _chunks(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.wide(self.norm(x)).chunk(3, dim=-1)
        return self.second(functional.scaled_dot_product_attention(query, key, value))

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.second(functional.silu(self.first(x)) * self.wide(x)[..., :6])

    def _beside_a_pair(self, x: torch.Tensor) -> torch.Tensor:
        # the last of three that read y shares the inputs of a pair, which are not had as views
        y = functional.relu(self.wide(x)[..., :6])
        return functional.silu(self.first(y)) * self.second(y) + self.third(y)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.dropout(functional.gelu(self.first(self.norm(x)))))

    def _number(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(functional.relu(self.first(x) * torch.tensor(0.5)))

    def _loop(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x[:, 0])
        for step in range(x.shape[1]):
            state = torch.tanh(self.first(x[:, step]) + self.second(state))
        return state

    def _standardised(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.first.weight / self.first.weight.norm(dim=1, keepdim=True)
        return self.second(functional.relu(functional.linear(x, weight)))


FORMS = [
    "in_place",
    "residual_in_place",
    "tied",
    "chunks",
    "gated",
    "beside_a_pair",
    "dropped",
    "number",
    "loop",
    "standardised",
]


@pytest.mark.parametrize("form", FORMS)
def test_an_odd_model_is_followed(form: str) -> None:
    torch.manual_seed(0)
    model = Odd(form).eval()
    forwards = Forwards(discover(model, batch_of(_numbers(3, 4, 6))))
    for seed in range(5):
        _expect_as_tapped(forwards, model, batch_of(_numbers(3, 4, 6, seed=seed)))
    assert forwards.scripts == 1


class Beside(nn.Module):
    """Does something beside, of which `form` says what."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.mean = torch.zeros(6)
        self.calls = 0
        self.cache: list[torch.Tensor] = []
        self.turns = itertools.count()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        if self.form == "draws":
            y = y + 0 * torch.rand(6)
        elif self.form == "writes to a tensor of its own":
            self.mean += y.mean(0)
        elif self.form == "writes to its input":
            x.add_(1)
        elif self.form == "chooses rows":
            y = y[torch.argsort(y[:, 0])]
        elif self.form == "counts":
            self.calls += 1
        elif self.form == "keeps":
            self.cache = [y]
        elif self.form == "takes turns":
            y = y * 2 if next(self.turns) % 5 == 4 else y
        elif self.form == "draws by NumPy":
            y = y * torch.tensor(np.random.random(), dtype=torch.float32)
        return self.second(y)


def _beside(form: str) -> Forwards:
    """Forwards of which the first layer's z was what it should be."""
    torch.manual_seed(0)
    model = Beside(form).eval()
    forwards = Forwards(discover(model, batch_of(_numbers(5, 6)), include=["first"]))
    for seed in range(4):
        seen, _ = _shown(lambda observe, seed=seed: forwards.run(model, batch_of(_numbers(5, 6, seed=seed)), observe))
        assert [one.site.name for one in seen] == ["first"]
        torch.testing.assert_close(seen[0].z_LSU[:, 0], model.first(_numbers(5, 6, seed=seed)).detach())
    return forwards


@pytest.mark.parametrize("form", ["draws", "writes to a tensor of its own", "writes to its input", "chooses rows"])
def test_what_a_script_cannot_follow_has_none(form: str) -> None:
    forwards = _beside(form)
    assert forwards.scripts == 0
    assert not forwards.may_script


@pytest.mark.parametrize("form", ["counts", "keeps", "takes turns", "draws by NumPy"])
def test_what_a_model_does_without_tensors_is_none_of_a_scripts_business(form: str) -> None:
    assert _beside(form).scripts == 1


class Hidden(nn.Module):
    """Goes ways that a function alone knows: whether through the second layer, and times what."""

    def __init__(self, way: Callable[[], tuple[bool, float]]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.first(x))
        through, times = self.way()
        return self.third(functional.relu(self.second(y)) * times if through else y)


def test_a_model_is_run_once_on_each_batch() -> None:
    """One that counts elsewhere than on itself would go another way in a second forward of the same batch."""
    torch.manual_seed(0)
    calls = [0]

    def way() -> tuple[bool, float]:
        calls[0] += 1
        return calls[0] < 8, 3.0 if calls[0] % 5 == 4 else 1.0

    model, batch = Hidden(way).eval(), batch_of(_numbers(4, 6))
    forwards = Forwards(discover(model, batch))
    calls[0] = 0
    for number in range(1, 12):
        seen, out = _shown(lambda observe: forwards.run(model, batch, observe))
        assert calls[0] == number
        y = functional.relu(model.first(batch.inputs[0]))
        expected = functional.relu(model.second(y)) * (3.0 if number == 4 else 1.0) if number < 8 else y
        assert [one.site.name for one in seen] == ["first", *["second"] * (number < 8), "third"]
        torch.testing.assert_close(seen[-1].patches(0, 4).reshape(4, 6), expected)
        torch.testing.assert_close(out, model.third(expected))
    assert forwards.scripts == 1


class Branching(nn.Module):
    """Goes another way where its input says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.first(x))
        if bool(y.sum() > x.sum() + 1e6):
            return self.second(functional.gelu(y))
        return self.second(functional.relu(self.third(y)))


def test_a_forward_that_goes_another_way_is_presented_once_by_the_tap() -> None:
    torch.manual_seed(0)
    model = Branching().eval()
    usual, unusual = batch_of(_numbers(4, 6)), batch_of(torch.full((4, 6), -1e9))
    forwards = Forwards(discover(model, usual))
    for batch in [usual, usual, usual, unusual, usual, usual, unusual, usual, unusual, *[usual] * (3 * DEPARTURES)]:
        _expect_as_tapped(forwards, model, batch)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["first", "second", "norm", "wide"])
def test_a_tap_takes_over_behind_any_layer(form: str, place: str) -> None:
    """Whatever awaits its gate, its pair or the end of a loop there, and whatever was overwritten before."""
    torch.manual_seed(0)
    model, departs, calls = Odd(form).eval(), [False], [0]

    def read(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        if departs[0]:
            out.sum()

    model.get_submodule(place).register_forward_hook(read)
    model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    forwards = Forwards(discover(model, batch_of(_numbers(3, 4, 6))))
    for seed in range(6):
        departs[0] = seed in (3, 4)
        calls[0] = 0
        _expect_as_tapped(forwards, model, batch_of(_numbers(3, 4, 6, seed=seed)))
        assert calls[0] == 2


def test_a_model_that_goes_other_ways_is_left_to_the_tap_at_last() -> None:
    torch.manual_seed(0)
    model = Branching().eval()
    usual, unusual = batch_of(_numbers(4, 6)), batch_of(torch.full((4, 6), -1e9))
    forwards = Forwards(discover(model, usual))
    for _ in range(DEPARTURES):
        for batch in [usual, usual, usual, unusual]:
            _expect_as_tapped(forwards, model, batch)
    assert not forwards.may_script


def test_another_number_among_the_arguments_is_another_way() -> None:
    """Of a convolution whose output has the same shape the patches are others."""
    dilation = [2]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(functional.conv1d(x, self.layer.weight, padding=dilation[0], dilation=dilation[0]))

    torch.manual_seed(0)
    model = Free(forward, layer=nn.Conv1d(3, 4, 3, bias=False)).eval()
    forwards = Forwards(discover(model, batch_of(_numbers(4, 3, 9))))
    for seed, dilation[0] in enumerate([2, 2, 2, 3, 2, 3, 3, 2]):
        _expect_as_tapped(forwards, model, batch_of(_numbers(4, 3, 9, seed=seed)))


def test_a_forward_that_ends_early_is_missed() -> None:
    """Where a site still waits for its gate then, the tap says so; and so it does where a script was followed."""
    ends = [False]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        z = self.first(x)
        return z if ends[0] else self.second(torch.relu(z))

    model, batch = Free(forward, first=nn.Linear(6, 6), second=nn.Linear(6, 6)).eval(), batch_of(_numbers(4, 6))
    forwards = Forwards(discover(model, batch))
    for _ in range(3):
        forwards.run(model, batch, lambda _: None)
    assert forwards.scripts == 1
    ends[0] = True
    with pytest.raises(ModelError, match="site first: its output did not reach relu"):
        forwards.run(model, batch, lambda _: None)


class Choosing(nn.Module):
    """Does the same operations whatever its input says, on one tensor or another of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = self.first(x).relu(), self.second(x).relu()
        return self.third(one if bool(x.sum() < 100) else other)


def test_the_same_operation_on_another_tensor_is_another_way() -> None:
    torch.manual_seed(0)
    model = Choosing().eval()
    usual, unusual = batch_of(_numbers(4, 6)), batch_of(_numbers(4, 6) + 50)
    forwards = Forwards(discover(model, usual))
    for batch in [usual, usual, usual, unusual, usual]:
        _expect_as_tapped(forwards, model, batch)
    x, scripted = _numbers(4, 6) + 50, Forwards(discover(model, usual))
    for batch in [usual, usual, usual, unusual]:
        seen, _ = _shown(lambda observe, batch=batch: scripted.run(model, batch, observe))
    expected = model.second(x).relu().detach()
    torch.testing.assert_close(seen[-1].patches(0, 4).reshape(4, 6), expected)


def test_another_parameter_is_seen() -> None:
    torch.manual_seed(0)
    model = Odd("dropped").eval()
    batch = batch_of(_numbers(3, 6))
    forwards = Forwards(discover(model, batch))
    for _ in range(3):
        _expect_as_tapped(forwards, model, batch)
    model.first.weight = nn.Parameter(model.first.weight.detach() * 2)
    for _ in range(4):
        _expect_as_tapped(forwards, model, batch)


def test_errors_are_those_of_the_tap() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    batch = batch_of(_numbers(3, 6))
    forwards = Forwards(discover(model, batch))
    for _ in range(3):
        forwards.run(model, batch, lambda _: None)

    def refuse(presentations: Presentations) -> None:
        raise KeyError(presentations.site.name)

    with pytest.raises(KeyError, match="0"):
        forwards.run(model, batch, refuse)
    assert forwards.scripts == 1
    model[2].weight = nn.Parameter(torch.zeros(3, 5))
    with pytest.raises(ModelError, match=r"site 2: linear of shapes \(3, 6\), \(3, 5\)"):
        forwards.run(model, batch, lambda _: None)


@pytest.mark.parametrize("form", ["in_place", "chunks", "gated", "dropped"])
def test_nothing_is_kept_of_a_batch(form: str) -> None:
    """As many tensors after a forward as before, and inside it at no site more than the tap keeps."""
    torch.manual_seed(0)
    model, batches = Odd(form).eval(), [batch_of(_numbers(3, 6, seed=seed)) for seed in range(8)]
    found = discover(model, batches[0])
    forwards = Forwards(found)
    by_tap, by_script = list[int](), list[int]()
    gc.collect()
    gc.disable()
    try:
        start = _tensors()
        tapped_forward(model, found, batches[0], lambda _: by_tap.append(_tensors() - start))
        for batch in batches[1:]:
            by_script.clear()
            before = _tensors()
            forwards.run(model, batch, lambda _, before=before: by_script.append(_tensors() - before))
            assert _tensors() == before
    finally:
        gc.enable()
    assert forwards.scripts == 1
    assert all(one <= other for one, other in zip(by_script, by_tap, strict=True))


def _tensors() -> int:
    return sum(type(one) is torch.Tensor for one in gc.get_objects())


def test_what_a_norm_gives_without_its_gain_is_summed_but_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards, model = _encoder()
    found = forwards.discovery
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)

    def sums(run: Callable[..., Any], seed: int) -> list[torch.Tensor]:
        made = list[torch.Tensor]()

        def observe(shown: Presentations) -> None:
            of_x = shown.input_sums()
            made.extend((of_x.sum_LSG.clone(), of_x.square_LSG.clone(), of_x.centred_LSG.clone()))

        with choose.in_force(choose.NATIVE):
            run(observe=observe, model=model, batch=batch_of(FAMILIES["transformer"][2](3, seed)))
        return made

    tapped = partial(tapped_forward, discovery=found)
    with monkeypatch.context() as patch:
        patch.setattr(native_sums, "of_norm", lambda *_: None)
        wanted = [sums(tapped, seed) for seed in range(4)]
    monkeypatch.setattr(lazy, "before_gain", lambda call: pytest.fail("a norm was made again"))
    for seed, expected in enumerate(wanted):
        for run in (tapped, forwards.run):
            for one, other in zip(sums(run, seed), expected, strict=True):
                assert torch.equal(one, other)
    assert forwards.scripts == 1


def test_labels_and_masks_of_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 1)).eval()
    x, classes, mask_NS = _numbers(5, 3, 7), torch.randint(3, (5, 7)), torch.rand(5, 7) < 0.5
    batch = batch_of(x, label_NS=classes, mask_NS=mask_NS, label_N=torch.arange(5))
    assert expect_the_same_by_script(model, discover(model, batch), batch).scripts == 1


def test_whether_there_is_a_mask_is_part_of_the_signature() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 1)).eval()
    x, mask_NS = _numbers(5, 3, 7), torch.rand(5, 7) < 0.5
    batches = [batch_of(x), batch_of(x, mask_NS=mask_NS)]
    forwards = Forwards(discover(model, batches[1]))
    for batch in batches * 4:
        _expect_as_tapped(forwards, model, batch)
    assert forwards.scripts == 2


def test_a_way_of_calling_is_part_of_the_signature() -> None:
    torch.manual_seed(0)
    model = Odd("in_place").eval()
    x = _numbers(3, 6)

    def twice(model: nn.Module, batch: Batch) -> Any:
        return model(2 * batch.inputs[0])

    batches = [batch_of(x), batch_of(x, call=twice)]
    forwards = Forwards(discover(model, batches[0]))
    for batch in batches * 4:
        _expect_as_tapped(forwards, model, batch)
    assert forwards.scripts == 2
