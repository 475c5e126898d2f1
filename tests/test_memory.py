"""What measuring holds: a state per unit that the plan knows to the byte, and a peak that rows do not raise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import inf

import pytest
import torch

from benchmarks.memory import BATCH_ROWS, CLASSES, VECTORS, bytes_per_unit, network, peaks, rows_of
from pipeline import sizes
from pipeline.flow.discover import discover
from pipeline.job_sections import SiteSelection
from pipeline.origins import shape_of
from pipeline.registry import families, statistics
from pipeline.running import Running
from pipeline.sizes import sizes_of
from tests.fit.data import recipe
from tests.laws.drawn import make_site

# of all statistics together
LIMIT = 8000


def test_the_state_of_a_unit_is_below_8_kilobytes_beside_its_vectors_and_exemplars() -> None:
    found = bytes_per_unit()
    assert found.keys() == statistics().keys()
    assert sum(found[name] for name in found.keys() - {"exemplars"}) <= LIMIT


@pytest.mark.parametrize("units", [512, 2048, 4096])
def test_it_is_so_at_any_width_as_the_plan_says_before(units: int) -> None:
    # match: 2 forms × 2 signs × 97 bins × 2 counts of 4 bytes; redundancy: 12 for each of 256 pairs that begin with it
    site = make_site(torch.zeros(units, 3))
    whole = sum(one.state_bytes(site, CLASSES) for name, one in statistics().items() if name != "exemplars")
    vectors = sum(
        value.numel() * value.element_size()
        for name, one in statistics().items()
        for key, value in one.empty(site).items()
        if name != "exemplars" and key.rpartition(".")[2] in VECTORS
    )
    assert (whole - vectors) / units <= LIMIT


def test_the_plan_knows_the_bytes_of_every_state() -> None:
    model = network().eval()
    running = Running(discover(model, next(rows_of(BATCH_ROWS))), list(statistics().values()), CLASSES)
    for batch in rows_of(2 * BATCH_ROWS):
        running.add(model, batch)
    states = running.states()
    for name, statistic in statistics().items():
        for site in running.discovery.sites:
            if statistic.applies(site):
                held = sum(value.numel() * value.element_size() for value in states[name][site.name].values())
                assert held == statistic.state_bytes(site, CLASSES), (name, site.name)


@pytest.mark.parametrize(("before", "after"), [({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")])
def test_torch_may_use_large_pages_unless_told_otherwise(before: dict[str, str], after: str) -> None:
    code = "import os, pipeline; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | before
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == after


@pytest.mark.slow
def test_ten_times_the_rows_take_no_more_memory() -> None:
    few, many = peaks()
    assert many <= 1.02 * few


@pytest.mark.slow
def test_a_wide_site_is_reduced_in_little_more_than_three_of_its_states():
    # merged and judged at once, one of 2,048 × 2,048 took 26
    code = "import json; from benchmarks.reducing import peaks; print(json.dumps(peaks(2048, ['template'])))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found = json.loads(done.stdout)
    assert found["chunks"] > 10, "all blocks of the jackknife"
    assert found["peak"]["ReduceTask"] <= (400 << 20) + 3 * found["largest_cell"]


def test_what_is_known_of_states_before_a_model_is_built_is_less_than_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sizes, "WIDE", 0)
    origins = [recipe(name) for name in families()]
    every, chosen = list(statistics().values()), SiteSelection()
    known, least = (
        sizes_of(origins, every, chosen, most_bytes={shape_of(one): most for one in origins}) for most in (inf, -1.0)
    )
    for shape, size in known.items():
        assert 0 < least[shape].states <= size.states
        assert least[shape].model == size.model
        assert (least[shape].is_least, size.is_least) == (True, False)
