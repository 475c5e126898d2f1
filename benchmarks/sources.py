"""How fast sources make batches, beside what pyarrow alone reads of the same files: `python -m benchmarks.sources`.

Goal: 0.8 or more. pyarrow reads and decodes the same columns of the same row groups on one thread and makes nothing of
them; here up to two groups are read ahead, over the ends of chunks, beside the thread that makes batches, so the goal
needs a second core that is idle. Of what both take of the processor there is a column too, which a busy machine
changes less; and one with the move to the model, which makes numbers of eight bytes of tokens and categories. The
three take turns; the best counts. There are five times as many texts as other rows: of the 16 ms in which 200,000 are
read, a fifth is a beginning and an end that nothing can overlap with.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.asked import parser
from pipeline.batch import Batch
from pipeline.devices import moved
from pipeline.job_sections import Columns, DataSpec
from pipeline.registry import sources
from pipeline.rows.reading import batches_in_turn
from pipeline.sources.base import Chunk, Source
from pipeline.store import open_store

ROWS = 200_000
GROUP_ROWS = 20_000
BATCH_ROWS = 1024
REPEATS = 7

Case = tuple[str, dict[str, Any], Columns, dict[str, Any]]


def cases(rows: int) -> dict[str, Case]:
    """By name: the source, the columns of its file, which are what, and options."""
    draw = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz    "))
    texts = ["".join(row) for row in draw.choice(letters, (rows, 120))]
    lengths = draw.integers(7, 30, rows)
    steps = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32()),
        pa.FixedSizeListArray.from_arrays(pa.array(draw.normal(size=12 * lengths.sum()).astype(np.float32)), 12),
    )
    images = pa.FixedSizeListArray.from_arrays(pa.array(draw.normal(size=rows * 256).astype(np.float32)), 256)
    table = {f"n{i}": draw.normal(size=rows) for i in range(13)}
    table |= {f"c{i}": draw.integers(0, 1000, rows).astype(str) for i in range(26)}
    numbers, categories = tuple(f"n{i}" for i in range(13)), tuple(f"c{i}" for i in range(26))
    return {
        "numbers": ("parquet", {"x": images}, Columns(features="x", shape=(1, 16, 16)), {}),
        "table": ("tabular", table, Columns(features=numbers), {"categories": categories}),
        "series": ("series", {"x": steps}, Columns(features="x", shape=(12, 29)), {"ragged": True}),
        "bytes": ("tokens", {"x": 5 * texts}, Columns(features="x", shape=(128,)), {}),
    }


class Seconds(NamedTuple):
    """Of the clock, and of the processor over all threads."""

    wall: float
    cpu: float


def timed(work: Callable[[], int], rows: int) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    if work() != rows:
        raise RuntimeError("rows are missing")
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(rows: int, *works: Callable[[], int]) -> list[Seconds]:
    """The least of some repetitions of each."""
    rounds = [[timed(work, rows) for work in works] for _ in range(REPEATS)]
    return [Seconds(*map(min, zip(*found, strict=True))) for found in zip(*rounds, strict=True)]


def pyarrow_alone(path: Path) -> int:
    """Rows read group by group."""
    file = pq.ParquetFile(path, pre_buffer=True)
    return sum(file.read_row_group(group, use_threads=False).num_rows for group in range(file.num_row_groups))


def in_batches(source: Source, chunks: Sequence[Chunk], ready: Callable[[Batch], Batch] | None = None) -> int:
    """Rows of batches, fetched ahead as they are when models are measured."""
    readings = [source.read(chunk, BATCH_ROWS) for chunk in chunks]
    return sum((ready(batch) if ready else batch).rows for batches in batches_in_turn(readings) for batch in batches)


def main() -> None:
    """Print a line for each kind of source."""
    torch.set_num_threads(1)  # as a worker has it
    print(f"{'source':10}{'pyarrow rows/s':>18}{'batches rows/s':>18}{'share':>8}{'of CPU':>8}{'moved':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, columns, named, options) in cases(ROWS).items():
            path = Path(folder, f"{name}.parquet")
            table = pa.table(columns)
            pq.write_table(table, path, row_group_size=GROUP_ROWS)
            spec = DataSpec(url=str(path), columns=named, options=options)
            source = sources()[kind](name, spec, open_store(f"{folder}/store"))
            batches = partial(in_batches, source, source.chunks("all"))
            to_model = partial(moved, device=torch.device("cpu"), dtype=torch.float32)
            alone, ours, ready = in_turns(
                rows := table.num_rows, partial(pyarrow_alone, path), batches, partial(batches, ready=to_model)
            )
            print(
                f"{name:10}{rows / alone.wall:18,.0f}{rows / ours.wall:18,.0f}"
                f"{alone.wall / ours.wall:8.2f}{alone.cpu / ours.cpu:8.2f}{alone.wall / ready.wall:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    parser("sources", __doc__, takes="some three minutes").parse_args()
    main()
