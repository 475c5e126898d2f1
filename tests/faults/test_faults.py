"""Planted faults: copies of real primitives with one mistake each, and the laws that catch them.

A law that no fault can break proves nothing. Each fault is a subclass of a real primitive or statistic; `FAULTS` names
the law that is meant to catch it, which must, on the named inputs of the laws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from pipeline.kernels import ranked
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.bins import Bins
from pipeline.kernels.classsums import ClassSums
from pipeline.kernels.comoment import CoMoment, InputCovariance
from pipeline.kernels.firing import Firing
from pipeline.kernels.gradientsums import GradientSums
from pipeline.kernels.matchbins import MatchBins, moments_of
from pipeline.kernels.moments import Moments
from pipeline.kernels.pairs import UnitPairs
from pipeline.kernels.ranked import Ranked
from pipeline.kernels.view import View
from pipeline.registry import statistics
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import Statistic
from tests.laws.drawn import draw
from tests.laws.laws import LAWS
from tests.laws.test_laws import NAMED

RESPONSE, MATCH, LABELS, EXEMPLARS = (statistics()[name] for name in ("response", "match", "labels", "exemplars"))
TEMPLATE, COMPOSITION, IMPORTANCE, WEIGHTS = (
    statistics()[name] for name in ("template", "composition", "importance", "weights")
)
FEW_COMPARED = replace(statistics()["redundancy"], largest=2)


def with_faulty(statistic: Statistic, name: str, faulty: Callable[[Primitive], Primitive]) -> Statistic:
    """A copy of a statistic in which one primitive is another."""

    class Faulty(type(statistic)):
        def primitives(self, site: Site) -> dict[str, Primitive]:
            needed = dict(super().primitives(site))
            return needed | {name: faulty(needed[name])} if name in needed else needed

    return Faulty(**statistic.parameters)


def copy_as(kind: type[Primitive]) -> Callable[[Primitive], Primitive]:
    return lambda primitive: kind(**vars(primitive))


class DroppedN(Moments):
    def merge(self, left: State, right: State) -> State:
        return super().merge(left, right) | {"n": left["n"].clone()}


class MultipliedN(Firing):
    def merge(self, left: State, right: State) -> State:
        return super().merge(left, right) | {"n": left["n"] * right["n"]}


class BatchScaledDelta(Moments):
    def merge(self, left: State, right: State) -> State:
        total = (left["n"] + right["n"]).clamp(min=1)
        delta = (right["mean"] - left["mean"]) * right["n"] / total
        return super().merge(left, right) | {"m2": left["m2"] + right["m2"] + delta.square() * right["n"]}


class CountBlindMean(Moments):
    def merge(self, left: State, right: State) -> State:
        return super().merge(left, right) | {"mean": (left["mean"] + right["mean"]) / 2}


class UnguardedEmptyMerge(Moments):
    def merge(self, left: State, right: State) -> State:
        total = left["n"] + right["n"]
        mean = (left["n"] * left["mean"] + right["n"] * right["mean"]) / total.double()
        return super().merge(left, right) | {"mean": mean}


class Float32Sums(Moments):
    def observe(self, presentations: Presentations) -> State:
        state = super().observe(presentations)
        return state | {name: state[name].float().double() for name in ("mean", "m2", "absolute")}


class PowerSums(Moments):
    def observe(self, presentations: Presentations) -> State:
        state, view = super().observe(presentations), View.of(presentations)
        raw_U = view.z64_LSU.float().square().sum((0, 1)).double()
        return state | {"m2": (raw_U - state["n"] * state["mean"].square()).clamp(min=0)}


class ZeroInitialisedExtremes(Moments):
    def empty(self, site: Site) -> State:
        state = super().empty(site)
        return state | {name: torch.zeros_like(state[name]) for name in ("min", "max")}


class LostUnitAxis(Moments):
    def observe(self, presentations: Presentations) -> State:
        state = super().observe(presentations)
        return state | {"mean": state["mean"].mean().expand_as(state["mean"]).clone()}


class AliasedState(Moments):
    def observe(self, presentations: Presentations) -> State:
        state = super().observe(presentations)
        presentations.z_LSU.relu_()
        return state


class InPlaceMerge(Bins):
    def merge(self, left: State, right: State) -> State:
        if not torch.equal(left["top"], right["top"]):
            return super().merge(left, right)
        left["count"] += right["count"]
        return left


class OffByOneBin(Bins):
    def observe(self, presentations: Presentations) -> State:
        state = super().observe(presentations)
        return state | {"count": state["count"].roll(1, 1)}


class UnshiftedWindows(Bins):
    def merge(self, left: State, right: State) -> State:
        return super().merge(left, right) | {"count": left["count"] + right["count"]}


class MaskIgnored(Firing):
    def observe(self, presentations: Presentations) -> State:
        return super().observe(View.of(replace(_plain(presentations), mask_LS=None)))


class NonFiniteKept(Moments):
    def observe(self, presentations: Presentations) -> State:
        state, z_LSU = super().observe(presentations), presentations.z_LSU.double().nan_to_num()
        if not z_LSU.numel():
            return state
        return state | {"max": torch.maximum(state["max"], z_LSU.amax((0, 1)))}


class RowsAreEntries(Firing):
    def observe(self, presentations: Presentations) -> State:
        return super().observe(View.of(replace(_plain(presentations), row_L=None)))


class FiresAtZero(Firing):
    def observe(self, presentations: Presentations) -> State:
        state = super().observe(presentations)
        return state | {"fired": state["fired"] + state["zero"]}


class UndefinedAsZero(MatchBins):
    def observe(self, presentations: Presentations) -> State:
        state = super().observe(presentations)
        count = state["silent_count"].clone()
        count[:, count.shape[1] // 2] += state["undefined"]
        return state | {"silent_count": count, "undefined": torch.zeros_like(state["undefined"])}


class PooledMatch(MatchBins):
    """Firing and silent presentations under one mean."""

    def observe(self, presentations: Presentations) -> State:
        state = super().observe(presentations)
        fired, silent = moments_of(state, "fired"), moments_of(state, "silent")
        total = (fired["n"] + silent["n"]).clamp(min=1)
        mean = (fired["n"] * fired["mean"] + silent["n"] * silent["mean"]) / total
        return state | {"fired_mean": mean}


class UnlabelledAsLast(ClassSums):
    """Label −1 indexes the last class."""

    def observe(self, presentations: Presentations) -> State:
        if presentations.label_N is None:
            return super().observe(presentations)
        label_N = presentations.label_N % presentations.classes
        return super().observe(View.of(replace(_plain(presentations), label_N=label_N)))


class LabelDrawnByPlace(ClassSums):
    """The control label depends on where in the batch a row stands."""

    def null_label(self, uid_N: torch.Tensor, classes: int) -> torch.Tensor:
        return super().null_label(torch.arange(len(uid_N)), classes)


class ArrivalOrderTies(Ranked):
    def observe(self, presentations: Presentations) -> State:
        view = _plain(presentations)
        state = super().observe(replace(view, uid_N=torch.arange(view.rows)))
        uid_N = torch.cat([view.uid_N, torch.tensor([-1])])
        return state | {"uid": uid_N[state["uid"]]}


class TopkTies(Ranked):
    """Of equals whatever torch.topk returns first."""

    def _first(self, key_UM: torch.Tensor, stratum_UM: torch.Tensor) -> torch.Tensor:
        index_UK = super()._first(key_UM.flip(1), stratum_UM.flip(1))
        return torch.where(index_UK < 0, -1, key_UM.shape[1] - 1 - index_UK)


class SeveralOfARow(Ranked):
    """Every entry of a row is a candidate."""

    def observe(self, presentations: Presentations) -> State:
        view = _plain(presentations)
        row_L = view.row_index_L
        label_N = None if view.label_N is None else view.label_N[row_L]
        return super().observe(replace(view, row_L=None, uid_N=view.uid_N[row_L], label_N=label_N))


class HashOfAnotherBackend(Ranked):
    """An arithmetic shift where the hash needs the logical one: right for numbers below 2⁶³ only."""

    def observe(self, presentations: Presentations) -> State:
        return self._with(lambda: super(HashOfAnotherBackend, self).observe(presentations))

    def merge(self, left: State, right: State) -> State:
        return self._with(lambda: super(HashOfAnotherBackend, self).merge(left, right))

    def _with(self, call: Callable[[], State]) -> State:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranked, "row_hash", self._hash)
            patch.setattr(
                View, "hash_NU", lambda view, seed: self._hash(view.uid_N[:, None], seed=seed, unit=_units(view))
            )
            return call()

    @staticmethod
    def _hash(uid: torch.Tensor, *, seed: int, unit: torch.Tensor) -> torch.Tensor:
        z = (uid + (unit + seed) * 0x9E3779B97F4A7C1) * 0x3F58476D1CE4E5B9
        return (z ^ (z >> 27)) & (2**63 - 1)


@dataclass(frozen=True)
class SampleVariance(type(RESPONSE)):
    """Divides by n − 1."""

    name: ClassVar[str] = "response"

    def columns(self, site, state, controls):
        rows = super().columns(site, state, controls)
        n = rows["neurons"]["n"].double()
        corrected = rows["neurons"]["z_std"] * (n / (n - 1)).sqrt()
        return {**rows, "neurons": {**rows["neurons"], "z_std": corrected}}


class NoCrossTerm(CoMoment):
    """Co-moments about two means are added as if the means were one."""

    def merge(self, left: State, right: State) -> State:
        merged = super().merge(left, right)
        return merged | {name: left[name] + right[name] for name in ("cov_UD", "fired_UD") if name in merged}


class MaskedInputsCounted(InputCovariance):
    def observe(self, presentations: Presentations) -> State:
        return super().observe(View.of(replace(_plain(presentations), mask_LS=None)))


class FirstUnitsReferred(UnitPairs):
    """The first units stand for those behind each, when merging only."""

    def merge(self, left: State, right: State) -> State:
        merged, total = super().merge(left, right), (left["n_1"] + right["n_1"]).clamp(min=1)
        step_U = right["mean_U"] - left["mean_U"]
        weighted_U = left["n_1"] * right["n_1"].double() / total * step_U
        outer_UK = weighted_U[:, None] * step_U[: left["co_UK"].shape[1]]
        return merged | {"co_UK": left["co_UK"] + right["co_UK"] + outer_UK}


class GradientsOfAnyNumber(GradientSums):
    """A gradient that is NaN counts as 0."""

    def observe(self, presentations: Presentations) -> State:
        gradient_LSU = presentations.gradient_LSU
        if gradient_LSU is not None:
            presentations = replace(_plain(presentations), gradient_LSU=gradient_LSU.nan_to_num())
        return super().observe(View.of(presentations))


@dataclass(frozen=True)
class RawPatterns(type(WEIGHTS)):
    """Compares the weights before a norm was folded in with the twin's."""

    name: ClassVar[str] = "weights"

    def columns(self, site, state, controls):
        return super().columns(replace(site, pattern_UD=site.raw_UD), state, controls)


