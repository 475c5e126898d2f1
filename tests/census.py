"""Small real jobs on the digits, and what a finished run left in its store."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

from pipeline.executor import InlineExecutor
from pipeline.job import Job, load_job
from pipeline.run import Outcome, run
from pipeline.store import Store, open_store

JOB = """
name = "small"
[numerics]
batch_rows = 128
[data.digits]
source = "digits"
measure = ["test", "train"]
chunk_rows = 400
[[models]]
family = "mlp"
data = "digits"
seeds = [{seeds}]
hyperparameters = {{ widths = [12] }}
training = {{ steps = 30 }}
{more}
[statistics.response]
[statistics.template]
[statistics.weights]
"""

CNN = """
[[models]]
family = "cnn"
data = "digits"
seeds = [0]
hyperparameters = { widths = [4] }
training = { steps = 10, learning_rate = 0.01 }
"""


def write_job(path: Path, *, seeds: str = "0", more: str = "") -> Path:
    path.write_text(JOB.format(seeds=seeds, more=more))
    return path


def small_job(directory: Path, *, seeds: str = "0", more: str = "") -> Job:
    return load_job(write_job(directory / "job.toml", seeds=seeds, more=more))


PARQUET = """
name = "files"
[data.digits]
url = "data/*.parquet"
classes = 10
train = "train"
measure = ["test"]
chunk_rows = {chunk_rows}
[data.digits.columns]
features = "image"
label = "label"
split = "split"
shape = [64]
[[models]]
family = "mlp"
data = "digits"
hyperparameters = {{ widths = [6] }}
training = {{ steps = 20 }}
[statistics.response]
[statistics.template]
{more}
"""


def parquet_job(directory: Path, *, more: str = "", chunk_rows: int = 1000) -> Job:
    """A job on the Parquet files in `directory`/data, whose rows no column names."""
    path = directory / "files.toml"
    path.write_text(PARQUET.format(more=more, chunk_rows=chunk_rows))
    return load_job(path)


def digits_file(path: Path, *, rows: range, split: str, also: str = "", group_rows: int | None = None) -> None:
    """Some of scikit-learn's digits as one Parquet file, of two splits in turn if `also` names another."""
    digits = load_digits()
    path.parent.mkdir(exist_ok=True)
    columns = {
        "image": list((digits.images[list(rows)].reshape(-1, 64) / 16).astype("float32")),
        "label": digits.target[list(rows)],
        "split": [(split, also or split)[row % 2] for row in rows],
    }
    pq.write_table(pa.table(columns), path, row_group_size=group_rows, use_dictionary=False)


def run_inline(job: Job, url: str) -> tuple[Outcome, Store]:
    store = open_store(url)
    return run(job, store, InlineExecutor()), store


def published(store: Store, run_id: str) -> dict[str, bytes]:
    """Every published byte of a run: its tables and its manifest."""
    keys = [*store.keys(f"runs/{run_id}/tables/"), f"runs/{run_id}/_manifest.json"]
    return {key: store.get(key) for key in keys}
