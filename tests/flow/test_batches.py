"""What was read off the probe holds of every batch, or the batch is refused: by a tap, and along a script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.errors import ModelError
from pipeline.flow.discover import discover
from pipeline.flow.forwards import Forwards
from pipeline.flow.tap import tapped_forward
from tests.flow.models import Free
from tests.flow.shown import batch_of, expect_as_tapped

Forward = Callable[[Any, torch.Tensor], torch.Tensor]


def _model(forward: Forward) -> nn.Module:
    parts = {name: nn.Linear(6, 6) for name in ("a", "up", "out")}
    tensors = {name: nn.Parameter(torch.rand(2, 6) + 0.5) for name in ("scales", "shifts")}
    norms = {f"norm{number}": nn.LayerNorm(6) for number in range(2)}
    batch_norms = {f"batch_norm{number}": nn.BatchNorm1d(6) for number in range(2)}
    model = Free(forward, **parts, **tensors, **norms, **batch_norms).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm1d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def _number(x: torch.Tensor) -> float:
    """One that follows from the batch and is known to Python alone."""
    return float(x[0, 0] > 0) + 1.0


def _which(x: torch.Tensor) -> int:
    return int(x[0, 0] > 0)


def _chosen(self: Any, name: str, x: torch.Tensor) -> nn.Module:
    return getattr(self, f"{name}{_which(x)}")


FOLDED: dict[str, Forward] = {
    "factor": lambda self, x: torch.relu(self.a(x) * _number(x)),
    "divisor": lambda self, x: torch.relu(self.a(x) / _number(x)),
    "summand": lambda self, x: torch.relu(self.a(x) - _number(x)),
    "tensor": lambda self, x: torch.relu(self.a(x) * torch.tensor(_number(x))),
    "tensor of a tensor": lambda self, x: torch.relu(self.a(x) * (1 + torch.tensor(_number(x)))),
    "scale": lambda self, x: torch.relu(self.a(x) * self.scales[_which(x)]),
    "scaled parameter": lambda self, x: torch.relu(self.a(x) * (self.scales[0] * torch.tensor(_number(x)))),
    "bias": lambda self, x: torch.relu(functional.linear(x, self.a.weight, self.shifts[_which(x)])),
    "bias or none": lambda self, x: torch.relu(
        functional.linear(x, self.a.weight, self.a.bias if _which(x) else None)
    ),
    "batch norm": lambda self, x: torch.relu(_chosen(self, "batch_norm", x)(self.a(x))),
    "norm behind": lambda self, x: torch.relu(_chosen(self, "norm", x)(self.a(x))),
    "gain before": lambda self, x: torch.relu(self.a(_chosen(self, "norm", x)(x)))
    + torch.relu(self.up(self.norm1(x)) * self.out(self.norm0(x))),
    "bias of a norm before": lambda self, x: torch.relu(
        self.a(functional.layer_norm(x, (6,), self.norm0.weight, self.shifts[_which(x)]))
    ),
    "slope": lambda self, x: functional.leaky_relu(self.a(x), 0.1 * _number(x)),
    "slope of a gate of several operations": lambda self, x: (z := self.a(x)) * torch.sigmoid(0.9 * _number(x) * z),
    "before a pool": lambda self, x: torch.relu((self.a(x) * _number(x))[..., None].expand(5, 6, 2).amax(-1)),
    "of one part": lambda self, x: (
        torch.relu(self.a(x)[:, :3] * _number(x)) + torch.tanh(self.a(x)[:, 3:] * 0.5)
    ),
    "of a pair's gate": lambda self, x: functional.silu(_chosen(self, "batch_norm", x)(self.a(x))) * self.up(x),
    "of a pair's other half": lambda self, x: functional.silu(self.a(x)) * _chosen(self, "batch_norm", x)(self.up(x)),
    "bias of a pair's other half": lambda self, x: (
        functional.silu(self.a(x)) * functional.linear(x, self.up.weight, self.shifts[_which(x)])
    ),
}  # fmt: skip


def _inputs(*, above: bool, seed: int = 0) -> torch.Tensor:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    x[0, 0] = 1.0 if above else -1.0
    return x


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("form", FOLDED)
def test_what_is_folded_is_the_same_in_every_batch_or_refused(form: str, first: bool) -> None:
    model = _model(FOLDED[form])
    found = discover(model, batch_of(_inputs(above=first)))
    assert any(site.name.startswith("a") for site in found.sites)
    tapped_forward(model, found, batch_of(_inputs(above=first)), lambda _: None)
    with pytest.raises(ModelError, match=r"site a[\w.]*: .* in this batch.* the probe.*exclude the site"):
        tapped_forward(model, found, batch_of(_inputs(above=not first)), lambda _: None)


@pytest.mark.parametrize("form", FOLDED)
def test_nor_does_a_script_take_another_for_it(form: str) -> None:
    model = _model(FOLDED[form])
    forwards = Forwards(discover(model, batch_of(_inputs(above=False))))
    for seed in range(4):
        expect_as_tapped(forwards, model, batch_of(_inputs(above=False, seed=seed)))
    assert forwards.scripts == 1
    with pytest.raises(ModelError, match="the probe"):
        forwards.run(model, batch_of(_inputs(above=True)), lambda _: None)


def test_what_is_drawn_at_random_is_never_the_same() -> None:
    model = _model(lambda self, x: torch.relu(self.a(x) * (1 + torch.rand(()))))
    found = discover(model, batch_of(_inputs(above=False)))
    torch.rand(())
    with pytest.raises(ModelError, match="site a: its output met mul"):
        tapped_forward(model, found, batch_of(_inputs(above=False)), lambda _: None)


def test_numbers_that_nothing_is_made_of_may_differ_along_a_script() -> None:
    model = _model(lambda self, x: self.out(torch.relu(self.a(x)) * torch.tensor(_number(x))))
    forwards = Forwards(discover(model, batch_of(_inputs(above=False))))
    for seed in range(6):
        expect_as_tapped(forwards, model, batch_of(_inputs(above=seed % 2 == 0, seed=seed)))
    assert forwards.followed is not None


SAME: dict[str, Forward] = {
    "number": lambda self, x: torch.relu(self.a(x) * 0.5),
    "root of the width": lambda self, x: torch.relu(self.a(x) / x.shape[-1] ** 0.5),
    "repeated for each row": lambda self, x: torch.relu(self.a(x) + self.shifts[0].expand(len(x), 1, 6)),
    "as long as the row": lambda self, x: torch.relu(self.a(x) + torch.zeros(40, 6)[: x.shape[1]] + self.shifts[0]),
    "table of zeros": lambda self, x: torch.relu(self.a(x) + (0 * self.scales[:1].repeat(40, 1))[: x.shape[1]]),
    "pool": lambda self, x: torch.relu(functional.max_pool1d(self.a(x).mT * 2, x.shape[1])),
    "pair": lambda self, x: functional.silu(self.a(x) * 0.5) * (self.up(x) + self.shifts[0]),
    "joined": lambda self, x: torch.relu(torch.cat([self.a(x), self.up(x)], -1) * 0.5),
    "in place": lambda self, x: (z := self.a(x).mul_(0.5)).mul_(torch.sigmoid(1.702 * z)),
    "cast": lambda self, x: torch.relu((self.a(x) * self.scales[0].double().float()).double()).float(),
}


@pytest.mark.parametrize("form", SAME)
def test_batches_of_any_size_are_told_the_same(form: str) -> None:
    model = _model(SAME[form])
    forwards = Forwards(discover(model, batch_of(torch.randn(3, 4, 6))))
    assert "a" in [site.name for site in forwards.discovery.sites]
    for rows, positions in [(3, 4), (5, 4), (5, 4), (5, 4), (2, 9), (2, 9), (2, 9), (1, 1), (2, 9), (7, 40)]:
        expect_as_tapped(forwards, model, batch_of(torch.randn(rows, positions, 6)))
    assert forwards.scripts == 2


def test_under_autocast_too() -> None:
    def cast(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(*batch.inputs)

    model = _model(lambda self, x: self.out(torch.relu(self.batch_norm0(self.a(self.norm0(x))) * self.scales[0])))
    forwards = Forwards(discover(model, batch_of(torch.randn(3, 6), call=cast)))
    for rows in (3, 5, 5, 5, 2):
        expect_as_tapped(forwards, model, batch_of(torch.randn(rows, 6), call=cast))


def test_a_gate_where_the_probe_had_none_is_refused() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        z = self.a(x) * 0.5
        return self.out(torch.relu(z.view(-1, 6)) if _which(x) else z)

    model = _model(forward)
    found = discover(model, batch_of(_inputs(above=False)))
    assert [(site.name, site.gate) for site in found.sites] == [("a", "identity"), ("out", "identity")]
    with pytest.raises(ModelError, match="site a: its output meets relu in this batch, and met no such gate"):
        tapped_forward(model, found, batch_of(_inputs(above=True)), lambda _: None)


def test_what_the_probe_did_with_a_site_without_a_gate_may_be_done_again() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        z = self.a(x)
        return self.out(z / z.pow(2).mean(-1, keepdim=True).sqrt())

    model = _model(forward)
    found = discover(model, batch_of(_inputs(above=False)))
    tapped_forward(model, found, batch_of(_inputs(above=True)), lambda _: None)


@pytest.mark.parametrize(("probe", "other", "said"), [(3, 5, "more"), (2, 4, "more"), (5, 3, "fewer"), (3, 2, "fewer")])
def test_calls_that_are_unlike_are_as_many_in_every_batch_or_refused(probe: int, other: int, said: str) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(x.shape[1] - 1):
            x = torch.relu(self.a(x))
        return self.a(x)

    model = _model(forward)
    forwards = Forwards(discover(model, batch_of(torch.randn(4, probe, 6))))
    for _ in range(4):
        expect_as_tapped(forwards, model, batch_of(torch.randn(4, probe, 6)))
    with pytest.raises(ModelError, match=rf"site a: its weight is called {said} times in this batch than in the probe"):
        forwards.run(model, batch_of(torch.randn(4, other, 6)), lambda _: None)


def test_the_first_of_calls_may_be_another_than_all_behind_it() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(len(x), 6)
        for step in x.unbind(1):
            h = torch.tanh(self.a(step) + self.up(h))
        return self.out(h)

    model = _model(forward)
    forwards = Forwards(discover(model, batch_of(torch.randn(4, 5, 6))))
    for length in (5, 5, 5, 8, 3, 4):
        expect_as_tapped(forwards, model, batch_of(torch.randn(4, length, 6)))
        seen: list[int] = []
        forwards.run(
            model,
            batch_of(torch.randn(4, length, 6)),
            lambda shown, seen=seen: (
                seen.append(shown.z_LSU.shape[0] * shown.z_LSU.shape[1]) if shown.site.name.startswith("a") else None
            ),
        )
        assert sum(seen) == 4 * length


def test_a_weight_that_is_not_called_at_all_is_no_fewer_times() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(torch.relu(self.a(x))) if _which(x) else x)

    model = _model(forward)
    found = discover(model, batch_of(_inputs(above=True)))
    seen: list[str] = []
    tapped_forward(model, found, batch_of(_inputs(above=False)), lambda shown: seen.append(shown.site.name))
    assert seen == ["out"]
