"""The README is held to its word: its statistic keeps every law, its questions are SQL that runs."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import torch

import pipeline.sources
from pipeline import registry
from pipeline.columns import Column
from pipeline.job import load_job
from pipeline.measure import measure
from pipeline.models.base import checkpoint_key, decode_checkpoint
from pipeline.query import Connection, ask, ask_arrow, connect
from pipeline.report import questions
from pipeline.statistics.base import Statistic
from pipeline.store import Store, open_store
from tests.census import digits_file, run_inline, write_job
from tests.handmade import write_run
from tests.laws.drawn import draw
from tests.laws.laws import LAWS
from tests.laws.test_laws import NAMED

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
QUESTIONS = re.findall(r"^\| [^|]+\? \| `((?:SELECT|WITH|FROM) .*)` \|$", README, re.M)
ASKED = re.findall(r'neuron-census query "([^"]*)"', README)
NAMED_QUESTIONS = [question.sql for question in questions.QUESTIONS.values()]
MOST_LINES = 60


def block_with(constant: str) -> str:
    """The file of the README that makes the constant."""
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if f"\n{constant} = " in block]
    return found


@pytest.fixture(scope="module")
def statistic(tmp_path_factory: pytest.TempPathFactory) -> Statistic:
    """The statistic that the README adds, from a file as it stands there."""
    source = block_with("STATISTIC")
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


NPZ = """
name = "added"
[data.made]
source = "npz"
url = "made.npz"
chunk_rows = 70
measure = ["train", "test"]
[[models]]
family = "mlp"
data = "made"
hyperparameters = { widths = [6] }
training = { steps = 5 }
[statistics.response]
[statistics.labels]
"""


def test_the_source_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "npz.py").write_text(block_with("SOURCE"), encoding="utf-8")
    monkeypatch.setattr(pipeline.sources, "__path__", [*pipeline.sources.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "pipeline.sources.npz", None)  # taken out again behind the test
    monkeypatch.delitem(sys.modules, "pipeline.sources.npz")
    registry._found.cache_clear()
    try:
        random = np.random.default_rng(0)
        x, split = random.normal(size=(300, 2, 4)), random.choice(["train", "test"], 300, p=[0.8, 0.2])
        np.savez(tmp_path / "made.npz", x=x, y=x[:, 0].argmax(1), split=split)
        (tmp_path / "made.toml").write_text(NPZ)
        _, store = run_inline(load_job(tmp_path / "made.toml"), str(tmp_path / "store"))
        with closing(connect(store)) as con:
            asked = (
                "SELECT model, split, n, z_mean FROM neurons WHERE site = 'hidden0' AND model IN "
                "(SELECT model FROM models WHERE name = 'mlp-0') ORDER BY split, unit"
            )
            rows = list(ask(con, asked).rows)
        assert [row[2] for row in rows] == [int((split == row[1]).sum()) for row in rows]
        weights = decode_checkpoint(store.get(checkpoint_key(rows[0][0]))).weights
        z = x.reshape(300, 8).astype(np.float32).astype(float) @ weights["hidden0.weight"].double().numpy().T
        z += weights["hidden0.bias"].double().numpy()
        expected = np.concatenate([z[split == one].mean(0) for one in ("test", "train")])
        np.testing.assert_allclose([row[3] for row in rows], expected, rtol=1e-5, atol=1e-7)
    finally:
        registry._found.cache_clear()


LOADED = """
name = "loaded"
[data.{name}]
{data}
[[models]]
data = "{name}"
load = {{ url = "models/*", family = "mlp", arguments = {{ widths = [52, 12] }} }}
"""
DATA = {
    "one": 'source = "digits"\nmeasure = ["test", "train"]',
    "two": (
        'url = "third.parquet"\nclasses = 10\nmeasure = ["test", "train"]\n'
        'columns = { features = "image", label = "label", split = "split", shape = [1, 8, 8] }'
    ),
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Store:
    directory = tmp_path_factory.mktemp("census")
    path = write_job(directory / "job.toml")
    # naming no statistic asks for all of them; as wide as the units that the questions name
    path.write_text(path.read_text().partition("[statistics.")[0].replace("widths = [12]", "widths = [52, 12]"))
    _, store = run_inline(load_job(path), str(directory / "store"))
    # the trained one again, from a file, on two data sets: in one job they would be refused
    with closing(connect(store)) as con:
        ((trained,),) = ask(con, "SELECT model FROM models WHERE name = 'mlp-0'").rows
    (directory / "models").mkdir()
    (directory / "models" / "mlp-0.safetensors").write_bytes(store.get(checkpoint_key(trained)))
    digits_file(directory / "third.parquet", rows=range(0, 1797, 3), split="test", also="train")
    for name, data in DATA.items():
        path.write_text(LOADED.format(name=name, data=data))
        run_inline(load_job(path), str(directory / "store"))
    return store


@pytest.fixture(scope="module")
def census(filled: Store) -> Iterator[Connection]:
    with closing(connect(filled)) as con:
        yield con


def test_there_are_ten_questions() -> None:
    assert len(QUESTIONS) == 10


@pytest.mark.parametrize("sql", QUESTIONS)
def test_a_question_can_be_asked(census: Connection, sql: str) -> None:
    assert list(ask(census, sql).rows)


@pytest.mark.parametrize("sql", [sql for sql in QUESTIONS if "'mlp-0'" in sql])
def test_a_question_about_one_neuron_has_the_rows_of_one(filled: Store, census: Connection, sql: str) -> None:
    ((run, others),) = ask(
        census, "SELECT min(run) FILTER (loaded_from IS NULL), count(*) - 1 FROM models WHERE name = 'mlp-0'"
    ).rows
    assert others == len(DATA)
    with closing(connect(filled, run=run)) as con:
        assert counted(ask(census, sql).rows) == counted(ask(con, sql).rows)


@pytest.fixture(scope="module")
def apart(census: Connection) -> Iterator[Connection]:
    """The same tables, where a model on two data sets is two models."""
    with closing(duckdb.connect()) as con:
        # DuckDB finds `rows` by its name
        for (table,) in list(ask(census, "SHOW TABLES").rows):
            rows = ask_arrow(census, f'FROM "{table}"').read_all()
            names = [name for name in ("model", "control") if name in rows.column_names]
            told = ", ".join(f"{name} || '/' || data AS {name}" for name in names)
            con.execute(f'CREATE TABLE "{table}" AS SELECT * {f"REPLACE ({told})" if told else ""} FROM rows')
        yield con


def test_a_model_is_on_two_data_sets(census: Connection) -> None:
    ((neurons, joined),) = ask(
        census, "SELECT (SELECT count(*) FROM neurons), count(*) FROM neurons JOIN models USING (model)"
    ).rows
    assert joined > neurons


@pytest.mark.parametrize("sql", [*ASKED, *QUESTIONS, *NAMED_QUESTIONS])
def test_a_model_on_two_data_sets_is_counted_once_on_each(census: Connection, apart: Connection, sql: str) -> None:
    # which of equals come last is open
    every = re.sub(r" LIMIT \d+$", "", sql)
    assert counted(ask(census, every).rows) == counted(apart.sql(every).fetchall())


@pytest.mark.parametrize("sql", [ASKED[0], QUESTIONS[0]])
def test_a_model_is_compared_with_the_twin_that_its_own_run_measured(tmp_path: Path, sql: str) -> None:
    store = open_store(str(tmp_path))
    more = [Column(name, "float64", "of a test") for name in ("template_cos_se", "template_cos_other_p95")]
    judged = {"template_cos_se": 0.01, "template_cos_other_p95": 0.1}
    splits = ("test", "train")
    write_run(store, "a", change=judged, more=more, splits=splits)
    with closing(connect(store)) as con:
        before = counted(ask(con, sql).rows)
    write_run(store, "b", ("mlp-0-init",), change={**judged, "template_cos": 0.9}, more=more, splits=splits)
    with closing(connect(store)) as con:
        assert counted(ask(con, sql).rows) == before


def counted(rows: Iterable[tuple[Any, ...]]) -> Counter[tuple[str, ...]]:
    """How often each row is there, numbers to as many digits as sums in any order agree to."""
    found = Counter(tuple(f"{one:.9g}" if isinstance(one, float) else str(one) for one in row) for row in rows)
    assert found
    return found
