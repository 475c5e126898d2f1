"""The kernel for GPUs against the reference: the same counts, extremes and choices, and float64 sums to rounding.

It runs in Triton's interpreter on the CPU unless TRITON_INTERPRET=0 is set where there is a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.devices import GPU
from pipeline.errors import JobError
from pipeline.flow.discover import discover
from pipeline.forms import numbered
from pipeline.input_forms import InputSums
from pipeline.kernels import choose, triton_build
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.ranked import STRATA
from pipeline.registry import statistics
from pipeline.running import Running
from pipeline.sites import Presentations
from tests.elsewhere import ELSEWHERE, elsewhere
from tests.kernels.fused import FUSED, INFINITE, LAYOUTS, assert_same, grown_by_both, laid_out, primitives_of, recipes
from tests.laws.drawn import Recipe, draw, split
from tests.laws.laws import LAWS

triton = pytest.importorskip("triton", reason="Triton is not installed")
if not triton.knobs.runtime.interpret and not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

from pipeline.kernels import triton_kernel, triton_labels, triton_rows, triton_show, triton_sums  # noqa: E402
from pipeline.kernels.triton_kernel import Triton, fused, takes  # noqa: E402

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else GPU)
pytestmark = [pytest.mark.gpu] if DEVICE.type == GPU else []


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """The interpreter takes 0.1 s for a program, whatever it has in hand."""
    with pytest.MonkeyPatch.context() as patch:
        if triton.knobs.runtime.interpret:
            patch.setattr(triton_show, "NEIGHBOURS", triton_show.Hand(1 << 16, 64, 4))
            patch.setattr(triton_show, "STRANGERS", triton_show.Hand(1 << 16, 64, 4))
            patch.setattr(triton_rows, "UNITS", 64)
            patch.setattr(triton_rows, "OCTAVES", STRATA)
            patch.setattr(triton_labels, "FEW", (64, 64))
            patch.setattr(triton_labels, "MANY", (16, 64))
            patch.setattr(triton_sums, "VECTORS", 1 << 12)
        yield


def on_device(shown: Presentations, device: torch.device) -> Presentations:
    """Presentations on a device, in the layout that they have."""
    moved = {
        field.name: value.to(device)
        for field in fields(shown)
        if isinstance(value := getattr(shown, field.name), torch.Tensor)
    }
    if shown.a_LSU is shown.z_LSU:
        moved["a_LSU"] = moved["z_LSU"]
    sums = shown.input_sums()
    there = InputSums(*(one.to(device) for one in (sums.sum_LSG, sums.square_LSG, sums.centred_LSG)))
    return replace(shown, **moved, input_sums=lambda: there)


def there(shown: Presentations) -> Presentations:
    return shown if DEVICE.type == "cpu" else on_device(shown, DEVICE)


def both(*pieces: Presentations) -> Iterator[tuple[Primitive, State, State]]:
    site = pieces[0].site
    needed = fused(primitives_of(site))
    return grown_by_both(Triton(site, needed), needed, [there(piece) for piece in pieces])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(recipe=recipes, layout=st.sampled_from(sorted(LAYOUTS)))
def test_any_batch_gives_the_states_of_the_reference(recipe: Recipe, layout: str) -> None:
    for primitive, mine, yours in both(laid_out(draw(recipe), layout)):
        assert_same(mine, yours, primitive)


@settings(max_examples=2, deadline=None, derandomize=True)
@given(recipe=recipes.filter(lambda one: one.rows > 2))
def test_batch_by_batch_is_the_merge_of_states(recipe: Recipe) -> None:
    shown = draw(recipe)
    pieces = split(shown, torch.as_tensor(np.random.default_rng(recipe.seed).choice(3, shown.rows)))
    for primitive, mine, yours in both(*pieces):
        assert_same(mine, yours, primitive)


# which of its branches the kernel takes is decided by the batch
KINDS = {
    "given": Recipe(1, rows=5, positions=3, units=3, gate="gelu"),
    "rectified": Recipe(2, rows=5, positions=3, units=3, bad=(0.0, -0.0, 1e-42, -1e-42)),
    "identity": Recipe(3, rows=9, units=3, gate="identity"),
    "spread, masked and bad": Recipe(4, rows=9, positions=3, spread=True, masked=True, bad=INFINITE, tied=True),
    "numbered ties": Recipe(5, rows=6, positions=5, units=2, numbered=True, tied=True, constant=True),
    "groups behind a norm": Recipe(6, rows=6, positions=2, units=2, groups=3, normed=True, bad=(np.nan,)),
    "one row": Recipe(7, rows=1, positions=1, units=1),
    "no rows": Recipe(8, rows=0),
    "no entries": Recipe(40, rows=2, spread=True),
    "huge": Recipe(10, rows=9, units=2, scale=1e30, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_branch_gives_the_states_of_the_reference(kind: str) -> None:
    for primitive, mine, yours in both(draw(KINDS[kind])):
        assert_same(mine, yours, primitive)


@pytest.mark.parametrize("layout", sorted(LAYOUTS)[:2])
def test_tiles_and_runs_change_nothing_but_the_rounding(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_show, "NEIGHBOURS", triton_show.Hand(4, 2, 1))
    monkeypatch.setattr(triton_show, "STRANGERS", triton_show.Hand(4, 2, 1))
    monkeypatch.setattr(triton_show, "RUN_UNITS", 6)
    shown = laid_out(draw(Recipe(3, rows=7, positions=5, units=3, gate="gelu", masked=True, numbered=True)), layout)
    cut = triton_show.Cut(shown)
    assert cut.runs == 2
    assert cut.blocks > 1
    assert not cut.at_once
    assert cut.units > cut.tile[2]
    for primitive, mine, yours in both(shown):
        assert_same(mine, yours, primitive)


def test_many_runs_and_many_rows_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_show, "NEIGHBOURS", triton_show.Hand(4, 2, 1))
    monkeypatch.setattr(triton_labels, "FEW", (16, 64))
    shown = draw(Recipe(6, rows=70, positions=1, units=2, gate="relu"))
    assert triton_show.Cut(shown).runs > triton_kernel.FOLDED_RUNS
    for primitive, mine, yours in both(shown):
        assert_same(mine, yours, primitive)


def test_the_last_tile_of_a_run_may_be_less_than_full(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NEIGHBOURS", "STRANGERS"):
        monkeypatch.setattr(triton_show, name, triton_show.Hand(16, 64, 1))
    shown = draw(Recipe(4, rows=7, positions=2, units=2, gate="gelu"))
    cut = triton_show.Cut(shown)
    assert 1 < cut.tile[0] < cut.entries
    assert cut.entries % cut.tile[0]
    for primitive, mine, yours in both(shown):
        assert_same(mine, yours, primitive)


def test_moments_keep_their_digits_far_from_the_first_values() -> None:
    shown = draw(Recipe(1, rows=60, units=2))
    z_LSU = shown.z_LSU.clone()
    z_LSU[:20] += 1e6
    far = replace(shown, z_LSU=z_LSU, a_LSU=z_LSU, uid_N=shown.uid_N + 10**12)
    for primitive, mine, yours in both(far, shown):
        assert_same(mine, yours, primitive)


@pytest.mark.parametrize(("name", "law"), [("response", "partition"), ("match", "oracle"), ("exemplars", "row_order")])
def test_the_laws_hold(name: str, law: str) -> None:
    def observe_all(needed: list[Primitive], shown: Presentations) -> list[State]:
        kernel = choose.accumulator(choose.TRITON, shown.site, needed)
        kernel.add(there(shown))
        states = kernel.states()
        return [{key: value.cpu() for key, value in states[one].items()} for one in needed]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.statistics.base.observe_all", observe_all)
        shown = draw(Recipe(1, rows=12, positions=3, masked=True, tied=True))
        LAWS[law](statistics()[name], shown, np.random.default_rng(1))


def test_labels_of_positions_give_the_states_of_the_reference() -> None:
    shown = draw(Recipe(31, rows=6, positions=3, by_position=True, masked=True, numbered=True, bad=INFINITE))
    needed = fused(primitives_of(shown.site))
    kernel = choose.accumulator(choose.TRITON, shown.site, needed)
    for primitive, mine, yours in grown_by_both(kernel, needed, [there(shown), there(shown)]):
        assert_same(mine, yours, primitive)


def test_a_model_is_measured_as_the_reference_measures_it() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    model = nn.Sequential(*layers).to(DEVICE)
    batches = list(numbered([(torch.randn(6, 1, 4, 4).to(DEVICE), torch.arange(6).to(DEVICE) % 3) for _ in range(2)]))
    chosen = [statistics()[name] for name in FUSED]
    found = discover(model, batches[0])
    mine, yours = (Running(found, chosen, 3, kernel) for kernel in (choose.TRITON, choose.REFERENCE))
    for batch in batches:
        mine.add(model, batch)
        yours.add(model, batch)
    left, right = mine.states(), yours.states()
    assert mine.remarks() == []
    for name in FUSED:
        for site in found.sites:
            for key, value in left[name][site.name].items():
                torch.testing.assert_close(value, right[name][site.name][key], rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="it runs on a GPU")
def test_nothing_of_what_it_needs_stays_behind() -> None:
    pieces = split(draw(Recipe(1, rows=6, masked=True, numbered=True)), torch.arange(6) % 2)
    needed = fused(primitives_of(pieces[0].site))
    with elsewhere() as memory:
        there = [on_device(piece, ELSEWHERE) for piece in pieces]
        kernel = Triton(pieces[0].site, needed)
        kernel.add(there[0])
        moved = memory.moved
        kernel.add(there[1])
        assert memory.moved == moved
        states = {one: {name: value.cpu() for name, value in state.items()} for one, state in kernel.states().items()}
    for primitive, mine, yours in both(*pieces):
        assert_same(states[primitive], yours, primitive)
        assert_same(mine, yours, primitive)


def test_what_it_does_not_read_is_left_to_the_reference() -> None:
    shown = there(draw(Recipe(1)))
    assert takes(shown)
    assert not takes(replace(shown, z_LSU=shown.z_LSU.double()))
    assert not takes(replace(shown, affine_LSU=shown.z_LSU.double()))


def test_it_is_the_kernel_of_runs_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose.name(GPU) == choose.TRITON
    assert choose.remark(choose.TRITON, GPU) is None
    monkeypatch.setattr(triton_build, "lacking", lambda: "Triton is not installed")
    assert choose.name(GPU) == choose.REFERENCE
    assert choose.remark(choose.REFERENCE, GPU) == f"{choose.SLOWER}: Triton is not installed"
    with pytest.raises(JobError, match="'triton-5', which this machine does not have: Triton is not installed"):
        choose.accumulator(choose.TRITON, draw(Recipe(1)).site, [])


def compiled_ones(directory: Path, *which: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(directory)}
    command = [sys.executable, "-m", "tests.kernels.compiled", *which]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_what_the_interpreter_lets_pass_compiles_for_gpus(tmp_path: Path) -> None:
    found = compiled_ones(tmp_path, "90", "convolution")
    assert {one["kernel"] for one in found} == {
        *("observe", "fold", "fold_bins", "keep", "by_row"),
        *("norms", "vector_sums", "references", "pixel_sums", "window_sums"),
    }
    assert all((one["contracted"], one["flushed"]) == (0, 0) for one in found)


@pytest.mark.slow
def test_whatever_is_given_compiles_for_gpus(tmp_path: Path) -> None:
    found = compiled_ones(tmp_path)
    assert {(one["batch"], one["capability"]) for one in found} == {
        (batch, capability)
        for batch in ("convolution", "everything given", "dense", "one unit")
        for capability in (80, 90)
    }
    assert all((one["contracted"], one["flushed"]) == (0, 0) for one in found)
