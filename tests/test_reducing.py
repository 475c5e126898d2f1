"""The rows of one model are the same bytes whether its sites are merged together or one by one, and parts of cells."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load

from pipeline import merging, site_parts
from pipeline.cell_parts import CellParts, Units
from pipeline.cells import CellState, Rows, cell_key, decode_cell, encode_cell
from pipeline.errors import SpoiltObject
from pipeline.hashing import sha256
from pipeline.job import Job, load_job
from pipeline.kernels.base import State
from pipeline.reduce import located
from pipeline.registry import statistics
from pipeline.sites import Site
from pipeline.sources.base import Chunk
from pipeline.statistics.base import Statistic, primitives_digest
from pipeline.store import DirectoryStore
from tests.census import run_inline, write_job
from tests.laws.drawn import make_presentations, make_site

RESPONSE = statistics()["response"]

EVERY = """
[statistics.composition]
[statistics.exemplars]
k = 3
[statistics.importance]
[statistics.labels]
[statistics.match]
[statistics.redundancy]
"""


def rows(root: Path) -> dict[str, str]:
    """SHA-256 by key of all that is stored of a run but its log."""
    files = [path for path in root.glob("runs/**/*") if path.is_file() and "log" not in path.parts]
    return {str(path.relative_to(root)): sha256(path.read_bytes()) for path in files}


def test_sites_and_units_reduced_a_few_at_a_time_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # blocks of 32 cosines with 75 units, and of 58 with 41; 64 units are permuted at once
    monkeypatch.setattr("pipeline.kernels.vectors.BLOCK_NUMBERS", 2400)
    monkeypatch.setattr("pipeline.statistics.template.PERMUTED_NUMBERS", 1)
    path = write_job(tmp_path / "job.toml")
    text = path.read_text().replace("[12]", "[75, 41]").replace(', "train"', "").replace("[statistics.template]", "")
    path.write_text(text + EVERY + "[statistics.template]\nwhitened_fan_in = 50\n")
    job, whole = load_job(path), tmp_path / "whole"
    run_inline(job, str(whole))

    read: list[str] = []
    get_range = DirectoryStore.get_range

    def noted_read(self: DirectoryStore, key: str, start: int, stop: int) -> bytes:
        read.append(key)
        return get_range(self, key, start, stop)

    monkeypatch.setattr(DirectoryStore, "get_range", noted_read)
    monkeypatch.setattr(merging, "GROUP_BYTES", 1)
    with monkeypatch.context() as at_once:
        at_once.setattr(merging.Group, "is_wide", False)
        apart = reduced_anew(job, whole, tmp_path / "apart")
        assert set(read) == {str(path.relative_to(apart)) for path in apart.glob("states/*/*/*")}
    assert rows(apart) == rows(whole)

    judged: list[int] = []
    standard_errors = site_parts.standard_errors

    def noted_units(statistic: Statistic, site: Site, *rest: Any) -> dict[str, torch.Tensor]:
        judged.append(site.units)
        return standard_errors(statistic, site, *rest)

    monkeypatch.setattr(site_parts, "standard_errors", noted_units)
    monkeypatch.setattr(site_parts, "JUDGED_BYTES", 1)
    monkeypatch.setattr(site_parts, "MADE_BYTES", 1)
    assert rows(reduced_anew(job, whole, tmp_path / "parts")) == rows(whole)
    assert {16, 11, 9} <= set(judged), "parts, and the rest of 75 and of 41 units"


def reduced_anew(job: Job, whole: Path, other: Path) -> Path:
    """A run with the states of another, which is still to be reduced."""
    shutil.copytree(whole, other, ignore=shutil.ignore_patterns("runs"))
    run_inline(job, str(other))
    return other


def stored_chunks(store: DirectoryStore, sites: list[Site]) -> tuple[list[Chunk], list[dict[str, State]]]:
    """Thirty chunks of uneven sizes with their cells, and the states in these."""
    draws, asked = np.random.default_rng(0), primitives_digest(RESPONSE, sites)
    chunks = [Chunk(str(index), "d", "s", "u", "f", 0, 1, 5 + index % 4, 0, 0) for index in range(30)]
    states = []
    for chunk in chunks:
        x = draws.normal(10 * draws.normal(), 10.0 ** draws.integers(-2, 2), (chunk.rows, 3))
        states.append({site.name: RESPONSE.observe(make_presentations(site, x, dtype=torch.float64)) for site in sites})
        content = encode_cell(CellState(states[-1], Rows(chunk.rows, chunk.rows), {"right": 1.0}, "cpu", "w", asked))
        store.put_once(cell_key("m", "response", chunk.id), content)
    return chunks, states


@pytest.mark.parametrize("at_once", [1, 2])
def test_cells_are_merged_in_the_order_of_the_plan_and_those_of_a_block_too(tmp_path: Path, at_once: int):
    store, sites = DirectoryStore(str(tmp_path)), [replace(make_site(np.eye(3)), name=name) for name in ("a", "b")]
    chunks, states = stored_chunks(store, sites)
    cells = merging.Cells("m", "w", RESPONSE, "response", chunks)
    for part in (sites[start : start + at_once] for start in range(0, 2, at_once)):
        found = merging.merged(cells, part, store, every=sites, is_first=True)
        assert [rows for _, rows in found.blocks] == [
            sum(one.rows for one in chunks[k : k + 3]) for k in range(0, 30, 3)
        ]
        assert len(found.scores) == len(found.receipts) == 30
        for site in part:
            seen, in_order = [state[site.name] for state in states], partial(reduce, partial(RESPONSE.merge, site))
            expect_bits(found.states[site.name], in_order([RESPONSE.empty(site), *seen]))
            for number, block in enumerate(found.blocks_of(site)):
                expect_bits(block.state, in_order(seen[3 * number : 3 * number + 3]))


def test_a_cell_of_other_sites_or_weights_is_refused(tmp_path: Path):
    store, sites = DirectoryStore(str(tmp_path)), [replace(make_site(np.eye(3)), name=name) for name in ("a", "b")]
    cells = merging.Cells("m", "w", RESPONSE, "response", stored_chunks(store, sites)[0])
    for part in (sites[:1], []):
        with pytest.raises(SpoiltObject, match="holds other sites than the model has"):
            merging.merged(cells, part, store, every=sites[:1], is_first=True)
    with pytest.raises(SpoiltObject, match="was measured on other weights"):
        merging.merged(replace(cells, checkpoint="other"), sites, store, every=sites, is_first=True)


def test_an_exemplar_is_in_the_file_and_row_that_its_uid_counts_to():
    base = (1 << 63) - 3  # uids wrap at 2⁶³, within the second chunk
    chunks = [
        Chunk("0", "d", "s", "one", "f", 0, 1, 2, 0, base),
        Chunk("1", "d", "s", "one", "f", 1, 2, 4, 2, base),
        Chunk("2", "d", "s", "two", "g", 0, 1, 3, 5, 100),
        Chunk("3", "d", "s", "named", "h", 0, 1, 9, 0, None),
    ]
    uid = [*[(base + row) & (1 << 63) - 1 for row in range(7)], *range(104, 109), 99]
    empty = {"file": pa.nulls(len(uid), pa.string()), "row": pa.nulls(len(uid), pa.int64())}
    found = located(pa.table({"uid": uid, **empty}), chunks).to_pylist()
    ones, twos = [("one", row) for row in range(6)], [("two", row) for row in range(5, 8)]
    none = (None, None)
    assert [(one["file"], one["row"]) for one in found] == [*ones, none, none, *twos, none, none]


def expect_bits(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def cell() -> CellState:
    """Of sites with names that begin alike, tensors of several types, none and empty ones."""
    states = {
        "a": {"z.n": torch.arange(5), "z.mean": torch.rand(5, dtype=torch.float64), "b.count": torch.ones(5, 3).int()},
        "a.b": {"z.n": torch.arange(7), "z.mean": torch.rand(7, dtype=torch.float64), "k": torch.zeros(0, 2).long()},
        "a|b": {"z.n": torch.tensor(3), "seen": torch.tensor([True, False, True])},
        "c": {},
    }
    return CellState(states, Rows(9, 9), {"right": 2.0}, "cpu", "0" * 64)


@pytest.mark.parametrize("sites", [["a"], ["a.b", "c"], ["a|b", "a"], [], ["a", "a.b", "a|b", "c"]])
@pytest.mark.parametrize("header_bytes", [8, 100, 1 << 18])
def test_a_part_of_a_cell_is_a_cell_of_some_sites(sites: list[str], header_bytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.cell_parts.HEADER_BYTES", header_bytes)
    whole = cell()
    content = encode_cell(whole)
    read: list[int] = []

    def ranged(start: int, stop: int) -> bytes:
        assert start < len(content), "a bucket refuses it"
        read.append(stop - start)
        return content[start:stop]

    parts = CellParts.opened(ranged, key="k")
    opened = len(read)
    found = decode_cell(parts.of(dict.fromkeys(sites)))
    assert len(read) - opened <= 3, "what lies end to end is read at once"
    assert (found.rows, found.scores, found.checkpoint) == (whole.rows, whole.scores, whole.checkpoint)
    assert found.states.keys() == whole.states.keys()
    for site, state in whole.states.items():
        assert found.states[site].keys() == (state.keys() if site in sites else set())
        assert all(torch.equal(value, state[name]) for name, value in found.states[site].items())
    assert load(parts.of(dict.fromkeys(sites))).keys() == {
        "|",
        *(f"{site}|{name}" for site in sites for name in whole.states[site]),
    }
    monkeypatch.setattr("pipeline.cell_parts.HASHED_BYTES", 64)
    assert (parts.size, parts.sha256()) == (len(content), sha256(content))


@pytest.mark.parametrize("gap", [0, 1 << 16])
@pytest.mark.parametrize(("first", "stop"), [(0, 5), (0, 2), (1, 4), (4, 5)])
def test_a_part_of_a_cell_has_the_rows_of_some_units(gap: int, first: int, stop: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.cell_parts.GAP_BYTES", gap)
    whole = cell()
    content = encode_cell(whole)
    parts = CellParts.opened(lambda start, stop: content[start:stop], key="k")
    found = decode_cell(parts.of({"a": Units(first, stop, 5), "a|b": Units(0, 1, 1), "a.b": None})).states
    # of another number of rows than the site has units, or of no axis
    kept = {"a|b": whole.states["a|b"], "a.b": whole.states["a.b"]}
    wanted = {"a": {name: value[first:stop] for name, value in whole.states["a"].items()}, "c": {}, **kept}
    assert found.keys() == wanted.keys()
    for site, state in wanted.items():
        assert found[site].keys() == state.keys()
        assert all(torch.equal(found[site][name], value) for name, value in state.items())


def test_a_damaged_cell_is_said_to_be(tmp_path: Path):
    content = encode_cell(cell())
    with pytest.raises(SpoiltObject, match="k is damaged"):
        CellParts.opened(lambda start, stop: b"nonsense" * 9, key="k")
    for other in (content[:-1], content + b"1"):
        with pytest.raises(SpoiltObject, match=r"k is damaged .* bytes read"):
            CellParts.opened(lambda start, stop, other=other: other[start:stop], key="k").sha256()  # type: ignore[misc]
