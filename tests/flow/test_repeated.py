"""A model must make the same of a batch whenever it is shown it; what it draws at random it may draw again."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.errors import ModelError
from pipeline.flow.discover import discover
from pipeline.flow.state import Versions
from pipeline.job_sections import SiteSelection
from pipeline.loading import find_sites
from pipeline.measure import measure
from pipeline.registry import statistics
from tests.flow.models import Free
from tests.flow.shown import batch_of

RESPONSE = [statistics()["response"]]


def _model(forward: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    return Free(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 3)).eval()


def _batches() -> list[torch.Tensor]:
    return [torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


def test_one_that_counts_elsewhere_is_refused() -> None:
    calls = [0]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return self.second(torch.relu(self.first(x)) + torch.tensor(float(calls[0])))

    with pytest.raises(ModelError, match="the same batch gives other numbers in a second forward"):
        measure(_model(forward), _batches())


def attended(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    return functional.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=p * training)[0]


def leaky(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    return functional.rrelu(x, training=training and p > 0)


@pytest.mark.parametrize(
    "drop", [functional.dropout, functional.alpha_dropout, functional.feature_alpha_dropout, attended, leaky]
)
def test_one_that_drops_in_eval_mode_is_refused(drop: Callable[..., torch.Tensor]) -> None:
    def before(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(drop(x, 0.5, training=True))))

    def between(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.second(drop(torch.relu(self.first(x)), 0.5, training=True))

    def nothing(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.second(drop(torch.relu(self.first(drop(x, 0.0, training=True))), 0.5, training=False))

    for forward in (before, between):
        with pytest.raises(
            ModelError, match=r"the model has dropout left on .*: in eval mode it must drop nothing and draw"
        ):
            measure(_model(forward), _batches())
    assert measure(_model(nothing), _batches())["neurons"].num_rows == 7


def test_what_one_draws_is_what_it_would_have_drawn_by_itself() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(4) + random.random() + np.random.random()
        return self.second(torch.relu(self.first(x)) + noise)

    def seed() -> None:
        torch.manual_seed(1)
        random.seed(2)
        np.random.seed(3)

    model, seen = _model(forward), list[torch.Tensor]()
    seed()
    tables = measure(model, _batches(), statistics=RESPONSE)
    model.second.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    seed()
    for x in _batches():
        model(x)
    found = tables["neurons"].to_pandas().query("site == 'second'")["z_mean"].to_numpy()
    np.testing.assert_allclose(found, torch.cat(seen).double().mean(0), rtol=1e-6)


@pytest.mark.parametrize(
    "drawn", [lambda: torch.rand(()), random.random, np.random.random], ids=["torch", "random", "numpy"]
)
def test_in_a_job_what_one_draws_may_change_nothing(drawn: Callable[[], Any]) -> None:
    def noisy(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x * (1 + float(drawn())))))

    def calm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x * (1 + 0 * float(drawn())))))

    first = lambda rows: batch_of(_batches()[0])  # noqa: E731
    with pytest.raises(ModelError, match="gives other numbers in a second forward"):
        find_sites(_model(noisy), first, SiteSelection())
    assert len(find_sites(_model(calm), first, SiteSelection()).sites) == 2


def test_weights_may_not_change_between_batches() -> None:
    model = _model(lambda self, x: self.second(torch.relu(self.first(x))))

    def trained() -> Any:
        for x in _batches():
            yield x
            with torch.no_grad():
                model.second.weight.mul_(0.9)

    with pytest.raises(ModelError, match=r"parameter second.weight was changed while the model was measured"):
        measure(model, trained())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: model[0].weight.data.mul_(2), "parameter 0.weight"),
        (lambda model: model[0].weight.data.neg_(), "parameter 0.weight"),
        (lambda model: model[1].running_mean.add_(5), "buffer 1.running_mean"),
        (lambda model: setattr(model[1], "running_var", 2 * model[1].running_var), "buffer 1.running_var"),
    ],
)
def test_nor_may_what_torch_does_not_count(dtype: torch.dtype, change: Callable[[nn.Module], Any], said: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).to(dtype)
    with torch.no_grad():
        # as many of either sign, and of the same size
        model[0].weight.copy_(torch.ones(6, 4) * torch.tensor([1, -1, 1, -1]))

    def changed() -> Any:
        for number in range(6):
            if number == 4:
                change(model)
            yield torch.randn(5, 4, dtype=dtype)

    with pytest.raises(ModelError, match=rf"{said} was changed while the model was measured"):
        measure(model, changed(), statistics=RESPONSE)


def test_a_table_that_grows_with_the_rows_is_no_change() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("table", torch.arange(4.0))

        def forward(self, x_NTD: torch.Tensor) -> torch.Tensor:
            if x_NTD.shape[1] > len(self.table):
                self.table = torch.arange(float(x_NTD.shape[1]))
            return self.layer(x_NTD + self.table[: x_NTD.shape[1], None])

    tables = measure(Positions(), [torch.randn(3, length, 3) for length in (4, 4, 7, 9)], statistics=RESPONSE)
    assert tables["neurons"]["n"].to_pylist() == [3 * 24] * 2


def test_weights_may_not_change_within_a_forward() -> None:
    calls = [0]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] > 6:
            self.second.weight.data.mul_(2)
        return self.second(torch.relu(self.first(x)))

    with pytest.raises(ModelError, match=r"weight second.weight: acts through linear in a form"):
        measure(_model(forward), _batches())


def test_finding_sites_draws_nothing() -> None:
    model = _model(lambda self, x: self.second(torch.relu(self.first(x)) + torch.rand(4)))
    before = torch.get_rng_state()
    assert len(discover(model, batch_of(_batches()[0])).sites) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_buffers_of_every_kind_and_layout_are_looked_at() -> None:
    model = nn.Linear(3, 2)
    numbers = torch.arange(20.0)
    held = {
        "truths": torch.tensor([True, False, True]),
        "complex": torch.complex(numbers, numbers),
        "turned": numbers.view(4, 5).clone().t(),
        "a_part": numbers.clone()[1:],
        "every_third": numbers.clone()[::3],
        "expanded": numbers[:1].clone().expand(7),
        "sparse": torch.eye(3).to_sparse(),
        "conjugated": torch.complex(numbers, numbers).conj(),
        "nothing": torch.zeros(0),
        "one": torch.tensor(3),
    }
    for name, tensor in held.items():
        model.register_buffer(name, tensor)
    before = Versions(model)
    assert Versions(model).changed(before) is None
    for name, at in {"truths": 0, "complex": 3, "turned": (1, 1), "a_part": 2, "every_third": 1, "one": ()}.items():
        was = held[name][at].clone()
        held[name][at] = was == 0
        assert Versions(model).changed(before) == f"buffer {name}"
        held[name][at] = was


class Leaving(nn.Module):
    """Leaves something on itself, of which `form` says what."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.layer = form, nn.Linear(4, 4)
        self.carry = nn.Linear(4, 4)
        self.calls, self.seen, self.total = 0, [], torch.zeros(())
        self.hidden = torch.zeros(6, 4)
        self.later: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == "calls":
            self.calls += 1
            return torch.relu(self.layer(x) * (1 + self.calls))
        if self.form == "seen":
            self.seen.append(len(x))
            return torch.relu(self.layer(x) * len(self.seen))
        if self.form == "total":
            self.total += 1
            return torch.relu(self.layer(x) * (1 + self.total))
        if self.form == "later":
            out = torch.relu(self.layer(x if self.later is None else x + self.later))
            self.later = out
            return out
        self.hidden = torch.tanh(self.layer(x) + self.carry(self.hidden))
        return self.hidden


