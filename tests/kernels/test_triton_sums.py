"""The sums over inputs on a GPU against those in plain torch; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.devices import GPU
from pipeline.flow.patches import Convolution, sums_of
from pipeline.input_forms import InputSums
from pipeline.kernels.match import lengths_of
from tests.laws.drawn import Recipe, draw

triton = pytest.importorskip("triton", reason="Triton is not installed")
if not triton.knobs.runtime.interpret and not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

from pipeline.kernels import triton_sums  # noqa: E402

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else GPU)
pytestmark = [pytest.mark.gpu] if DEVICE.type == GPU else []
WINDOWS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "groups": ((2, 6, 9, 7), {"kernel": (3, 2), "stride": (2, 1), "dilation": (1, 2), "padding": ((1, 1), (0, 2))}),
    "causal": ((2, 4, 11), {"kernel": (3,), "stride": (1,), "dilation": (2,), "padding": ((4, 0),)}),
    "of one pixel": ((1, 4, 5, 5), {"kernel": (1, 1), "stride": (1, 1), "dilation": (1, 1), "padding": ((0, 0),) * 2}),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def assert_same(mine: InputSums | None, yours: InputSums) -> None:
    assert mine is not None
    shown = draw(Recipe(1))
    lengths = lengths_of(
        replace(shown, input_sums=lambda: InputSums(yours.sum_LSG, yours.square_LSG, yours.centred_LSG))
    )
    assert mine.lengths is not None
    for one, other in zip(
        (mine.sum_LSG, mine.square_LSG, mine.centred_LSG, *mine.lengths[1:]),
        (yours.sum_LSG, yours.square_LSG, yours.centred_LSG, *lengths[1:]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, equal_nan=True)


@DTYPES
def test_vectors(dtype: torch.dtype) -> None:
    x_LSGD = (torch.randn(3, 4, 2, 37, generator=torch.Generator().manual_seed(0)) + 5).to(DEVICE, dtype)
    x_LSGD[0, 0, 0, 1], x_LSGD[1, 0], x_LSGD[2, 1] = torch.nan, 0, 7
    assert_same(triton_sums.of_vectors(x_LSGD), sums_of(x_LSGD))
    turned = x_LSGD.transpose(1, 3)
    assert_same(triton_sums.of_vectors(turned), sums_of(turned))


@DTYPES
@pytest.mark.parametrize("of", sorted(WINDOWS))
def test_windows(of: str, dtype: torch.dtype) -> None:
    shape, settings = WINDOWS[of]
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3).to(DEVICE, dtype)
    x[0, 0, ..., 0] = torch.inf
    mine = triton_sums.of_windows(x, groups=2, **settings)
    assert_same(mine, Convolution(conv_groups=2, **settings).input_sums(x))


def test_what_it_does_not_read_is_left_to_torch() -> None:
    assert triton_sums.of_vectors(torch.ones(1, 1, 1, 2, dtype=torch.float64)) is None
    assert triton_sums.of_vectors(torch.ones(0, 1, 1, 2)) is None
    three = {"kernel": (1,) * 3, "stride": (1,) * 3, "dilation": (1,) * 3, "padding": ((0, 0),) * 3}
    assert triton_sums.of_windows(torch.ones(1, 1, 2, 2, 2), groups=1, **three) is None
