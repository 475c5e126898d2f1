"""What is done at once on a GPU: the same numbers as in a CPU's small slices, in a few launches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.launches import Launches, as_on_a_gpu
from pipeline.kernels import bulk
from pipeline.kernels.comoment import CoMoment
from pipeline.kernels.pooled import Pooled
from pipeline.registry import statistics
from pipeline.sites import Presentations
from tests.kernels.test_pooled import shown_by
from tests.laws.drawn import Recipe, draw
from tests.laws.laws import LAWS
from tests.laws.test_laws import recipes


@contextmanager
def in_bulk(**sizes: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, as_on_a_gpu():
        for name, size in sizes.items():
            patch.setattr(bulk, name, size)
        yield


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 3, st.integers(1, 70)),
    order=st.sampled_from([(0, 1, 2), (0, 2, 1), (2, 1, 0)]),
    numbers=st.sampled_from([1, 40, 400]),
)
def test_products_of_any_strides_are_those_of_float64(
    sizes: tuple[int, ...], order: tuple[int, ...], numbers: int
) -> None:
    groups, rows, inputs, presentations = sizes
    generator = torch.Generator().manual_seed(0)
    inverse = np.argsort(order).tolist()
    made = (torch.randn(groups, n, presentations, generator=generator) for n in (rows, inputs))
    left_GMP, right_GDP = (one.permute(order).contiguous().permute(inverse) for one in made)
    with in_bulk(LONGEST=8, NUMBERS=numbers):
        found = bulk.multiply(left_GMP, right_GDP.mT)
    wanted = left_GMP.double() @ right_GDP.mT.double()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_equal_terms_by_the_million_lose_no_more_than_those_of_one_product() -> None:
    left, right = torch.full((1, 1, 1 << 20), 1 / 3), torch.full((1, 1 << 20, 1), 0.1)
    wanted = (1 << 20) * float(left[0, 0, 0]) * float(right[0, 0, 0])
    assert float(bulk.multiply(left, right)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["template", "redundancy", "composition", "importance"])
@pytest.mark.parametrize("law", ["oracle", "oracle_of_parts", "partition", "row_order"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(recipe=recipes)
def test_the_laws_hold_in_bulk(law: str, name: str, recipe: Recipe) -> None:
    with in_bulk(LONGEST=8, NUMBERS=500):
        LAWS[law](statistics()[name], draw(recipe), np.random.default_rng(recipe.seed))


def launches(shown: Presentations) -> Launches:
    kernel, seen = Pooled(shown.site, CoMoment()), Launches()
    with in_bulk(), torch.no_grad(), seen:
        kernel.add(shown)
    assert kernel.pooled == shown.entries * shown.positions
    return seen


def test_a_batch_is_few_launches_however_many_rows_it_has() -> None:
    layer = nn.Conv2d(16, 16, 3, padding=1)
    shown = [shown_by(layer, (16, 16, 16), rows=(1, rows))[1] for rows in (8, 96)]
    # what is remembered of a shape of windows is made
    launches(shown[0])
    few, many = (launches(one) for one in shown)
    assert few.count == many.count
    assert few.count.total() <= 80
    assert few.waits == 1
