"""Jobs that load models, and files of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import safetensors.torch
import torch

from pipeline.executor import InlineExecutor
from pipeline.job import load_job
from pipeline.models.base import Task
from pipeline.run import run
from pipeline.store import Store
from tests.models.build import build

TASK = Task((1, 8, 8), 10)
JOB = """
name = "loaded"
[data.digits]
source = "digits"
chunk_rows = 400
[[models]]
data = "digits"
{keys}
load = {{ {load} }}
[statistics.response]
[statistics.weights]
"""
MLP = "family = 'mlp', arguments = { widths = [6] }"


def job_of(directory: Path, load: str = f"url = 'models/*', {MLP}", keys: str = "") -> Path:
    path = directory / "job.toml"
    path.write_text(JOB.format(load=load, keys=keys))
    return path


def weights(seed: int, family: str = "mlp", **parameters: Any) -> dict[str, torch.Tensor]:
    parameters = parameters or {"widths": (6,)}
    return {name: value.clone() for name, value in build(family, TASK, seed=seed, **parameters).state_dict().items()}


def put(path: Path, state: dict[str, torch.Tensor] | bytes) -> bytes:
    content = state if isinstance(state, bytes) else safetensors.torch.save(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content


def take(path: Path, store: Store) -> Any:
    return run(load_job(path), store, InlineExecutor())


def table(store: Store, run_id: str, name: str) -> pd.DataFrame:
    content = store.get(f"runs/{run_id}/tables/{name}/part-00000.parquet")
    return pq.read_table(io.BytesIO(content)).to_pandas()


def exported() -> bytes:
    buffer = io.BytesIO()
    model, rows = build("mlp", TASK, seed=3, widths=(6,)).eval(), torch.export.Dim.DYNAMIC
    torch.export.save(torch.export.export(model, (torch.randn(3, 1, 8, 8),), dynamic_shapes=({0: rows},)), buffer)
    return buffer.getvalue()
