"""Texts become rows of bytes in one pass: the same bytes with and without a compiler, whatever Arrow keeps them in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import pipeline.rows.ragged
import pipeline.rows.texts
from pipeline.rows.native import library
from pipeline.rows.ragged import Mask
from pipeline.rows.texts import texts
from tests.test_sources_tokens import Columns, read, real, tokens

KINDS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()]
ROWS = ["", "a", None, "grüße", "abcdef", "longer than six", "", None, "日本語", "z\0y"]
POSITIONS = 6


@pytest.fixture(params=[True, False], ids=["compiled", "not compiled"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        assert library() is not None
        return
    for module in (pipeline.rows.ragged, pipeline.rows.texts):
        monkeypatch.setattr(module, "library", lambda: None)


def written(column: pa.Array, start: int, stop: int) -> tuple[list[bytes], list[list[bool]]]:
    """Tokens and masks of some rows, in memory that was full of something else; what is around them stays."""
    found = texts(column)
    both = torch.full((stop - start + 2, POSITIONS), 7, dtype=torch.uint8), torch.ones(stop - start + 2, POSITIONS)
    token_NT, mask_NT = both[0], both[1].bool()
    found.write(token_NT, at=1, start=start, stop=stop)
    Mask(found.length_N).write(mask_NT, at=1, start=start, stop=stop)
    assert (token_NT[[0, -1]] == 7).all()
    assert mask_NT[[0, -1]].all()
    return [bytes(row.numpy()) for row in token_NT[1:-1]], mask_NT[1:-1].tolist()


def expected(rows: list[str | None]) -> tuple[list[bytes], list[list[bool]]]:
    kept = [(row or "").encode()[:POSITIONS] for row in rows]
    return [one.ljust(POSITIONS, b"\0") for one in kept], [[p < len(one) for p in range(POSITIONS)] for one in kept]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.usefixtures("compiled")
def test_bytes_are_cut_and_filled_up(kind: pa.DataType):
    column = pa.array(ROWS, pa.string()).cast(kind)
    assert written(column, 0, len(ROWS)) == expected(ROWS)
    assert written(column, 2, 7) == expected(ROWS[2:7])
    # Arrow's slices share the memory of the whole
    assert written(column.slice(3, 6), 0, 6) == expected(ROWS[3:9])
    assert written(column.slice(3, 6), 1, 3) == expected(ROWS[4:6])
    assert texts(column.slice(2, 0)).length_N.tolist() == []
    assert texts(pa.nulls(3, kind)).length_N.tolist() == [0, 0, 0]


@pytest.mark.usefixtures("compiled")
def test_what_lies_behind_a_null_is_no_text():
    offsets, content = np.array([0, 2, 5, 6], dtype=np.int32), b"abxxxc"
    buffers = [pa.py_buffer(bytes([0b101])), pa.py_buffer(offsets), pa.py_buffer(content)]
    assert written(pa.Array.from_buffers(pa.string(), 3, buffers), 0, 3) == expected(["ab", None, "c"])


@pytest.mark.usefixtures("compiled")
def test_lengths_that_four_bytes_do_not_hold_fill_their_mask():
    mask_NT = torch.zeros(3, 4, dtype=torch.bool)
    Mask(np.array([2**32 + 1, 2**31, 2])).write(mask_NT, at=0, start=0, stop=3)
    assert mask_NT.sum(1).tolist() == [4, 4, 2]


@pytest.mark.usefixtures("compiled")
def test_bytes_that_are_no_utf8_stay_what_they_are(tmp_path: Path):
    content = [b"\xff\xfe", b"a\x80", b"\xc3"]
    path = tmp_path / "data" / "a.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"text": pa.array(content, pa.binary()).view(pa.string())}), path)
    assert real(read(tokens(path))[0]) == [list(one) for one in content]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.usefixtures("compiled")
def test_batches_cross_row_groups_and_leave_out_rows_of_other_splits(tmp_path: Path, kind: pa.DataType):
    draw = np.random.default_rng(0)
    rows = [None if n == 9 else "".join(draw.choice(list("aé日 "), n)) for n in draw.integers(0, 10, 90)]
    split = draw.choice(["train", "test"], len(rows)).tolist()
    path = tmp_path / "data" / "a.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"text": pa.array(rows).cast(kind), "split": split}), path, row_group_size=13)
    batches, reading = read(
        tokens(path, columns=Columns(features="text", shape=(POSITIONS,), split="split")), "test", 8
    )
    wanted = [row for row, one in zip(rows, split, strict=True) if one == "test"]
    assert real(batches) == [list(row.encode())[:POSITIONS] for row in wanted if row]
    assert {batch.rows for batch in batches[:-1]} == {8}
    assert {batch.inputs[0].dtype for batch in batches} == {torch.uint8}
    assert reading.unreadable == sum(not row for row in wanted)
    assert (reading.excluded, reading.read + reading.unreadable) == (split.count("train"), len(wanted))


@pytest.mark.usefixtures("compiled")
def test_a_row_whose_labels_do_not_fit_takes_its_text_with_it(tmp_path: Path):
    path = tmp_path / "data" / "a.parquet"
    path.parent.mkdir()
    labels = [[0, 1], [1], [1], [0, 0, 1]]
    pq.write_table(pa.table({"text": ["ab", "cd", "e", "fgh"], "y": labels}), path)
    batches, reading = read(tokens(path, columns=Columns(features="text", shape=(POSITIONS,), label="y")))
    assert real(batches) == [list(b"ab"), list(b"e"), list(b"fgh")]
    assert [one.reason for one in reading.damage] == ["1 labels for 2 positions"]
