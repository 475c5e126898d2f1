"""Token sequences: stated tokenizers, padded or packed, no token lost or made up, and every row in the ledger."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch import Batch
from pipeline.errors import DataError, JobError
from pipeline.job_sections import Columns, DataSpec
from pipeline.rows.reading import Reading
from pipeline.sources.tokens import Tokens
from pipeline.store import open_store


def tokens(url: Path, length: int = 6, *, columns: Columns | None = None, **options: Any) -> Tokens:
    columns = columns or Columns(features="text", shape=(length,))
    spec = DataSpec(url=str(url), columns=columns, classes=2, options=options, max_unreadable=0.5)
    return Tokens("rows", spec, open_store(str(url.parent / "store")))


def write(path: Path, rows: list[Any], kind: pa.DataType | None = None, **columns: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(rows, kind), **columns}), path, row_group_size=4)
    return path


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["a b", "b c"], split=["train", "test"])
    columns = Columns(features="text", shape=(9,), split="spilt")
    spec = DataSpec(url=str(path), columns=columns, options={"tokenizer": "words"})
    with pytest.raises(DataError, match=r"a\.parquet: there is no column 'spilt'; did you mean 'split'"):
        Tokens("t", spec, open_store(str(tmp_path / "store"))).chunks("train")


def read(source: Tokens, split: str = "all", batch_rows: int = 3) -> tuple[list[Batch], Reading]:
    (chunk,) = source.chunks(split)
    reading = source.read(chunk, batch_rows)
    return list(reading), reading


def real(batches: list[Batch]) -> list[list[int]]:
    """The real tokens of each row; what is behind them is zero."""
    rows = []
    for batch in batches:
        assert batch.mask_NS is batch.kwargs["mask"]
        for token_T, mask_T in zip(batch.inputs[0], batch.kwargs["mask"], strict=True):
            assert not token_T[~mask_T].any()
            assert mask_T.sort(descending=True)[0].equal(mask_T)
            rows.append(token_T[mask_T].tolist())
    return rows


TEXTS = st.lists(st.text(max_size=12), min_size=1, max_size=9)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(TEXTS)
def test_bytes_are_those_of_the_text_up_to_the_length(tmp_path_factory: pytest.TempPathFactory, texts: list[str]):
    path = write(tmp_path_factory.mktemp("rows") / "data" / "a.parquet", [*texts, "x"], pa.string())
    source = tokens(path)
    source.spec = source.spec.model_copy(update={"max_unreadable": 1.0})
    batches, reading = read(source)
    assert real(batches) == [list(text.encode())[:6] for text in [*texts, "x"] if text]
    assert reading.unreadable == sum(not text for text in texts)
    assert source.vocabulary == 257


@settings(max_examples=30, deadline=None, derandomize=True)
@given(TEXTS, st.integers(1, 7), st.integers(1, 4))
def test_packing_loses_and_makes_up_no_token(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], length: int, batch_rows: int
):
    path = write(tmp_path_factory.mktemp("rows") / "data" / "a.parquet", [*texts, "x"], pa.string())
    source = tokens(path, length, packed=True)
    source.spec = source.spec.model_copy(update={"max_unreadable": 1.0})
    batches, reading = read(source, batch_rows=batch_rows)
    windows = real(batches)
    assert list(chain.from_iterable(windows)) == list(
        chain.from_iterable([*text.encode(), 256] for text in [*texts, "x"] if text)
    )
    assert {len(window) for window in windows[:-1]} <= {length}
    uids = torch.cat([batch.uid_N for batch in batches]).tolist()
    assert len(set(uids)) == len(windows)
    assert min(uids) >= 0
    assert reading.read + reading.unreadable == len(texts) + 1


def test_words_are_numbered_by_how_often_training_has_them(tmp_path: Path):
    train = ["The cat, the DOG!", "the cat's Øre_1", None, "a cat"]
    test = ["the øre_1 CAT , wolf", " \n "]
    path = write(tmp_path / "data" / "a.parquet", [*train, *test], split=["train"] * 4 + ["test"] * 2)
    columns = Columns(features="text", shape=(9,), split="split")
    source = tokens(path, columns=columns, tokenizer="words", min_count=1)
    counts: dict[str, int] = {}
    for text in train:
        for word in re.findall(r"\w+|[^\w\s]", (text or "").lower()):
            counts[word] = counts.get(word, 0) + 1
    order = sorted(counts, key=lambda word: (-counts[word], word))
    assert source.vocabulary == len(order) + 2
    batches, reading = read(source, "test")
    assert real(batches) == [[2 + order.index(w) if w in order else 0 for w in ("the", "øre_1", "cat", ",", "wolf")]]
    assert [one.reason for one in reading.damage] == ["it has no token"]
    few = tokens(path, columns=columns, tokenizer="words", min_count=1, vocabulary=4)
    assert (few.vocabulary, real(read(few, "test")[0])) == (4, [[3, 0, 2, 0, 0]])


def test_words_of_what_is_no_text_are_in_the_ledger(tmp_path: Path):
    text = pa.array([b"a b", b"caf\xe9 b", b"b a"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "rows.parquet")
    source = tokens(tmp_path / "rows.parquet", tokenizer="words", min_count=1)
    batches, reading = read(source)
    assert real(batches) == [[2, 3], [3, 2]]
    assert [(one.first_row, one.reason) for one in reading.damage] == [(1, "its text is not UTF-8")]


def test_reading_does_not_change_what_it_is(tmp_path: Path):
    source = tokens(write(tmp_path / "rows.parquet", ["a b", "b c a", "a"]), tokenizer="words", min_count=1)
    before = source.features().identity
    planned = [chunk.id for chunk in source.chunks("all")]
    read(source)
    assert source.features().identity == before
    assert [chunk.id for chunk in source.chunks("all")] == planned


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.uint8())], ids=str)
def test_given_numbers_stay_what_they_are(tmp_path: Path, kind: pa.DataType):
    path = write(tmp_path / "data" / "a.parquet", [[0, 9], [3] * 8, None, [4]], kind, y=[0, 1, 0, 1])
    columns = Columns(features="text", shape=(6,), label="y")
    source = tokens(path, columns=columns, tokenizer="ids", vocabulary=10)
    batches, reading = read(source)
    assert real(batches) == [[0, 9], [3] * 6, [4]]
    assert torch.cat([batch.label_N for batch in batches if batch.label_N is not None]).tolist() == [0, 1, 1]
    assert reading.unreadable == 1
    assert real(read(tokens(path, tokenizer="ids", vocabulary=10, packed=True))[0]) == [
        [0, 9, 3, 3, 3, 3],
        [3] * 4 + [4],
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_numbers_that_are_no_token_are_refused(tmp_path: Path, packed: bool):
    path = write(tmp_path / "data" / "a.parquet", [[0, 9], [], None, [3, 10], [1]])
    with pytest.raises(DataError, match=r"a\.parquet, row 3: token 10: expected 0 to 9"):
        read(tokens(path, tokenizer="ids", vocabulary=10, packed=packed))


def test_numbers_beyond_int64_are_no_tokens(tmp_path: Path):
    path = write(tmp_path / "data" / "a.parquet", [[0, 9], [1, 2**63 + 3]], pa.list_(pa.uint64()))
    with pytest.raises(DataError, match=r"a\.parquet, row 1: token 9223372036854775811: expected 0 to 9"):
        read(tokens(path, tokenizer="ids", vocabulary=10))


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"shape": (4,), "label": "y"}, {"packed": True}, r"columns\.label: a window of packed documents has no label"),
        ({"shape": (4, 4)}, {}, r"columns\.shape: expected the number of tokens"),
        ({"shape": (4,)}, {"tokenizer": "ids"}, r"options\.vocabulary: missing; expected how many"),
        (
            {"shape": (4,)},
            {"tokenizer": "letters"},
            r"options\.tokenizer = \"letters\": expected 'bytes', 'words' or 'ids'$",
        ),
    ],
)
def test_what_the_job_gets_wrong_is_named(tmp_path: Path, columns: dict, options: dict[str, Any], message: str):
    path = write(tmp_path / "data" / "a.parquet", ["a"], y=[0])
    with pytest.raises(JobError, match=message):
        tokens(path, columns=Columns(features="text", **columns), **options).chunks("all")
