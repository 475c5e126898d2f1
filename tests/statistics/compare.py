"""How a statistic's rows are compared with what they should be, and states observed part by part."""

from __future__ import annotations

import torch

from pipeline.kernels.base import State
from pipeline.sites import Presentations
from pipeline.statistics.base import Controls, Nullable, Statistic, Values
from tests.laws.drawn import split


def parts(whole: Presentations, sizes: list[int]) -> list[Presentations]:
    """The whole, cut into consecutive runs of rows of these sizes."""
    pieces = split(whole, torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)))
    nothing = whole.select_rows(torch.zeros(whole.rows, dtype=torch.bool))
    return pieces + [nothing] * (len(sizes) - len(pieces))


def state_of(statistic: Statistic, whole: Presentations, sizes: list[int]) -> State:
    """The state after observing the parts one by one and merging in order."""
    state = statistic.empty(whole.site)
    for part in parts(whole, sizes):
        state = statistic.merge(whole.site, state, statistic.observe(part))
    return state


def same(got: Values, wanted: Values, *, atol: float) -> None:
    """Assert equal values: nulls and NaNs where wanted, integers exactly, the rest within atol · (1 + |wanted|)."""
    if isinstance(wanted, Nullable):
        assert isinstance(got, Nullable)
        assert torch.equal(got.valid, wanted.valid)
        same(got.values[got.valid], wanted.values[wanted.valid], atol=atol)
    elif isinstance(wanted, torch.Tensor):
        assert isinstance(got, torch.Tensor)
        assert got.dtype == wanted.dtype
        if wanted.is_floating_point():
            torch.testing.assert_close(got, wanted, atol=atol, rtol=atol, equal_nan=True)
        else:
            assert torch.equal(got, wanted)
    else:
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            if isinstance(other, torch.Tensor):
                assert isinstance(one, torch.Tensor)
                same(one, other, atol=atol)
            else:
                assert one == other


def same_rows(statistic: Statistic, state: State, whole: Presentations, *, atol: float) -> None:
    """Assert that a state's columns are those that the definition gives, and documented ones."""
    got = statistic.columns(whole.site, state, Controls())
    wanted = statistic.define(whole.site, whole, Controls())
    documented = {(column.table, column.name) for column in statistic.COLUMNS}
    assert got.keys() == wanted.keys()
    for table in wanted:
        assert got[table].keys() == wanted[table].keys()
        for name, values in wanted[table].items():
            assert name == "unit" or (table, name) in documented
            same(got[table][name], values, atol=atol)
