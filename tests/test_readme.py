"""The README is held to its word: its statistic keeps every law, its questions are SQL that runs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.job import load_job
from pipeline.measure import measure
from pipeline.query import Connection, ask, connect
from pipeline.statistics.base import Statistic
from tests.census import run_inline, write_job
from tests.laws.drawn import draw
from tests.laws.laws import LAWS
from tests.laws.test_laws import NAMED

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
QUESTIONS = re.findall(r"^\| [^|]+\? \| `((?:SELECT|WITH|FROM) .*)` \|$", README, re.M)
MOST_LINES = 60


@pytest.fixture(scope="module")
def statistic(tmp_path_factory: pytest.TempPathFactory) -> Statistic:
    """The statistic that the README adds, from a file as it stands there."""
    (source,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "STATISTIC = " in block]
    assert len(source.splitlines()) <= MOST_LINES
    path = tmp_path_factory.mktemp("added") / "variation.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("pipeline.statistics.variation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.STATISTIC  # type: ignore[no-any-return]


@pytest.mark.parametrize("law", sorted(LAWS))
def test_the_statistic_keeps_the_laws(statistic: Statistic, law: str) -> None:
    for recipe in NAMED.values():
        shown = draw(recipe)
        LAWS[law](statistic, shown, np.random.default_rng(recipe.seed))


def test_the_statistic_is_measured(statistic: Statistic) -> None:
    layer = torch.nn.Linear(3, 2)
    x = torch.randn(20, 3)
    found = measure(layer, x.split(8), statistics=[statistic])["neurons"]["variation"].to_numpy()
    z = layer(x).detach().double().numpy()
    np.testing.assert_allclose(found, z.std(0) / np.abs(z).mean(0), rtol=1e-6)


@pytest.fixture(scope="module")
def census(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    directory = tmp_path_factory.mktemp("census")
    path = write_job(directory / "job.toml")
    # naming no statistic asks for all of them; as wide as the units that the questions name
    path.write_text(path.read_text().partition("[statistics.")[0].replace("widths = [12]", "widths = [52, 12]"))
    _, store = run_inline(load_job(path), str(directory / "store"))
    with closing(connect(store)) as con:
        yield con


def test_there_are_ten_questions() -> None:
    assert len(QUESTIONS) == 10


@pytest.mark.parametrize("sql", QUESTIONS)
def test_a_question_can_be_asked(census: Connection, sql: str) -> None:
    assert list(ask(census, sql).rows)
