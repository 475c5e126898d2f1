"""Forwards that are not those of their script: from there on a tap presents what it would have presented."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.errors import ModelError
from pipeline.flow.discover import discover
from pipeline.flow.forwards import DEPARTURES, Forwards
from pipeline.sites import Presentations
from tests.flow.models import Free
from tests.flow.odd import FORMS, Odd, numbers
from tests.flow.shown import batch_of, expect_as_tapped, shown_by


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

    model, batch = Hidden(way).eval(), batch_of(numbers(4, 6))
    forwards = Forwards(discover(model, batch))
    calls[0] = 0
    for number in range(1, 12):
        seen, out = shown_by(lambda observe: forwards.run(model, batch, observe))
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
    usual, unusual = batch_of(numbers(4, 6)), batch_of(torch.full((4, 6), -1e9))
    forwards = Forwards(discover(model, usual))
    for batch in [usual, usual, usual, unusual, usual, usual, unusual, usual, unusual, *[usual] * (3 * DEPARTURES)]:
        expect_as_tapped(forwards, model, batch)


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
    forwards = Forwards(discover(model, batch_of(numbers(3, 4, 6))))
    for seed in range(6):
        departs[0] = seed in (3, 4)
        calls[0] = 0
        expect_as_tapped(forwards, model, batch_of(numbers(3, 4, 6, seed=seed)))
        assert calls[0] == 2


def test_a_model_that_goes_other_ways_is_left_to_the_tap_at_last() -> None:
    torch.manual_seed(0)
    model = Branching().eval()
    usual, unusual = batch_of(numbers(4, 6)), batch_of(torch.full((4, 6), -1e9))
    forwards = Forwards(discover(model, usual))
    for _ in range(DEPARTURES):
        for batch in [usual, usual, usual, unusual]:
            expect_as_tapped(forwards, model, batch)
    assert not forwards.may_script


def test_another_number_among_the_arguments_is_another_way() -> None:
    """Of a convolution whose output has the same shape the patches are others."""
    dilation = [2]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(functional.conv1d(x, self.layer.weight, padding=dilation[0], dilation=dilation[0]))

    torch.manual_seed(0)
    model = Free(forward, layer=nn.Conv1d(3, 4, 3, bias=False)).eval()
    forwards = Forwards(discover(model, batch_of(numbers(4, 3, 9))))
    for seed, dilation[0] in enumerate([2, 2, 2, 3, 2, 3, 3, 2]):
        expect_as_tapped(forwards, model, batch_of(numbers(4, 3, 9, seed=seed)))


def test_a_forward_that_ends_early_is_missed() -> None:
    """Where a site still waits for its gate then, the tap says so; and so it does where a script was followed."""
    ends = [False]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        z = self.first(x)
        return z if ends[0] else self.second(torch.relu(z))

    model, batch = Free(forward, first=nn.Linear(6, 6), second=nn.Linear(6, 6)).eval(), batch_of(numbers(4, 6))
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
    usual, unusual = batch_of(numbers(4, 6)), batch_of(numbers(4, 6) + 50)
    forwards = Forwards(discover(model, usual))
    for batch in [usual, usual, usual, unusual, usual]:
        expect_as_tapped(forwards, model, batch)
    x, scripted = numbers(4, 6) + 50, Forwards(discover(model, usual))
    for batch in [usual, usual, usual, unusual]:
        seen, _ = shown_by(lambda observe, batch=batch: scripted.run(model, batch, observe))
    expected = model.second(x).relu().detach()
    torch.testing.assert_close(seen[-1].patches(0, 4).reshape(4, 6), expected)


def test_another_parameter_is_seen() -> None:
    torch.manual_seed(0)
    model = Odd("dropped").eval()
    batch = batch_of(numbers(3, 6))
    forwards = Forwards(discover(model, batch))
    for _ in range(3):
        expect_as_tapped(forwards, model, batch)
    model.first.weight = nn.Parameter(model.first.weight.detach() * 2)
    for _ in range(4):
        expect_as_tapped(forwards, model, batch)


def test_errors_are_those_of_the_tap() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    batch = batch_of(numbers(3, 6))
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
