"""Which models say what comes next, found from what they answer; a program of one is scored as the model itself is."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.foreign.call import Call
from pipeline.foreign.causal import predicts_next
from pipeline.foreign.spec import LoadSpec
from pipeline.job import load_job
from pipeline.models.base import Task
from tests.census import run_inline
from tests.foreign.modules import load_module
from tests.models.build import build

TASK = Task((8,), 0, vocabulary=20)


def gpt() -> nn.Module:
    return build("gpt", TASK, seed=1, layers=1, width=8, heads=2)


def program(model: nn.Module, *, masked: bool = False) -> bytes:
    buffer = io.BytesIO()
    given = (torch.randint(20, (3, 8)), torch.ones(3, 8, dtype=torch.bool))[: 1 + masked]
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in given)
    torch.export.save(torch.export.export(model, given, dynamic_shapes=shapes), buffer)
    return buffer.getvalue()


class Masked(nn.Module):
    """Looks both ways, as a masked language model does."""

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.causal = causal

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(token.shape[1]) if self.causal else None
        return self.head(self.layer(self.embedding(token), src_mask=mask))


class Answers(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(token), *self.shape)


MODELS = [
    (gpt, True),
    (lambda: load_module(LoadSpec(url="m.pt2"), {"m.pt2": program(gpt())}, TASK), True),
    (lambda: nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20)), True),
    (lambda: Masked(causal=True).eval(), True),
    (lambda: Masked().eval(), False),
    (lambda: Answers(20), False),
    (lambda: Answers(8, 19), False),
    (lambda: Answers(7, 20), False),
    # its vocabulary is rounded up, and it has learnt nothing yet
    (lambda: Answers(8, 24), True),
]


@pytest.mark.parametrize(("make", "expected"), MODELS)
@pytest.mark.parametrize("names", [None, "as the model has them"])
def test_a_model_that_never_looks_ahead(make: Callable[[], nn.Module], expected: bool, names: Any) -> None:
    model = make()
    names = names and tuple(inspect.signature(model.forward).parameters)[:1]
    torch.manual_seed(3)
    batch = Batch((torch.randint(20, (5, 8)),), torch.arange(5))
    assert predicts_next(model, batch, Call(names, 0).shown, vocabulary=20) is expected


JOB = """
name = "programs"
[data.text]
source = "tokens"
url = "rows.parquet"
columns = {{ features = "token", shape = [8], split = "split" }}
options = {{ tokenizer = "ids", vocabulary = 20 }}
[[models]]
data = "text"
control = false
load = {{ {load} }}
[statistics.response]
"""
FAMILY = "url = 'm.safetensors', family = 'gpt', arguments = {{ layers = 1, width = 8, heads = 2 }}"
ONLY_TOKENS = "url = '{}.pt2', inputs = ['token']"


def test_a_program_has_the_perplexity_of_its_model(tmp_path: Path) -> None:
    model = gpt()
    (tmp_path / "m.safetensors").write_bytes(safetensors.torch.save(dict(model.state_dict())))
    (tmp_path / "m.pt2").write_bytes(program(model))
    (tmp_path / "padded.pt2").write_bytes(program(model, masked=True))
    (tmp_path / "both_ways.pt2").write_bytes(program(Masked().eval()))
    generator = torch.Generator().manual_seed(0)
    tokens = [
        row[: 3 + place % 6] for place, row in enumerate(torch.randint(20, (40, 8), generator=generator).tolist())
    ]
    pq.write_table(pa.table({"token": tokens, "split": ["train", "test"] * 20}), tmp_path / "rows.parquet")
    found = {}
    loads = {"family": FAMILY, "m": ONLY_TOKENS, "padded": "url = 'padded.pt2'", "both_ways": ONLY_TOKENS}
    for name, load in loads.items():
        path = tmp_path / f"{name}.toml"
        path.write_text(JOB.format(load=load.format(name)))
        outcome, store = run_inline(load_job(path), str(tmp_path / name))
        assert outcome.failed == {}
        key = f"runs/{outcome.run}/tables/scores/part-00000.parquet"
        rows = pq.read_table(io.BytesIO(store.get(key))).to_pylist() if key in store.keys(key) else []
        found[name] = {row["metric"]: row["value"] for row in rows}
    assert found["family"].keys() == {"accuracy", "log_loss", "perplexity"}
    assert found["m"] == pytest.approx(found["family"], rel=1e-5)
    assert found["padded"] == pytest.approx(found["family"], rel=1e-5)
    assert found["both_ways"] == {}
