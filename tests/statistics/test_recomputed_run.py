"""A real run, from job to query, against every column recomputed from its checkpoints, and its errors by leaving out.

The data are made to be awkward: a file with row groups of one row, chunks and batches of one row, a row of NaN, rows
without a label, other splits' rows in between, names in no order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.executor import InlineExecutor
from pipeline.job import load_job
from pipeline.measure import measure
from pipeline.models.base import checkpoint_key, decode_checkpoint
from pipeline.query import connect
from pipeline.registry import statistics
from pipeline.resolve import resolve
from pipeline.run import run
from pipeline.run_models import Model
from pipeline.store import Store, open_store
from tests.statistics.recompute.check import OF_UNITS, check
from tests.statistics.test_recomputed import folded, listen, raw_of, together, weights, windows

BATCH_ROWS = 5
JOB = """
name = "awkward"
[numerics]
batch_rows = 5
[data.squares]
url = "data/*.parquet"
classes = 3
measure = ["test"]
chunk_rows = 7
[data.squares.columns]
features = "image"
label = "label"
key = "name"
split = "split"
shape = [1, 4, 4]
[[models]]
family = "mlp"
data = "squares"
hyperparameters = { widths = [6] }
training = { steps = 20 }
[[models]]
family = "cnn"
data = "squares"
hyperparameters = { widths = [4] }
training = { steps = 5 }
"""


@dataclass
class Awkward:
    """A finished run, and the batches that its models were shown, chunk by chunk."""

    store: Store
    models: Mapping[str, Model]
    chunks: list[list[Batch]]
    tables: Mapping[str, Mapping[str, pa.Table]]

    @property
    def batches(self) -> list[Batch]:
        return [batch for chunk in self.chunks for batch in chunk]

    def module(self, name: str) -> nn.Module:
        model = self.models[name]
        module = model.origin.build()
        module.load_state_dict(decode_checkpoint(self.store.get(checkpoint_key(model.id))).weights)
        return module.eval()


def write(path: Path, random: np.random.Generator, *, rows: int, group: int, first: int) -> pa.Table:
    image = random.integers(-2, 3, (rows, 16)).astype(np.float32) / 2
    if first == 0:
        image[7] = np.nan
        image[20:25] = image[30:35]
    table = pa.table(
        {
            "image": list(image),
            "label": random.choice([-1, 0, 1, 2], rows, p=[0.1, 0.4, 0.4, 0.1]),
            "name": (first + random.permutation(rows)) * 1_000_003,
            "split": random.choice(["test", "train"], rows, p=[0.8, 0.2]) if group > 1 else ["test"] * rows,
        }
    )
    pq.write_table(table, path, row_group_size=group)
    return table


def chunked(table: pa.Table, sizes: list[int]) -> list[list[Batch]]:
    """What the run reads: rows of the split, in batches that begin anew at each chunk."""
    found, start = [], 0
    for size in sizes:
        rows = [row for row in table.slice(start, size).to_pylist() if row["split"] == "test"]
        start += size
        parts = [rows[at : at + BATCH_ROWS] for at in range(0, len(rows), BATCH_ROWS)]
        found.append(
            [
                Batch(
                    (torch.tensor([row["image"] for row in part]).reshape(-1, 1, 4, 4),),
                    torch.tensor([row["name"] for row in part]),
                    torch.tensor([row["label"] for row in part]),
                )
                for part in parts
            ]
        )
    return found


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Awkward:
    directory = tmp_path_factory.mktemp("awkward")
    random = np.random.default_rng(0)
    (directory / "data").mkdir()
    first = write(directory / "data" / "a.parquet", random, rows=64, group=7, first=0)
    second = write(directory / "data" / "b.parquet", random, rows=3, group=1, first=1000)
    (directory / "job.toml").write_text(JOB)
    job, store = load_job(directory / "job.toml"), open_store(str(directory / "store"))
    assert run(job, store, InlineExecutor()).run
    models = {model.name: model for model in resolve(job, store).models}
    con = connect(store)
    tables = {
        name: {table: con.sql(f"FROM {table} WHERE model = '{model.id}'").to_arrow_table() for table in OF_UNITS}
        for name, model in models.items()
    }
    # row groups of 7 rows, and the three rows of the other file: eleven chunks, one more than errors have blocks
    chunks = [*chunked(first, [7] * 9 + [1]), *chunked(second, [3])]
    return Awkward(store, models, chunks, tables)


def test_a_run_of_a_multilayer_perceptron(awkward: Awkward) -> None:
    model, twin = awkward.module("mlp-0"), awkward.module("mlp-0-init")
    where = {"hidden0": (model.hidden0, model.hidden0, model.gate0), "classifier": (model.classifier,) * 3}
    heard = listen(model, where, awkward.batches)
    for site, fields in {"hidden0": {"non_negative": True}, "classifier": {"fires": False}}.items():
        own = weights(model.get_submodule(site))
        raw = raw_of(awkward.batches, heard[site], **own, **fields, twin_w=weights(twin.get_submodule(site))["w"])
        check(raw, awkward.tables["mlp-0"], site)


@pytest.mark.parametrize("name", ["cnn-0", "cnn-0-init"])
def test_a_run_of_a_convolutional_network(awkward: Awkward, name: str) -> None:
    model, twin = awkward.module(name), awkward.module("cnn-0-init")
    block = model.block0
    heard = listen(model, {"block0.conv": (block.conv, block.norm, block.gate)}, awkward.batches)
    raw = raw_of(
        awkward.batches, heard["block0.conv"], **folded(block.conv, block.norm), non_negative=True,
        x=together(heard["block0.conv"][0], lambda value: windows(value, block.conv)),
        twin_w=folded(twin.block0.conv, twin.block0.norm)["w"] if name == "cnn-0" else None,
        contributors=lambda unit, number: number // 9,
    )  # fmt: skip
    check(raw, awkward.tables[name], "block0.conv")


def test_no_row_counts_twice_and_none_is_lost(awkward: Awkward) -> None:
    """Samplers that give each of 3 workers as many rows count 10 rows as 12, or drop the last batch."""
    rows = sum(batch.rows for batch in awkward.batches)
    neurons = awkward.tables["mlp-0"]["neurons"].to_pylist()
    assert {row["n"] + row["n_nonfinite"] for row in neurons} == {rows}
    assert {row["importance_rows"] for row in neurons} == {
        sum(int((batch.label_N >= 0).sum()) for batch in awkward.batches)
    }
    exemplars = awkward.tables["mlp-0"]["exemplars"].to_pylist()
    chosen = [(row["site"], row["unit"], row["kind"], row["uid"]) for row in exemplars]
    assert len(set(chosen)) == len(chosen)
    receipts = connect(awkward.store).sql("FROM receipts").to_arrow_table().to_pylist()
    assert all(row["rows"] + row["unreadable"] + row["excluded"] == row["total"] for row in receipts)
    read = {(row["model"], row["statistic"]): 0 for row in receipts}
    for row in receipts:
        read[row["model"], row["statistic"]] += row["rows"]
    assert set(read.values()) == {rows}


def test_a_model_is_scored_on_every_row_with_a_label(awkward: Awkward) -> None:
    model, made = awkward.models["mlp-0"], awkward.module("mlp-0")
    label_N = torch.cat([batch.label_N for batch in awkward.batches])
    with torch.no_grad():
        logits_NC = torch.cat([batch.forward(made) for batch in awkward.batches]).double()
    known_N = label_N >= 0
    right = (logits_NC.argmax(1) == label_N)[known_N].double().mean().item()
    loss = torch.nn.functional.cross_entropy(logits_NC[known_N], label_N[known_N]).item()
    told = connect(awkward.store).sql(f"SELECT metric, value, rows FROM scores WHERE model = '{model.id}' ORDER BY ALL")
    rows = int(known_N.sum())
    expected = [("accuracy", right, rows), ("log_loss", loss, rows)]
    for one, (metric, value, number) in zip(told.fetchall(), expected, strict=True):
        assert one == (metric, pytest.approx(value, nan_ok=True), number)


def test_standard_errors_are_those_of_leaving_chunks_out(awkward: Awkward) -> None:
    """Each block in turn left out of a whole new measurement, and Busing et al.'s formula with unequal blocks."""
    model = awkward.module("mlp-0")

    def measured(batches: list[Batch]) -> pa.Table:
        return measure(model, batches, classes=3)["neurons"].sort_by([("site", "ascending"), ("unit", "ascending")])

    first, second, *others = awkward.chunks
    blocks = [[*first, *second], *others]
    assert len(blocks) == 10
    rows = [sum(batch.rows for batch in block) for block in blocks]
    whole = measured(awkward.batches)
    without = [
        measured([batch for other, block in enumerate(blocks) if other != left for batch in block])
        for left in range(len(rows))
    ]
    found = awkward.tables["mlp-0"]["neurons"].sort_by([("site", "ascending"), ("unit", "ascending")])
    wanted = {column.name for one in statistics().values() for column in one.COLUMNS if column.se}
    assert {name.removesuffix("_se") for name in found.column_names if name.endswith("_se")} == wanted
    h = (sum(rows) / np.array(rows))[:, None]
    for name in sorted(wanted):
        at = [table[name].to_numpy().astype(float) for table in (whole, *without)]
        pseudo = h * at[0] - (h - 1) * np.stack(at[1:])
        center = (pseudo / h).sum(0)
        error = np.sqrt((((pseudo - center) ** 2) / (h - 1)).mean(0))
        got = found[f"{name}_se"].to_numpy().astype(float)
        np.testing.assert_allclose(got, error, rtol=1e-4, atol=1e-9, equal_nan=True, err_msg=name)
        if not name.endswith("_null"):
            assert np.isfinite(got).any(), name
