"""Small Parquet files of rows, the source that reads them, and what it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.batch import Batch
from pipeline.job_sections import Columns, DataSpec
from pipeline.rows.reading import Reading
from pipeline.sources.base import Source
from pipeline.sources.parquet import Parquet
from pipeline.store import open_store

COLUMNS = Columns(features="x", label="y", split="split", shape=(2, 2))


def rows_table(rows: int, *, seed: int = 0, splits: tuple[str, ...] = ("train", "test")) -> pa.Table:
    """Rows of four numbers, a class below 3 and a split, drawn from a seed."""
    generator = np.random.default_rng(seed)
    return pa.table(
        {
            "x": pa.array(list(generator.normal(size=(rows, 4)).astype(np.float32)), pa.list_(pa.float32())),
            "y": pa.array(generator.integers(0, 3, rows)),
            "split": pa.array(generator.choice(splits, rows) if rows else [], pa.string()),
            "id": pa.array(generator.permutation(rows) + 1000 * seed),
        }
    )


def write(path: Path, table: pa.Table, *, group_rows: int = 10, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group_rows, **options)
    return path


def parquet(url: Path | str, columns: Columns = COLUMNS, **spec: Any) -> Parquet:
    classes = {} if spec.get("labels") else {"classes": 3}
    return Parquet("rows", DataSpec(url=str(url), columns=columns, **classes, **spec), open_store("memory://unused"))


def read_all(source: Source, split: str, batch_rows: int = 7) -> tuple[list[Batch], list[Reading]]:
    readings = [source.read(chunk, batch_rows) for chunk in source.chunks(split)]
    return [batch for reading in readings for batch in reading], readings


def joined(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.cat([batch.inputs[0] for batch in batches])
    return (
        x,
        torch.cat([batch.uid_N for batch in batches]),
        torch.cat([b.label_N for b in batches if b.label_N is not None]),
    )


def ids(source: Source, split: str = "test") -> list[str]:
    return [chunk.id for chunk in source.chunks(split)]


def corrupt_group(path: Path, group: int) -> None:
    """Overwrite the data of the first column of a row group."""
    column = pq.read_metadata(path).row_group(group).column(0)
    content = bytearray(path.read_bytes())
    start = column.data_page_offset
    content[start : start + column.total_compressed_size // 2] = b"\xa5" * (column.total_compressed_size // 2)
    path.write_bytes(content)
