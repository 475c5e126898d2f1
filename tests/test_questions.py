"""The answers to the questions that every census answers, from tables whose numbers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.report.questions import QUESTIONS
from pipeline.store import Store, open_store
from tests.asked import opened
from tests.handmade import write_run

Row = dict[str, Any]


def answer(store: Store, name: str, **options: Any) -> list[Row]:
    """The answer to a named question, its rows by column."""
    with opened(store, **options) as con:
        return con.sql(QUESTIONS[name].sql).to_arrow_table().to_pylist()  # type: ignore[no-any-return]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


@pytest.mark.parametrize("later", [{"template_cos": 0.5}, {"split": "train"}])
@pytest.mark.parametrize("name", ["patterns", "families"])
def test_the_untrained_twin_is_that_of_the_same_run(store: Store, name: str, later: Row) -> None:
    write_run(store, "a")
    # a twin that several models share: a run of another one of them measures it on other rows, or another split
    write_run(store, "b", ("mlp-0-init",), change=later)
    rows = answer(store, name)
    assert rows == answer(store, name, run="a")
    assert [(row["before"], row["after"], row["share_raised"]) for row in rows] == [(0.25, 0.75, 1.0)] * 2
