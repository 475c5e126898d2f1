"""The manifest: canonical, complete, refused when damaged; the ledger of rows adds up or nothing is committed."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import StoreError
from pipeline.manifest import (
    Coverage,
    Failed,
    File,
    Manifest,
    commits,
    committed_runs,
    decode,
    encode,
    manifest_key,
    versions,
)
from pipeline.store import open_store

MANIFEST = Manifest(
    run="r1",
    name="digits",
    job={"seed": 0, "data": {"digits": {"source": "digits"}}},
    models=("a", "b"),
    failed=(Failed("b", "mlp-1", "diverged: loss ∞"),),
    coverage={"digits/test": Coverage(total=10, read=7, unreadable=1, excluded=2)},
    versions=versions(),
    statistics={"response": "response-0123"},
    files=(File("neurons", "runs/r1/tables/neurons/part-00000.parquet", "ab" * 32, 100, 5, "a", "b"),),
)


def test_it_is_read_back_as_it_was():
    assert decode(encode(MANIFEST)) == MANIFEST


def test_the_order_in_which_it_was_made_does_not_show():
    coverage = {"z": Coverage(1, 1), "a": Coverage(2, 2)}
    one = dataclasses.replace(MANIFEST, coverage=coverage)
    other = dataclasses.replace(MANIFEST, coverage=dict(reversed(coverage.items())))
    assert encode(one) == encode(other)


def test_nothing_in_it_tells_one_driver_from_another():
    fields = {field.name for field in dataclasses.fields(Manifest)}
    assert not fields & {"time", "created", "host", "pid", "user", "seconds"}
    assert encode(MANIFEST) == encode(dataclasses.replace(MANIFEST))


def test_files_are_found_by_table():
    assert MANIFEST.files_of("neurons") == MANIFEST.files
    assert MANIFEST.files_of("sites") == ()


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 150))
def test_the_ledger_adds_up_or_is_refused(read: int, unreadable: int, excluded: int, total: int):
    if read + unreadable + excluded == total:
        assert Coverage(total, read, unreadable, excluded).accounted == total
    else:
        with pytest.raises(StoreError, match="does not add up"):
            Coverage(total, read, unreadable, excluded)


def test_a_negative_count_never_balances():
    with pytest.raises(StoreError, match="does not add up"):
        Coverage(total=1, read=2, unreadable=-1)


def test_models_must_agree_on_the_rows_they_saw():
    seen = Coverage(10, 8, 0, 2)
    assert Coverage.agreed("digits/test", [seen, seen], total=10) == seen
    with pytest.raises(StoreError, match=r"digits/test \(10 rows\) differ between models"):
        Coverage.agreed("digits/test", [seen, Coverage(10, 7, 1, 2)], total=10)
    with pytest.raises(StoreError, match="differ"):
        Coverage.agreed("digits/test", [seen, seen], total=11)


def damaged() -> list[bytes]:
    content = encode(MANIFEST)
    value = json.loads(content)
    unbalanced = {**value, "coverage": {"digits/test": {"total": 3, "read": 1, "unreadable": 0, "excluded": 0}}}
    return [
        b"",
        content[:-20],
        b"[]",
        json.dumps({**value, "surprise": 1}).encode(),
        json.dumps({key: value[key] for key in value if key != "files"}).encode(),
        json.dumps(unbalanced).encode(),
        b"\xff\xfe",
    ]


@pytest.mark.parametrize("content", damaged())
def test_a_damaged_one_is_refused(content: bytes):
    with pytest.raises(StoreError, match=r"is damaged|does not add up"):
        decode(content, key="runs/r1/_manifest.json")


def test_one_of_a_newer_format_is_refused():
    content = encode(dataclasses.replace(MANIFEST, format=2))
    with pytest.raises(StoreError, match="format 2, newer than 1: update"):
        decode(content)


def test_committed_runs_are_those_with_a_manifest(tmp_path: Path):
    store = open_store(str(tmp_path))
    assert committed_runs(store) == []
    for run in ("r2", "r1"):
        store.put_once(manifest_key(run), encode(dataclasses.replace(MANIFEST, run=run)))
    store.put_once("runs/open/tables/neurons/part-00000.parquet", b"not yet")
    store.put_once("runs/open/log/_manifest.json", b"not one")
    found = committed_runs(store)
    assert [manifest.run for manifest, _ in found] == ["r2", "r1"]
    assert found[0][1] <= found[1][1]


def test_rows_of_models_are_not_gone_through_to_know_what_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = open_store(str(tmp_path))
    store.put_once(manifest_key("r1"), encode(dataclasses.replace(MANIFEST, run="r1")))
    store.put_once("runs/r1/reduced/m1/neurons.arrow.zst", b"rows")
    store.put_once("runs/r2/reduced/m1/neurons.arrow.zst", b"rows")
    walk, seen = os.walk, []

    def noted(*args: Any, **named: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for one in walk(*args, **named):
            seen.append(Path(one[0]).relative_to(tmp_path).as_posix())
            yield one

    monkeypatch.setattr("os.walk", noted)
    assert list(commits(store)) == ["r1"]
    assert sorted(seen) == ["runs/r1", "runs/r2"]
    assert store.keys("runs/r1/red") == ["runs/r1/reduced/m1/neurons.arrow.zst"]
    assert len(store.keys("runs/")) == 3
    assert len(store.keys()) == 3
