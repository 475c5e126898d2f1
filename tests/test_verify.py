"""What a committed run must be: every change to what is stored is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SpoiltObject
from pipeline.hashing import sha256
from pipeline.manifest import Coverage, Failed, Manifest, committed_runs, encode, manifest_key
from pipeline.models.base import checkpoint_key
from pipeline.query import QueryError
from pipeline.store import Store, open_store
from pipeline.verify import Report, verify_run, verify_runs
from tests.handmade import model_id, weights, write_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def check(store: Store, *, deep: bool = True) -> Report:
    (report,) = verify_runs(store, deep=deep)
    return report


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_run_as_it_was_committed_is_sound(store: Store) -> None:
    write_run(store, "run")
    report = check(store)
    assert report.problems == ()
    assert report.summary == "run run (handmade): 7 files, 134 rows, 4 cells and checkpoints: sound"
    assert report.remarks == ("digits/test: 3 of 100 rows could not be read",)


NEURONS = "runs/run/tables/neurons/part-00000.parquet"
CELL = f"states/{model_id('mlp-0')}/template-1/chunk.safetensors"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda root: flip_byte(root / NEURONS), f"{NEURONS} was changed: SHA-256 "),
        (lambda root: (root / NEURONS).write_bytes((root / NEURONS).read_bytes()[:-9]), f"{NEURONS} was changed"),
        (lambda root: (root / NEURONS).unlink(), f"{NEURONS} is missing"),
        (
            lambda root: (root / NEURONS).with_name("part-7.parquet").write_bytes(b""),
            "runs/run/tables/neurons/part-7.parquet is not in the manifest",
        ),
        (lambda root: flip_byte(root / CELL), f"{CELL} was changed"),
        (lambda root: (root / CELL).unlink(), CELL),
    ],
)
def test_every_change_is_found(store: Store, harm: Callable[[Path], None], message: str) -> None:
    write_run(store, "run")
    harm(Path(store.url))
    (problem,) = check(store).problems
    assert message in problem


def test_only_deep_reads_the_cells(store: Store) -> None:
    write_run(store, "run")
    flip_byte(Path(store.url, CELL))
    assert check(store, deep=False).problems == ()


def test_receipts_must_add_up_to_the_coverage(store: Store) -> None:
    manifest = write_run(store, "run")
    wrong = replace(manifest, coverage={"digits/test": Coverage(total=100, read=91, unreadable=2, excluded=7)})
    problems = verify_run(store, wrong).problems
    assert len(problems) == 2
    assert all("receipts say" in problem and "read=91" in problem for problem in problems)
    nowhere = replace(manifest, coverage={})
    assert all("which the manifest does not cover" in problem for problem in verify_run(store, nowhere).problems)


def test_row_counts_must_be_those_of_the_manifest(store: Store) -> None:
    manifest = write_run(store, "run")
    files = tuple(replace(file, rows=file.rows + 1) for file in manifest.files if file.table == "sites")
    (problem, *_) = verify_run(store, replace(manifest, files=files)).problems
    assert "and 4 rows, the manifest says" in problem


def changed(manifest: Manifest, **values: Any) -> Manifest:
    return replace(manifest, files=tuple(replace(file, **values) for file in manifest.files))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda one: replace(one, models=(*one.models, "ghost")), "model ghost has 0 rows in models, the manifest"),
        (lambda one: replace(one, models=one.models[1:]), "has 1 row in models, the manifest names it 0 times"),
        (lambda one: replace(one, failed=(Failed(one.models[0], "mlp-0", "x"),)), "failed by the manifest alone"),
        (lambda one: replace(one, statistics={**one.statistics, "labels": ""}), "has no receipt of labels on digits/t"),
        (lambda one: changed(one, first_model="f", last_model="f"), "has rows of models"),
    ],
)
def test_models_receipts_and_ranges_must_be_those_of_the_manifest(
    store: Store, harm: Callable[[Manifest], Manifest], message: str
) -> None:
    problems = verify_run(store, harm(write_run(store, "run"))).problems
    assert problems
    assert all(message in problem for problem in problems)


def test_a_mix_of_devices_and_failed_models_are_remarked(store: Store) -> None:
    manifest = write_run(store, "run")
    mixed = write_run(store, "mixed", devices=("cpu", "cuda"))
    remarks = verify_run(store, replace(mixed, failed=(Failed("x", "mlp-9", "diverged"),))).remarks
    assert any("1 cell on cpu, 1 cell on cuda" in remark for remark in remarks)
    assert "model mlp-9 failed: diverged" in remarks
    assert not any("different devices" in remark for remark in verify_run(store, manifest).remarks)


def test_one_run_is_checked_by_the_beginning_of_its_id(store: Store) -> None:
    write_run(store, "aa")
    write_run(store, "bb")
    assert [report.run for report in verify_runs(store, run="b")] == ["bb"]
    with pytest.raises(QueryError, match="no committed run begins with 'c'"):
        list(verify_runs(store, run="c"))


def test_a_manifest_that_is_damaged_is_reported_among_the_others(store: Store) -> None:
    manifest = write_run(store, "run")
    write_run(store, "sound")
    Path(store.url, manifest_key("run")).write_bytes(encode(manifest).replace(b'"read": 90', b'"read": 80'))
    Path(store.url, "runs/other").mkdir()
    Path(store.url, manifest_key("other")).write_bytes(encode(manifest))
    reports = {report.run: report for report in verify_runs(store, deep=True)}
    assert reports.keys() == {"run", "sound", "other"}
    assert reports["sound"].problems == ()
    assert reports["run"].summary == "run run: 1 wrong"
    assert "does not add up" in reports["run"].problems[0]
    assert reports["other"].problems == (
        "runs/other/_manifest.json is the manifest of run run; restore it, or remove it and run again",
    )
    with pytest.raises(SpoiltObject, match=r"does not add up|is the manifest of run run"):
        committed_runs(store)


def test_a_cell_of_other_weights_is_found(store: Store) -> None:
    """Every hash is right: the checkpoint was made anew between two runs, which both name the cell."""
    model = model_id("mlp-0")
    write_run(store, "run")
    Path(store.url, checkpoint_key(model)).write_bytes(b"other weights")
    write_run(store, "later", trained_anew={"mlp-0": b"other weights"})
    found = {report.run: report.problems for report in verify_runs(store, deep=True)}
    (changed,), (other,) = found["run"], found["later"]
    assert changed.startswith(f"{checkpoint_key(model)} was changed: SHA-256 {sha256(b'other weights')}")
    assert other.startswith(f"{CELL} was measured on other weights: SHA-256 {sha256(weights('mlp-0'))}, those of the")


def test_a_split_that_is_covered_was_measured(store: Store) -> None:
    manifest = write_run(store, "run")
    coverage = {**manifest.coverage, "letters/test": Coverage(total=1, read=1)}
    (problem,) = verify_run(store, replace(manifest, coverage=coverage)).problems
    assert problem == "the manifest covers letters/test, of which no model has a receipt"