class FiniteByZ(Firing):
    """Whether a presentation counts is asked of z alone."""

    def observe(self, presentations: Presentations) -> State:
        return super().observe(replace(_plain(presentations), a_LSU=presentations.z_LSU))


def _plain(presentations: Presentations) -> Presentations:
    """Without what a view has already derived."""
    return Presentations(**{name: getattr(presentations, name) for name in Presentations.__dataclass_fields__})


def _units(view: View) -> torch.Tensor:
    return torch.arange(view.site.units)[None, :]


FAULTS: dict[str, tuple[Statistic, str]] = {
    "dropped n": (with_faulty(RESPONSE, "z", copy_as(DroppedN)), "partition"),
    "multiplied n": (with_faulty(RESPONSE, "firing", copy_as(MultipliedN)), "partition"),
    "batch-scaled delta": (with_faulty(RESPONSE, "z", copy_as(BatchScaledDelta)), "partition"),
    "count-blind mean": (with_faulty(RESPONSE, "z", copy_as(CountBlindMean)), "tree"),
    "unguarded empty merge": (with_faulty(RESPONSE, "z", copy_as(UnguardedEmptyMerge)), "identity"),
    "float32 sums": (with_faulty(RESPONSE, "z", copy_as(Float32Sums)), "oracle"),
    "power sums": (with_faulty(RESPONSE, "z", copy_as(PowerSums)), "oracle"),
    "zero-initialised extremes": (with_faulty(RESPONSE, "z", copy_as(ZeroInitialisedExtremes)), "identity"),
    "lost unit axis": (with_faulty(RESPONSE, "z", copy_as(LostUnitAxis)), "oracle"),
    "input overwritten": (with_faulty(RESPONSE, "z", copy_as(AliasedState)), "purity"),
    "in-place merge": (with_faulty(RESPONSE, "bins", copy_as(InPlaceMerge)), "purity"),
    "off-by-one bin": (with_faulty(RESPONSE, "bins", copy_as(OffByOneBin)), "oracle"),
    "unshifted windows": (with_faulty(RESPONSE, "bins", copy_as(UnshiftedWindows)), "partition"),
    "mask ignored": (with_faulty(RESPONSE, "firing", copy_as(MaskIgnored)), "oracle"),
    "not finite kept": (with_faulty(RESPONSE, "z", copy_as(NonFiniteKept)), "oracle"),
    "finite by z alone": (with_faulty(RESPONSE, "firing", copy_as(FiniteByZ)), "oracle"),
    "rows are entries": (with_faulty(RESPONSE, "firing", copy_as(RowsAreEntries)), "oracle"),
    "fires at zero": (with_faulty(RESPONSE, "firing", copy_as(FiresAtZero)), "oracle"),
    "sample variance": (SampleVariance(), "oracle"),
    "undefined as zero": (with_faulty(MATCH, "cosine", copy_as(UndefinedAsZero)), "oracle"),
    "pooled match": (with_faulty(MATCH, "pearson", copy_as(PooledMatch)), "oracle"),
    "unlabelled as last class": (with_faulty(LABELS, "true", copy_as(UnlabelledAsLast)), "oracle"),
    "label drawn by place": (with_faulty(LABELS, "null", copy_as(LabelDrawnByPlace)), "row_order"),
    "arrival-order ties": (with_faulty(EXEMPLARS, "greatest", copy_as(ArrivalOrderTies)), "row_order"),
    "topk ties": (with_faulty(EXEMPLARS, "smallest", copy_as(TopkTies)), "oracle"),
    "several of a row": (with_faulty(EXEMPLARS, "greatest", copy_as(SeveralOfARow)), "oracle"),
    "no cross term": (with_faulty(TEMPLATE, "comoment", copy_as(NoCrossTerm)), "partition"),
    "no cross term of firing": (with_faulty(COMPOSITION, "comoment", copy_as(NoCrossTerm)), "oracle_of_parts"),
    "masked inputs counted": (with_faulty(TEMPLATE, "inputs", copy_as(MaskedInputsCounted)), "oracle"),
    "first units referred to": (with_faulty(FEW_COMPARED, "pairs", copy_as(FirstUnitsReferred)), "oracle_of_parts"),
    "gradients of any number": (with_faulty(IMPORTANCE, "gradients", copy_as(GradientsOfAnyNumber)), "oracle"),
    "raw patterns": (RawPatterns(), "oracle"),
    "hash of another backend": (with_faulty(EXEMPLARS, "random", copy_as(HashOfAnotherBackend)), "oracle"),
}


def breaks(statistic: Statistic, law: str) -> list[str]:
    """The named inputs on which a statistic breaks a law."""
    broken = []
    for kind, recipe in NAMED.items():
        shown = draw(recipe)
        if not statistic.applies(shown.site):
            continue
        try:
            LAWS[law](statistic, shown, np.random.default_rng(recipe.seed))
        except AssertionError:
            broken.append(kind)
    return broken


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_the_laws_catch(fault: str) -> None:
    statistic, law = FAULTS[fault]
    assert breaks(statistic, law), f"no input of {law} shows it"


@pytest.mark.parametrize(
    "name", ["response", "match", "labels", "exemplars", "template", "composition", "importance", "redundancy"]
)
def test_copies_without_a_fault_are_not_caught(name: str) -> None:
    needed = next(iter(statistics()[name].primitives(draw(NAMED["plain"]).site)))
    faithful = with_faulty(statistics()[name], needed, lambda primitive: type(primitive)(**vars(primitive)))
    assert not any(breaks(faithful, law) for law in ("oracle", "partition"))


def test_every_law_catches_something() -> None:
    assert {law for _, law in FAULTS.values()} >= {"oracle", "partition", "identity", "row_order", "tree", "purity"}
