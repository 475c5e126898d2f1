"""What a model writes to its input is seen by nobody else, and by no other forward of the same batch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.errors import ModelError
from pipeline.flow.discover import discover
from pipeline.flow.forwards import Forwards
from pipeline.measure import measure
from tests.flow.models import Free
from tests.flow.shown import batch_of


def _twice(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.second(torch.relu(self.first(x.mul_(2))))


def _through_a_view(self: Any, x: torch.Tensor) -> torch.Tensor:
    x.detach().view(-1).mul_(2)
    return self.second(torch.relu(self.first(x)))


def _residual(self: Any, x: torch.Tensor) -> torch.Tensor:
    x += torch.relu(self.first(x))
    return self.second(x)


def _model(forward: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    return Free(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 3))


@pytest.mark.parametrize("forward", [_twice, _through_a_view, _residual])
def test_every_forward_of_a_batch_is_given_what_is_in_it(forward: Callable[..., Any]) -> None:
    model, labels = _model(forward), torch.arange(6) % 3
    batches = [torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    before = [x.clone() for x in batches]
    tables = measure(model, [(x, labels) for x in batches], classes=3, twin=_model(forward))
    assert all(torch.equal(x, y) for x, y in zip(batches, before, strict=True))
    found = tables["neurons"].to_pandas().groupby("site")["z_mean"].apply(list)
    shown: dict[str, list[torch.Tensor]] = {"first": [], "second": []}
    for name, kept in shown.items():
        model.get_submodule(name).register_forward_hook(lambda module, args, out, kept=kept: kept.append(out.detach()))
    for x in before:
        model(x)
    for name, kept in shown.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.cat(kept).mean(0), check_dtype=False)


def test_one_that_writes_where_the_probe_did_not_show_it_is_refused() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.mul_(2) if float(x.sum()) > 9 else x))

    model, x = _model(forward), torch.full((3, 4), 5.0)
    forwards = Forwards(discover(model, batch_of(torch.zeros(3, 4))))
    for _ in range(3):
        forwards.run(model, batch_of(torch.zeros(3, 4)), lambda _: None)
    assert forwards.scripts == 1
    with pytest.raises(ModelError, match=r"writes to its input in place \(mul\), which it did not with the probe"):
        forwards.run(model, batch_of(x), lambda _: None)
    assert x.eq(5).all()


def test_what_cannot_be_copied_may_not_be_written_to() -> None:
    def forward(self: Any, given: Any) -> torch.Tensor:
        return self.second(self.first(given.x.mul_(2)))

    given = SimpleNamespace(x=torch.ones(3, 4))
    with pytest.raises(ModelError, match=r"writes to its input in place \(mul\), in an object that cannot be copied"):
        discover(_model(forward), Batch((given,), torch.arange(3)))
    assert given.x.eq(1).all()
