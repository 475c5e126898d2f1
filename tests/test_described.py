"""What patterns are called in the tables and in `show`: pixels, lags, fields and values, features of nodes, tokens."""

from __future__ import annotations

import io
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from pipeline.batch import Batch
from pipeline.described import described, meanings
from pipeline.errors import DataError
from pipeline.executor import InlineExecutor
from pipeline.flow.discover import discover
from pipeline.job import load_job
from pipeline.job_sections import Columns, DataSpec
from pipeline.loading import Loaded
from pipeline.models.base import Checkpoint
from pipeline.names import UNNAMED, Names
from pipeline.query import ask, connect
from pipeline.registry import families, sources
from pipeline.report.neuron import page
from pipeline.report.questions import QUESTIONS
from pipeline.report.words import in_words, input_name
from pipeline.run import run
from pipeline.run_models import Model
from pipeline.show import TABLES, Neuron, find
from pipeline.store import open_store
from tests.fit.data import recipe
from tests.models.build import EXAMPLES, NODES, build, disturbed, forward_inputs


def example(family: str) -> tuple[Model, Loaded]:
    """An untrained model of a family's example, with its sites."""
    module = disturbed(build(family, EXAMPLES[family].task, **EXAMPLES[family].hyperparameters))
    rows = NODES if families()[family].whole else 6
    found = discover(module, Batch(forward_inputs(family, rows=rows), torch.arange(rows)))
    model = Model("id", "name", "data", recipe(family), 0, None, None, "models[0]")
    return model, Loaded(model.origin, module, found, Checkpoint({}, {}), "", "classes")


@pytest.mark.parametrize("family", sorted(families()))
def test_every_input_of_a_family_has_a_name_or_a_place(family: str):
    model, loaded = example(family)
    for site in described(loaded.discovery, model, UNNAMED).sites:
        space = site.inputs
        assert torch.Size(space.shape).numel() == site.fan_in
        assert len(space.names) in (0, site.fan_in)
        row = {"input_names": list(space.names), "input_kind": space.kind, "input_shape": list(space.shape)}
        assert len({input_name(row, index) for index in range(site.fan_in)}) == site.fan_in


@pytest.mark.parametrize(
    ("family", "site", "expected"),
    [
        ("mlp", "classifier", "hidden0 2"),
        ("tcn", "blocks.0.conv1", "height, 2 back"),
        ("tcn", "classifier", "blocks.1 2"),
        ("cnn", "classifier", "block1.conv 0, place 2"),
        ("deepfm", "factors", "colour = red"),
        ("gcn", "layers.0", "mean weight"),
        ("gcn", "layers.1", "mean layers.0 2"),
        ("gpt", "blocks.0.down", "blocks.0.up 2"),
        ("transformer", "blocks.0.up", "residual 2"),
    ],
)
def test_names_are_the_datas_and_the_networks(family: str, site: str, expected: str):
    model, loaded = example(family)
    names = Names(("height", "age", "weight"), ("colour",), (("red", "green", "blue"),))
    (space,) = [one.inputs for one in described(loaded.discovery, model, names).sites if one.name == site]
    row = {"input_names": list(space.names), "input_kind": space.kind, "input_shape": list(space.shape)}
    index = 0 if site == "blocks.0.conv1" else 2
    assert input_name(row, index) == expected


@pytest.mark.parametrize("family", ["transformer", "gpt"])
def test_a_token_stands_out_to_the_first_block_as_it_would_alone(family: str):
    model, loaded = example(family)
    module = loaded.module
    names = Names(tokens=tuple("abcdefghijklmnopqrst"))
    rows = meanings(loaded, model, names, run="run").to_pandas()
    block = module.blocks[0]
    with torch.no_grad():
        z_VU = block.query(block.attention_norm(module.token.weight)).double()
        z_VU -= torch.tensor([site.bias_U.tolist() for site in loaded.discovery.sites if site.path == "blocks.0.query"])
    unit = rows[(rows.site == "blocks.0.query") & (rows.unit == 3)]
    for kind, order in (("greatest", z_VU[:, 3].argsort(descending=True)), ("smallest", z_VU[:, 3].argsort())):
        found = unit[unit.kind == kind]
        assert list(found.input) == [names.tokens[index] for index in order[:6]]
        np.testing.assert_allclose(found.value, z_VU[order[:6], 3], rtol=1e-4, atol=1e-6)


