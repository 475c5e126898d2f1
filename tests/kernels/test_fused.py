"""The fused kernel against the reference: the same counts, extremes and choices, and float64 sums to rounding."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import compiler
from pipeline.errors import JobError
from pipeline.executor import InlineExecutor
from pipeline.job import Job
from pipeline.kernels import choose, native_build
from pipeline.kernels.accumulate import Reference
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.bins import Bins
from pipeline.kernels.classsums import ClassSums
from pipeline.kernels.moments import Moments
from pipeline.kernels.native import VERSION, Native, fused
from pipeline.kernels.ranked import Ranked
from pipeline.measure import _say_once, measure
from pipeline.progress import Silent
from pipeline.registry import statistics
from pipeline.run import run
from pipeline.sites import Presentations
from pipeline.store import open_store
from tests.census import small_job
from tests.kernels.fused import (
    FUSED,
    INFINITE,
    LAYOUTS,
    PANELS,
    assert_same,
    grown_by_both,
    laid_out,
    primitives_of,
    recipes,
    without_matches,
)
from tests.laws.drawn import Recipe, draw, make_presentations, make_site, split
from tests.laws.laws import LAWS


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = native_build.kernel()
    assert isinstance(found, ctypes.CDLL), found
    return found


def both(pieces: list[Presentations], library: ctypes.CDLL) -> Iterator[tuple[Primitive, State, State]]:
    site = pieces[0].site
    needed = fused(primitives_of(site))
    return grown_by_both(Native(site, needed, library), needed, pieces)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(recipe=recipes, layout=st.sampled_from(sorted(LAYOUTS)))
def test_any_batch_gives_the_states_of_the_reference(library: ctypes.CDLL, recipe: Recipe, layout: str) -> None:
    for primitive, mine, yours in both([laid_out(draw(recipe), layout)], library):
        assert_same(mine, yours, primitive)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(recipe=recipes)
def test_batch_by_batch_is_the_merge_of_states(library: ctypes.CDLL, recipe: Recipe) -> None:
    shown = draw(recipe)
    random = np.random.default_rng(recipe.seed)
    pieces = split(shown, torch.as_tensor(random.choice(3, shown.rows))) or [shown]
    for primitive, mine, yours in both(pieces, library):
        assert_same(mine, yours, primitive)


# more positions than a run holds, runs of several rows, more units than a tile
LARGE = {
    "one long row": Recipe(1, rows=3, positions=2500, units=5),
    "runs of rows": Recipe(2, rows=120, positions=100, units=20, gate="gelu"),
    "runs of single positions": Recipe(3, rows=3000, units=17),
    "runs of uneven rows": Recipe(4, rows=400, positions=16, units=18, spread=True, masked=True, bad=INFINITE),
    "groups": Recipe(5, rows=60, positions=50, units=40, groups=3, gate="identity"),
}


@pytest.mark.parametrize("kind", sorted(LARGE))
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_large_batches_give_the_states_of_the_reference(library: ctypes.CDLL, kind: str, layout: str) -> None:
    for primitive, mine, yours in both([laid_out(draw(LARGE[kind]), layout)], library):
        assert_same(mine, yours, primitive)


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("kind", sorted(PANELS))
def test_panels_give_the_states_of_the_reference(library: ctypes.CDLL, kind: str, ranked: bool) -> None:
    shown = draw(PANELS[kind])
    needed = without_matches(fused(primitives_of(shown.site)), ranked=ranked)
    pieces = split(shown, torch.arange(shown.rows) % 2)
    for primitive, mine, yours in grown_by_both(Native(shown.site, needed, library), needed, pieces):
        assert_same(mine, yours, primitive)


@pytest.mark.parametrize("kind", sorted(PANELS))
def test_panels_have_the_bits_of_tiles(library: ctypes.CDLL, kind: str) -> None:
    shown = draw(PANELS[kind])
    needed = without_matches(fused(primitives_of(shown.site)))

    def bits(layout: str) -> list[bytes]:
        kernel = Native(shown.site, needed, library)
        for piece in split(shown, torch.arange(shown.rows) % 2):
            kernel.add(laid_out(piece, layout))
        return [value.numpy().tobytes() for state in kernel.states().values() for value in state.values()]

    # only one of them is read in panels
    panels, *tiles = [bits(layout) for layout in sorted(LAYOUTS)]
    assert all(one == panels for one in tiles)


def test_an_a_that_lies_otherwise_than_z_is_not_read_in_panels(library: ctypes.CDLL) -> None:
    several = draw(PANELS["short panels"])
    needed = without_matches(fused(primitives_of(several.site)))
    one, *_ = split(several, (torch.arange(several.rows) > 0).long())
    # its rows, or its presentations, are further apart
    for shown, more in ((several, (0, 8)), (several, (8, 0)), (one, (0, 8))):
        rows, positions, units = shown.a_LSU.shape
        a_LSU = torch.zeros(rows, positions + more[0], units + more[1])[:, :positions, :units]
        a_LSU.copy_(shown.a_LSU)
        pieces = [replace(shown, a_LSU=a_LSU)]
        for primitive, mine, yours in grown_by_both(Native(shown.site, needed, library), needed, pieces):
            assert_same(mine, yours, primitive)


@pytest.mark.parametrize("scales", [(1e-4, 1.0, 1e6, 1e-4), (1e-4, 1e-3, 1e-2), (1e30, 1e-30, 1.0)])
def test_windows_of_bins_rise_with_the_batches(library: ctypes.CDLL, scales: tuple[float, ...]) -> None:
    shown = draw(Recipe(6, rows=30, positions=3, units=9, gate="identity"))
    pieces = []
    for scale in scales:
        z_LSU = shown.z_LSU * scale
        pieces.append(replace(shown, z_LSU=z_LSU, a_LSU=z_LSU, uid_N=shown.uid_N + len(pieces) * 1000))
    for primitive, mine, yours in both(pieces, library):
        assert_same(mine, yours, primitive)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_half_precision_is_read_as_it_is(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    site = make_site([[1.0, 2.0, -1.0]], gate="identity")
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    z_LSU = every[every.isfinite() & (every.abs() < 1e30)].view(-1, 1, 1)
    z_LSU = z_LSU[torch.randperm(len(z_LSU), generator=torch.Generator().manual_seed(0))]
    x = torch.randn((len(z_LSU), 3), generator=torch.Generator().manual_seed(1))
    shown = make_presentations(site, x, dtype=dtype, z_LSU=z_LSU)
    needed = [one for one in primitives_of(site) if isinstance(one, Bins | Moments)]
    for primitive, mine, yours in grown_by_both(Native(site, needed, library), needed, [shown]):
        assert_same(mine, yours, primitive)


def test_presentations_at_which_a_alone_is_not_finite_are_left_out(library: ctypes.CDLL) -> None:
    shown = draw(Recipe(7, rows=40, positions=5, units=11, gate="gelu"))
    assert shown.z_LSU.isfinite().all()
    a_LSU = shown.a_LSU.clone()
    a_LSU[3, 2, 4], a_LSU[7, :, 8], a_LSU[11, 1, :] = torch.inf, torch.nan, -torch.inf
    for primitive, mine, yours in both([replace(shown, a_LSU=a_LSU)], library):
        assert_same(mine, yours, primitive)


def test_classes_that_come_later_leave_the_sums_of_those_before(library: ctypes.CDLL) -> None:
    shown = draw(Recipe(8, rows=24, positions=3, units=19))
    pieces = [
        replace(shown, uid_N=shown.uid_N + 1000 * classes, label_N=torch.arange(24) % classes, classes=classes)
        for classes in (2, 5, 5)
    ]
    for primitive, mine, yours in both(pieces, library):
        assert_same(mine, yours, primitive)


def test_of_rows_with_equal_keys_smaller_uids_are_kept_whenever_they_come(library: ctypes.CDLL) -> None:
    shown = draw(Recipe(9, rows=24, positions=3, units=11, gate="identity"))
    pieces = [replace(shown, uid_N=torch.arange(24) + offset) for offset in (5000, 9000, 1000)]
    for primitive, mine, yours in both(pieces, library):
        assert_same(mine, yours, primitive)
        if isinstance(primitive, Ranked) and primitive.kind == "greatest":
            assert mine["uid"][:, 0].lt(5000).all()


def test_one_value_more_often_than_sixteen_bits_count(library: ctypes.CDLL) -> None:
    site = make_site([[1.0, 2.0, -1.0], [-1.0, -2.0, 1.0]])
    shown = make_presentations(site, torch.tensor([1.0, 2.0, 0.5]).expand(70, 1001, 1, 3))
    for primitive, mine, yours in both([shown], library):
        assert_same(mine, yours, primitive)
        if isinstance(primitive, Bins):
            assert mine["count"].amax(1).tolist() == [70 * 1001] * 2


@pytest.mark.parametrize("kind", sorted(LARGE))
def test_threads_and_layouts_change_no_bit(library: ctypes.CDLL, kind: str) -> None:
    shown = draw(LARGE[kind])
    states = []
    before = torch.get_num_threads()
    for threads, layout in (
        (1, "entries, positions, units"),
        (2, "entries, positions, units"),
        (1, "units, entries, positions"),
    ):
        torch.set_num_threads(threads)
        try:
            kernel = Native(shown.site, fused(primitives_of(shown.site)), library)
            kernel.add(laid_out(shown, layout))
        finally:
            torch.set_num_threads(before)
        states.append(kernel.states())
    for other in states[1:]:
        for primitive, state in states[0].items():
            for name, value in state.items():
                assert value.numpy().tobytes() == other[primitive][name].numpy().tobytes(), f"{primitive} {name}"


def test_moments_keep_their_digits_far_from_the_first_values(library: ctypes.CDLL) -> None:
    shown = draw(Recipe(1, rows=4000, units=2))
    z_LSU = shown.z_LSU.clone()
    z_LSU[:500] += 1e6
    for primitive, mine, yours in both([replace(shown, z_LSU=z_LSU, a_LSU=z_LSU)], library):
        assert_same(mine, yours, primitive)


@pytest.mark.parametrize("first", [0.0, -0.0])
def test_zeros_have_no_sign_whichever_comes_first(library: ctypes.CDLL, first: float) -> None:
    shown = draw(Recipe(1, rows=40, units=3))
    z_LSU = torch.full_like(shown.z_LSU, first)
    z_LSU[20:].neg_()
    for primitive, mine, yours in both(
        split(replace(shown, z_LSU=z_LSU, a_LSU=z_LSU), torch.arange(40) // 20), library
    ):
        assert_same(mine, yours, primitive)


@pytest.mark.parametrize("law", ["oracle", "oracle_of_parts", "partition", "row_order"])
@pytest.mark.parametrize("name", FUSED)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(recipe=recipes.filter(lambda one: one.dtype == torch.float32))
def test_the_laws_hold(library: ctypes.CDLL, name: str, law: str, recipe: Recipe) -> None:
    def observe_all(needed: list[Primitive], shown: Presentations) -> list[State]:
        kernel = choose.accumulator(choose.NATIVE, shown.site, needed)
        kernel.add(shown)
        states = kernel.states()
        return [states[one] for one in needed]

    statistic, shown = statistics()[name], draw(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.statistics.base.observe_all", observe_all)
        LAWS[law](statistic, shown, np.random.default_rng(recipe.seed))


BY_POSITION = [
    Recipe(31, rows=30, positions=7, units=19, by_position=True, masked=True, bad=INFINITE),
    Recipe(32, rows=20, positions=2, by_position=True, spread=True, numbered=True, gate="gelu", normed=True),
    Recipe(33, rows=5, positions=3, by_position=True, gate="identity", groups=2),
]


@pytest.mark.parametrize("recipe", BY_POSITION)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_labels_of_positions_give_the_states_of_the_reference(recipe: Recipe, layout: str) -> None:
    shown = laid_out(draw(recipe), layout)
    of_rows = replace(shown, label_LS=None, label_N=torch.arange(shown.rows) % 3)
    pieces = [*split(shown, torch.arange(shown.rows) % 2), of_rows]
    needed = fused(primitives_of(shown.site))
    kernel = choose.accumulator(choose.NATIVE, shown.site, needed)
    for primitive, mine, yours in grown_by_both(kernel, needed, pieces):
        assert_same(mine, yours, primitive)


@pytest.mark.parametrize("name", [choose.REFERENCE, choose.NATIVE])
def test_where_positions_have_labels_those_of_rows_count_no_more(name: str) -> None:
    shown = draw(BY_POSITION[0])
    both = replace(shown, label_N=torch.arange(shown.rows) % 3)
    classed = [one for one in primitives_of(shown.site) if isinstance(one, ClassSums)]
    kernel, expected = (choose.accumulator(name, shown.site, classed) for _ in range(2))
    kernel.add(both)
    expected.add(shown)
    for primitive, state in kernel.states().items():
        assert_same(state, expected.states()[primitive], primitive)


def test_what_it_does_not_read_goes_to_the_reference_and_a_remark_says_so() -> None:
    shown = draw(Recipe(1, rows=30, dtype=torch.float64))
    needed = fused(primitives_of(shown.site))
    mixed, reference = choose.accumulator(choose.NATIVE, shown.site, needed), Reference(shown.site, needed)
    narrow = replace(shown, z_LSU=shown.z_LSU.float(), a_LSU=shown.a_LSU.float())
    for piece in (shown, narrow, shown):
        mixed.add(piece)
        reference.add(piece)
    mine, yours = mixed.states(), reference.states()
    for primitive in needed:
        if not isinstance(primitive, Ranked):
            assert_same(mine[primitive], yours[primitive], primitive)
    assert mixed.remarks() == [
        "statistics run on the reference kernel, several times slower: torch.float64 on cpu is not for the fused one"
    ]


def test_without_a_compiler_the_reference_takes_over_and_a_remark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "no C++ compiler"
    monkeypatch.setattr(native_build, "kernel", lambda: reason)
    assert choose.name() == choose.REFERENCE
    assert choose.remark(choose.REFERENCE, "cpu") == f"{choose.SLOWER}: {reason}"
    shown = draw(Recipe(1))
    assert isinstance(choose.accumulator(choose.REFERENCE, shown.site, []), Reference)
    with pytest.raises(JobError, match="no C\\+\\+ compiler"):
        choose.accumulator(choose.NATIVE, shown.site, [])


def test_a_run_says_once_that_the_reference_measures_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_build, "kernel", lambda: "no C++ compiler")
    reason = f"{choose.SLOWER}: no C++ compiler"
    assert notes_of(small_job(tmp_path), tmp_path) == [reason]
    assert logged(tmp_path)["remarks"] == [reason]


def test_a_run_says_once_that_its_precision_is_not_for_the_fused_kernel(tmp_path: Path) -> None:
    job = small_job(tmp_path, seeds="0, 1", more="[statistics.match]\n")
    wide = job.model_copy(update={"numerics": job.numerics.model_copy(update={"dtype": "float64"})})
    assert notes_of(wide, tmp_path) == [f"{choose.SLOWER}: torch.float64 on cpu is not for the fused one"]


def test_a_notebook_s_log_says_once_that_the_reference_measures(caplog: pytest.LogCaptureFixture) -> None:
    _say_once.cache_clear()
    for _ in range(2):
        measure(torch.nn.Linear(3, 2).double(), [torch.ones(4, 3).double()], statistics=[statistics()["response"]])
    assert [record.message for record in caplog.records] == [
        f"{choose.SLOWER}: torch.float64 on cpu is not for the fused one"
    ]


class Notes(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def logged(directory: Path) -> dict[str, Any]:
    """The one log of the one run."""
    (path,) = directory.glob("census/runs/*/log/*.json")
    return json.loads(path.read_text())


def notes_of(job: Job, directory: Path) -> list[str]:
    notes = Notes()
    run(job, open_store(str(directory / "census")), InlineExecutor(), notes)
    return notes.texts


def test_a_kernel_of_another_version_is_refused() -> None:
    shown = draw(Recipe(1))
    with pytest.raises(JobError, match=f"native-{VERSION}"):
        choose.accumulator("native-0", shown.site, [])


def test_a_broken_compiler_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "compilers", lambda: [["false"]])
    assert "false failed" in native_build.kernel.__wrapped__()
    monkeypatch.setattr(compiler, "compilers", list)
    assert "no C++ compiler" in native_build.kernel.__wrapped__()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert "/dev/null" in native_build.kernel.__wrapped__()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 2)
    assert "Set HOME or XDG_CACHE_HOME" in native_build.kernel.__wrapped__()


def test_the_compiler_that_pip_installs_compiles_for_this_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" double answer(double x) { return x * KEPT + 1; }')
    library = ctypes.CDLL(compiler.compiled(str(source), constants={"KEPT": 41}, processor="AVX2"))
    library.answer.argtypes, library.answer.restype = [ctypes.c_double], ctypes.c_double
    assert library.answer(1.0) == 42
