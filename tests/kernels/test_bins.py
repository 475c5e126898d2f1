"""Bins read from bits against edges as numbers, for every type; windows that move; quantiles with a bound."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch

from pipeline.kernels import bins
from pipeline.kernels.bins import Bins, bin_edges, bin_numbers, lattice, lattice_edge, quantiles
from tests.laws.drawn import make_presentations, make_site, split

BINS = Bins()


def shown_z(z: torch.Tensor, **fields):
    site = make_site(np.ones((1, 1)))
    return make_presentations(site, np.zeros((len(z), 1)), z_LSU=z[:, None, None], dtype=z.dtype, **fields)


def counted(z: torch.Tensor, pieces: int = 1) -> dict[str, torch.Tensor]:
    parts = split(shown_z(z), torch.arange(len(z)) * pieces // max(1, len(z)))
    return reduce(BINS.merge, map(BINS.observe, parts))


@pytest.mark.parametrize("bits", [0, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lattice_numbers_begin_at_their_edges(dtype: torch.dtype, bits: int) -> None:
    number = torch.arange(-100 << bits, 100 << bits)
    edge = lattice_edge(number, bits).to(dtype)
    assert torch.equal(lattice(edge, bits).long(), number)
    assert torch.equal(lattice(-edge, bits).long(), number)
    below = torch.nextafter(edge, torch.zeros_like(edge))
    assert torch.equal(lattice(below, bits).long(), number - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_narrow_float_lies_between_its_edges(dtype: torch.dtype) -> None:
    value = torch.arange(1 << 15, dtype=torch.int16).view(dtype)
    value = value[value.isfinite() & (value.double() >= 2.0**-126)]
    number = lattice(value, bins.MANTISSA_BITS).long()
    assert (lattice_edge(number, bins.MANTISSA_BITS) <= value.double()).all()
    assert (value.double() < lattice_edge(number + 1, bins.MANTISSA_BITS)).all()
    assert torch.equal(number, lattice(value.double(), bins.MANTISSA_BITS))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-3, 1.0, 1e6, 1e37])
def test_counts_are_those_of_numpy(scale: float) -> None:
    random = np.random.default_rng(0)
    z = torch.as_tensor(random.normal(size=4000) * np.exp(random.normal(size=4000) * 3) * scale).float()
    z[:10] = 0
    z = z[z.isfinite()]
    state = counted(z)
    low_B, high_B = (edge[0] for edge in bin_edges(state["top"]))
    for column in range(bins.BINS):
        low, high = float(low_B[column]), float(high_B[column])
        # a bin holds its edge nearer to zero; the zero bin nothing but zero, which no other bin holds
        inside = (z.double() >= low) & (z.double() < high) if low >= 0 else (z.double() > low) & (z.double() <= high)
        inside = z == 0 if column == bins.ZERO else inside & (z != 0)
        assert int(state["count"][0, column]) == int(inside.sum()), column


def test_no_magnitude_is_out_of_range() -> None:
    z = torch.tensor([1e-45, -1e-45, 1e-30, 1.0, 3e38, -3e38])
    state = counted(z)
    assert int(state["count"].sum()) == len(z)
    low, high = bin_edges(state["top"])
    assert float(low[0, 0]) < -3e38
    assert float(high[0, -1]) > 3e38


@pytest.mark.parametrize("pieces", [2, 50])
def test_windows_meet_whatever_comes_first(pieces: int) -> None:
    random = np.random.default_rng(3)
    z = torch.as_tensor(random.normal(size=300) * 10.0 ** random.integers(-8, 8, 300)).float()
    once = counted(z)
    for order in (torch.arange(300), z.abs().argsort(), z.abs().argsort(descending=True)):
        parts = counted(z[order], pieces)
        assert torch.equal(parts["count"], once["count"])
        assert torch.equal(parts["top"], once["top"])


def test_bin_numbers_name_the_same_edges_in_every_window() -> None:
    top_U = torch.tensor([bins.EMPTY_TOP, 0, 3, 40])
    seen: dict[int, tuple[float, float]] = {}
    low, high = bin_edges(top_U)
    for unit, numbers in enumerate(bin_numbers(top_U).tolist()):
        assert numbers == sorted(set(numbers))
        for column, number in enumerate(numbers):
            small = column in (bins.ZERO - 1, bins.ZERO + 1)
            edges = (float(low[unit, column]), float(high[unit, column]))
            assert small or seen.setdefault(number, edges) == edges


@pytest.mark.parametrize("at", [0.001, 0.05, 0.25, 0.5, 0.75, 0.95, 0.999])
@pytest.mark.parametrize("shift", [0.0, 5.0, -300.0])
def test_quantiles_are_within_their_bound(shift: float, at: float) -> None:
    z = torch.as_tensor(np.random.default_rng(5).standard_t(3, size=5000) + shift).float()
    state = counted(z)
    read = float(quantiles(state["count"], *bin_edges(state["top"]), at))
    true = float(np.quantile(z.double().numpy(), at, method="inverted_cdf"))
    assert abs(read - true) <= 0.25 * abs(true) + 2.0**-13 * float(z.abs().max())


def test_quantiles_of_a_smooth_distribution_are_much_nearer() -> None:
    z = torch.as_tensor(np.random.default_rng(6).normal(size=50_000)).float()
    state = counted(z)
    for at in (0.01, 0.25, 0.75, 0.99):
        true = float(np.quantile(z.numpy(), at))
        assert abs(float(quantiles(state["count"], *bin_edges(state["top"]), at)) - true) < 0.03 * abs(true)
