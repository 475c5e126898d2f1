"""The reference kernel: blocks and sharing change nothing; memory stays that of a block; states own their memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.input_forms import InputSums
from pipeline.kernels import reference
from pipeline.kernels.reference import observe_all
from pipeline.registry import statistics
from pipeline.sites import Presentations
from tests.laws.drawn import Recipe, draw, make_site
from tests.laws.laws import assert_same_bits, assert_same_choices

OURS = ("response", "match", "labels", "exemplars")


def primitives(site):
    needed = chain.from_iterable(statistics()[name].primitives(site).values() for name in OURS)
    return list(dict.fromkeys(needed))


@pytest.mark.parametrize("spread", [False, True])
def test_blocks_change_no_choice(monkeypatch: pytest.MonkeyPatch, spread: bool) -> None:
    shown = draw(Recipe(0, rows=23, positions=3, groups=2, masked=True, spread=spread, normed=True, bad=(np.nan, 0.0)))
    needed = primitives(shown.site)
    whole = observe_all(needed, shown)
    monkeypatch.setattr(reference, "BLOCK_VALUES", 40)
    for one, other in zip(whole, observe_all(needed, shown), strict=True):
        assert_same_choices(one, other)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-9, equal_nan=True)


def test_primitives_of_a_union_are_those_alone() -> None:
    shown = draw(Recipe(1, rows=30, positions=2, masked=True, bad=(np.nan,)))
    needed = primitives(shown.site)
    for primitive, state in zip(needed, observe_all(needed, shown), strict=True):
        assert_same_bits(state, primitive.observe(shown))


def test_a_state_does_not_change_with_the_activations() -> None:
    # an in-place ReLU behind the hook turns the saved pre-activation into a post-activation
    shown = draw(Recipe(2, rows=30))
    needed = primitives(shown.site)
    states = observe_all(needed, shown)
    kept = [{name: value.clone() for name, value in state.items()} for state in states]
    shown.z_LSU.relu_()
    for state, before in zip(states, kept, strict=True):
        assert_same_bits(state, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_types_are_read_exactly(dtype: torch.dtype) -> None:
    shown = draw(Recipe(3, rows=40, dtype=dtype))
    wide = Presentations(**{**vars(shown), "z_LSU": shown.z_LSU.double(), "a_LSU": shown.a_LSU.double()})
    needed = primitives(shown.site)
    for one, other in zip(observe_all(needed, shown), observe_all(needed, wide), strict=True):
        assert_same_bits(one, other)


def test_a_convolution_is_read_where_it_lies() -> None:
    z_NCP = torch.randn(6, 3, 20, generator=torch.Generator().manual_seed(0))
    site = make_site(torch.randn(3, 5, generator=torch.Generator().manual_seed(1)))
    ones = torch.ones(6, 20, 1, dtype=torch.float64)
    sums = InputSums(ones, 5 * ones, 4 * ones)
    label_N = torch.arange(6) % 2

    def shown(z_LSU: torch.Tensor) -> Presentations:
        return Presentations(
            site, z_LSU, z_LSU.relu(), torch.arange(6), lambda i, j: z_LSU, lambda: sums, label_N, classes=2
        )

    strided, contiguous = shown(z_NCP.transpose(1, 2)), shown(z_NCP.transpose(1, 2).contiguous())
    needed = primitives(site)
    for one, other in zip(observe_all(needed, strided), observe_all(needed, contiguous), strict=True):
        assert_same_choices(one, other)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-12, equal_nan=True)


def peak_mib(rows: int) -> float:
    """How much the process grows at its peak while a batch of 40 positions and 64 units is observed."""
    site = make_site(np.ones((64, 3)))
    z = torch.randn(rows, 1, 64, generator=torch.Generator().manual_seed(0)).expand(rows, 40, 64)
    ones = torch.ones(1, 1, 1, dtype=torch.float64).expand(rows, 40, 1)
    sums = InputSums(ones, 3 * ones, 2 * ones)
    label_N = torch.arange(rows) % 10
    shown = Presentations(site, z, z, torch.arange(rows), lambda i, j: z, lambda: sums, label_N, classes=10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    observe_all(primitives(site), shown)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def test_memory_does_not_grow_with_the_rows() -> None:
    # in a process of its own, since a peak once reached hides the next; one temporary of all rows would take 98 MiB
    script = "from tests.kernels.test_reference import peak_mib; peak_mib(500); print(peak_mib(5000))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60


def test_a_unit_takes_less_than_8_kb() -> None:
    site = make_site(np.ones((1, 5)))
    assert sum(statistics()[name].state_bytes(site, 10) for name in ("response", "match", "labels")) <= 8000
    shown = draw(Recipe(0, units=1, rows=9))
    state = statistics()["labels"].observe(shown)
    stated = statistics()["labels"].state_bytes(shown.site, shown.classes)
    assert sum(value.numel() * value.element_size() for value in state.values()) == stated