@pytest.mark.parametrize("form", ["calls", "seen", "total"])
def test_one_that_counts_on_itself_is_refused_and_comes_back_as_it_was(form: str) -> None:
    model = Leaving(form)
    with pytest.raises(ModelError, match=rf"other numbers in a second forward: the first one changes {form} on"):
        measure(model, _batches(), statistics=RESPONSE)
    assert (model.calls, model.seen, float(model.total), model.training) == (0, [], 0.0, True)


@pytest.mark.parametrize("form", ["hidden", "later"])
def test_a_state_is_put_back_when_all_is_measured(form: str) -> None:
    torch.manual_seed(0)
    model = Leaving(form)
    before = model.hidden
    first = measure(model, _batches(), statistics=RESPONSE)["neurons"]
    assert (model.hidden is before, bool(before.any()), model.later) == (True, False, None)
    assert measure(model, _batches(), statistics=RESPONSE)["neurons"].equals(first)
    model(_batches()[0]).sum().backward()


def test_what_is_left_but_changes_nothing_is_put_back_too() -> None:
    class Looking(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = [*getattr(self, "seen", []), x.mean()]
            return super().forward(x)

    model = Looking(4, 3)
    found = measure(model, _batches(), statistics=RESPONSE)["neurons"]
    assert found.equals(measure(nn.Sequential(model)[0], _batches(), statistics=RESPONSE)["neurons"])
    assert "seen" not in vars(model)


def test_a_tensor_that_a_pattern_is_made_of_may_not_change_between_batches() -> None:
    model = _model(lambda self, x: self.second(torch.relu(self.first(x) * self.factor)))
    model.factor = torch.ones(())

    def others() -> Any:
        for x in _batches():
            yield x
            model.factor = model.factor + 1

    with pytest.raises(ModelError, match=r"tensor factor was changed while the model was measured"):
        measure(model, others(), statistics=RESPONSE)


def test_a_tensor_that_is_written_to_holds_what_it_held() -> None:
    class Averaging(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mean.add_(x.mean())
            return super().forward(x)

    model = Averaging(4, 3)
    model.mean = torch.zeros(())
    assert len(discover(model, batch_of(_batches()[0])).sites) == 1
    assert float(model.mean) == 0
    measure(model, _batches(), statistics=RESPONSE)
    assert float(model.mean) == 0
