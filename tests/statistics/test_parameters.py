"""Parameters that cannot be: refused where a statistic is made, and in a job with the place of the key."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import JobError
from pipeline.hashing import row_hash
from pipeline.kernels.classsums import ClassSums
from pipeline.registry import statistics
from pipeline.resolve import resolve, sampled
from pipeline.statistics.base import at_least
from pipeline.statistics.weights import Weights
from pipeline.store import open_store
from tests.census import small_job

PRIOR = "whole numbers, none negative and not all 0"
WRONG = [
    ("exemplars", "k", 0, "an integer, 1 or more"),
    ("exemplars", "k", -1, "an integer, 1 or more"),
    ("exemplars", "k", 2**70, "an integer, 1 or more, at most 1099511627776"),
    ("exemplars", "per_octave", 0, "an integer, 1 or more"),
    ("exemplars", "sample_rows", "all", "an integer, 0 or more"),
    ("template", "sample_rows", -5, "an integer, 0 or more"),
    ("template", "positions", 0, "an integer, 1 or more"),
    ("template", "whitened_fan_in", -1, "an integer, 0 or more"),
    ("composition", "positions", 0, "an integer, 1 or more"),
    ("composition", "top", 0, "an integer, 1 or more"),
    ("redundancy", "largest", 1, "an integer, 2 or more"),
    ("redundancy", "sample_rows", -1, "an integer, 0 or more"),
    ("importance", "sample_rows", -1, "an integer, 0 or more"),
    ("labels", "prior", [0, 0, 0], PRIOR),
    ("labels", "prior", [-1, 2, 3], PRIOR),
    ("labels", "prior", [0.5, 0.5], PRIOR),
]


@pytest.mark.parametrize(("name", "parameter", "value", "expected"), WRONG)
def test_a_parameter_that_cannot_be_is_refused(
    name: str, parameter: str, value: Any, expected: str, tmp_path: Path
) -> None:
    held = tuple(value) if isinstance(value, list) else value
    with pytest.raises(JobError, match=rf"statistics\.{name}\.{parameter} = .*: expected {expected}"):
        replace(statistics()[name], **{parameter: held})
    written = f'"{value}"' if isinstance(value, str) else value
    section = "" if name == "template" else f"[statistics.{name}]\n{parameter} = {written}"
    job = small_job(tmp_path, more=section)
    if name == "template":
        job = job.model_copy(update={"statistics": {"template": {parameter: held}}})
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(JobError, match=rf"job\.toml:\d+: \[statistics\.{name}\] {parameter} = .*: expected {expected}"):
        resolve(job, store)
    assert not store.keys("")


def test_the_least_values_are_taken() -> None:
    for name, parameter, value in [
        ("exemplars", "k", 1),
        ("template", "whitened_fan_in", 0),
        ("redundancy", "largest", 2),
    ]:
        assert replace(statistics()[name], **{parameter: value}).parameters[parameter] == value


def test_a_job_can_ask_for_all_rows(tmp_path: Path) -> None:
    # an identity names the states that are stored: these are by what None has always meant, and the default's stays
    whole = replace(statistics()["redundancy"], sample_rows=None)
    job = small_job(tmp_path, more="[statistics.redundancy]\nsample_rows = 0")
    (found,) = (one for one in resolve(job, open_store(str(tmp_path / "store"))).statistics if one.name == "redundancy")
    assert found.identity == whole.identity != statistics()["redundancy"].identity
    assert sampled(found, 10**9).sample_shift == 0
    assert statistics()["redundancy"].parameters == {"sample_rows": 20_000, "sample_shift": 0, "largest": 512}


def test_a_field_that_is_declared_again_keeps_its_least_value() -> None:
    @dataclass(frozen=True)
    class Other(Weights):
        sample_rows: int | None = 50
        most: int = at_least(3, 4)

    Other(sample_rows=None)
    for wrong in ({"sample_rows": -1}, {"most": 2}):
        with pytest.raises(JobError, match="or more"):
            Other(**wrong)


def test_a_class_of_no_weight_is_never_drawn() -> None:
    uid_N = torch.arange(2000)
    for prior, allowed in [((1, 0), {0}), ((0, 3, 1, 0, 0), {1, 2}), ((0, 0, 2), {2})]:
        drawn = ClassSums(null_seed=4, prior=prior).null_label(uid_N, len(prior))
        assert set(Counter(drawn.tolist())) == allowed
    half = ClassSums(null_seed=4, prior=(1, 1, 0)).null_label(uid_N, 3)
    assert half.tolist() == (row_hash(uid_N, seed=4) >= 1 << 62).long().tolist()