def test_what_sees_nothing_embedded_has_no_meanings():
    model, loaded = example("mlp")
    assert meanings(loaded, model, UNNAMED, run="run").num_rows == 0


def written(path: Path, names: str | None) -> DataSpec:
    metadata = None if names is None else {"names": names}
    fields = [pa.field("x", pa.list_(pa.float32()), metadata=metadata), pa.field("y", pa.int64())]
    rows = [pa.array([[0.5, 1.5, 2.5]] * 8, pa.list_(pa.float32())), pa.array([0, 1] * 4)]
    pq.write_table(pa.table(rows, schema=pa.schema(fields)), path)
    return DataSpec(url=str(path), columns=Columns(features="x", label="y", shape=(3,)), classes=2)


def test_a_file_names_the_numbers_of_its_lists(tmp_path: Path):
    spec = written(tmp_path / "rows.parquet", json.dumps(["a", "b", "c"]))
    assert sources()["parquet"]("rows", spec, open_store(str(tmp_path))).names.features == ("a", "b", "c")
    spec = written(tmp_path / "none.parquet", None)
    assert sources()["parquet"]("rows", spec, open_store(str(tmp_path))).names == UNNAMED
    spec = written(tmp_path / "bad.parquet", '["a", 1]')
    with pytest.raises(DataError, match=r"bad.parquet: column 'x' has `names` that are no JSON array of strings"):
        _ = sources()["parquet"]("rows", spec, open_store(str(tmp_path))).names


def test_words_say_what_weighs_most():
    site = {"input_kind": "pixels", "input_shape": [2, 2, 2]}
    table = in_words(site, {"weight": [0.0, 0.5, 0.0, 2.0, -1.0, 0.0, 0.0, 0.0]}, [])
    assert printed(table) == [
        "looks for   channel 0, row 1, column 1 +2, channel 0, row 0, column 1 +0.5",
        "and not for channel 1, row 0, column 0 −1",
    ]
    assert in_words(site, None, []) is None


def printed(renderable: object) -> list[str]:
    sink = io.StringIO()
    Console(file=sink, width=100).print(renderable)
    return [line.rstrip() for line in sink.getvalue().splitlines()]


JOB = """
name = "people"
[data.people]
source = "tabular"
url = "people.parquet"
labels = ["no", "yes"]
columns = { features = ["age"], label = "buys", split = "split" }
options = { categories = ["colour"] }
[[models]]
family = "deepfm"
data = "people"
hyperparameters = { factors = 2, widths = [4], dropout = 0.0 }
training = { steps = 200, learning_rate = 0.1 }
[statistics.response]
[statistics.template]
"""


def test_show_says_which_value_of_which_field(tmp_path: Path):
    draw = np.random.default_rng(0)
    colour = draw.choice(["red", "green", "blue"], 400)
    rows = {
        "age": draw.normal(size=400),
        "colour": colour,
        "buys": np.where(colour == "red", "yes", "no"),
        "split": draw.choice(["train", "test"], 400),
    }
    pq.write_table(pa.table(rows), tmp_path / "people.parquet")
    (tmp_path / "job.toml").write_text(JOB)
    store = open_store(str(tmp_path / "store"))
    run(load_job(tmp_path / "job.toml"), store, InlineExecutor())
    with closing(connect(store, tables=TABLES)) as con:
        found = [find(con, f"deepfm-0/deep.0/{unit}") for unit in range(4)]
        machine = find(con, "deepfm-0/factors/0")
    shown = ["\n".join(printed(page(one, width=100, colour=False))) for one in found]
    assert all("most for  " in text and "colour = " in text for text in shown)
    with closing(connect(store)) as con:
        words = list(ask(con, QUESTIONS["words"].sql).rows)
        families_ = list(ask(con, QUESTIONS["families"].sql).rows)
    assert [neuron.rpartition("/")[0] for neuron, *_ in words] == ["deepfm-0/deep.0"] * len(words)
    assert all("colour = " in looks_for and "colour = " in not_for for _, looks_for, not_for, _ in words)
    assert [(family, units) for family, units, *_ in families_] == [("deepfm", "fire"), ("deepfm", "linear")]
    # whoever likes red buys: the trained units tell it from the other colours
    ends = [one.meanings[0]["input"] for one in found if isinstance(one, Neuron)]
    ends += [one.meanings[6]["input"] for one in found if isinstance(one, Neuron) and len(one.meanings) > 6]
    assert "colour = red" in ends or "age" in ends
    assert any("colour = red" in line for line in printed(page(machine, width=100, colour=False)))
