"""A chunk's id stands for its rows: states of others would be taken for theirs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ContractError
from pipeline.registry import sources
from pipeline.resolve import resolve
from pipeline.sources.base import Chunk, Source
from pipeline.store import open_store
from tests.census import small_job


@pytest.mark.parametrize(
    ("decided_by", "said"),
    [
        (["file_id"], r"'train' of .*, groups 0 to 3 and for 'train' of .*, groups 4 to 7: expected a digest of all"),
        (
            ["start"],
            r"'train' of .*/train-0-.*, groups 0 to 3 and for 'train' of .*/train-1-.*, groups 0 to 3: expected",
        ),
    ],
)
def test_an_id_stands_for_one_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decided_by: list[str], said: str
) -> None:
    digits = sources()["digits"]
    chunks = digits.chunks

    def of_too_little(source: Source, split: str) -> tuple[Chunk, ...]:
        return tuple(
            replace(chunk, id="-".join(str(getattr(chunk, name)) for name in decided_by))
            for chunk in chunks(source, split)
        )

    monkeypatch.setattr(digits, "chunks", of_too_little)
    with pytest.raises(ContractError, match=rf"^pipeline/sources/digits.py: chunks\(\): id \S+ stands for {said}"):
        resolve(small_job(tmp_path), open_store(str(tmp_path / "store")))
