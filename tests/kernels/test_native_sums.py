"""The native kernel's sums over inputs against explicit windows and vectors, in extended precision."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from pipeline.input_forms import InputSums
from pipeline.kernels import native_build, native_sums
from tests.flow.convolutions import windows

# channels, spatial sizes, kernel, stride, dilation, padding before and after, groups
SHAPES = {
    "line": (3, (37,), (5,), (2,), (2,), ((4, 0),), 1),
    "image": (6, (9, 8), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 1),
    "groups": (6, (9, 7), (2, 3), (2, 1), (1, 2), ((0, 1), (2, 0)), 3),
    "every channel by itself": (5, (6, 6), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 5),
    "volume": (4, (5, 4, 6), (2, 1, 3), (1, 2, 1), (2, 1, 1), ((1, 0), (0, 0), (1, 2)), 2),
}


def dtypes(offset: float) -> list[torch.dtype]:
    """Those that hold numbers about so far from 0."""
    return [torch.float32, torch.bfloat16, *([torch.float16] if offset < 1e4 else [])]


@pytest.fixture(scope="module", autouse=True)
def _native():
    with native_sums.in_force(native_build.kernel()):
        yield


def drawn(*shape: int, offset: float, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + offset).to(dtype)


def check(sums: InputSums | None, x_LSGD: np.ndarray) -> None:
    assert sums is not None
    exact = x_LSGD.astype(np.longdouble)
    centred = ((exact - exact.mean(-1, keepdims=True)) ** 2).sum(-1)
    for got, wanted in zip((sums.sum_LSG, sums.square_LSG), (exact.sum(-1), (exact**2).sum(-1)), strict=True):
        np.testing.assert_allclose(got, wanted.astype(float), rtol=1e-12, atol=1e-12 * np.abs(exact).max())
    np.testing.assert_allclose(sums.centred_LSG, centred.astype(float), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 5.0, -300.0, 2e4])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_windows_are_summed_as_if_they_were_explicit(name: str, offset: float) -> None:
    channels, sizes, kernel, stride, dilation, padding, groups = SHAPES[name]
    for dtype in dtypes(offset):
        x = drawn(4, channels, *sizes, offset=offset, dtype=dtype)
        if groups < channels:
            # sums are taken around the mean of all channels, which may be far from those of one group
            x = x + 3 * offset * torch.arange(channels).view(-1, *[1] * len(sizes)).to(dtype)
        x[2] *= -2
        padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), *padding))
        given = {"kernel": kernel, "stride": stride, "dilation": dilation, "padding": padding, "groups": groups}
        check(native_sums.of_windows(x, **given), windows(padded, kernel, stride, dilation, groups))


@pytest.mark.parametrize(("inputs", "offset"), list(product([1, 2, 7, 31, 32, 33, 100], [0.0, 5.0, -300.0, 2e4])))
def test_vectors_are_summed_as_they_are(inputs: int, offset: float) -> None:
    for dtype in dtypes(offset):
        x = drawn(3, 4, 2, inputs, offset=offset, dtype=dtype)
        check(native_sums.of_vectors(x), x.double().numpy())
        check(native_sums.of_vectors(x.transpose(0, 1)), x.transpose(0, 1).double().numpy())


@pytest.mark.parametrize(("inputs", "offset"), list(product([1, 7, 32, 100, 1537], [0.0, 300.0])))
def test_a_norm_is_summed_to_the_bit_as_what_it_gives(inputs: int, offset: float) -> None:
    x = drawn(3, 4, 2, inputs, offset=offset, dtype=torch.float32)
    x[1, 2] = 7
    made, mean, scale = torch.native_layer_norm(x, (inputs,), None, None, 1e-5)
    found, wanted = native_sums.of_norm(x, mean, scale), native_sums.of_vectors(made)
    assert found is not None
    assert wanted is not None
    for name in ("sum_LSG", "square_LSG", "centred_LSG"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))


def test_a_norm_of_other_memory_is_left_to_who_makes_it() -> None:
    x = drawn(3, 4, 2, 8, offset=0, dtype=torch.float32)
    _, mean, scale = torch.native_layer_norm(x, (8,), None, None, 1e-5)
    assert native_sums.of_norm(x.transpose(0, 1), mean, scale) is None
    assert native_sums.of_norm(x.double(), mean, scale) is None
    assert native_sums.of_norm(x[:2], mean, scale) is None
