"""Arrow IPC files hold the same rows as Parquet files, wherever they are and whatever is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.batch import Batch
from pipeline.errors import DataError
from pipeline.job_sections import Columns, DataSpec
from pipeline.registry import sources
from pipeline.rows.reading import Reading
from pipeline.store import open_store

ROWS, BATCH_ROWS = 60, 20


def table() -> pa.Table:
    """Rows of every kind of column that some source reads."""
    draw = np.random.default_rng(0)
    steps = [list(map(float, draw.normal(size=int(length)))) for length in draw.integers(1, 5, ROWS)]
    return pa.table(
        {
            "a": draw.normal(size=ROWS),
            "b": draw.normal(size=ROWS).astype(np.float32),
            "name": draw.choice(["x y", "é", "z", "longer than that"], ROWS),
            "coloured": pa.array(draw.choice(["red", "green"], ROWS)).dictionary_encode(),
            "steps": pa.array(steps, pa.list_(pa.float32())),
            "y": draw.integers(0, 3, ROWS),
            "split": draw.choice(["train", "test"], ROWS),
            "key": draw.permutation(ROWS),
        }
    )


def write(path: Path, rows: pa.Table, **options: Any) -> Path:
    """The rows as a Parquet or an Arrow file, by the ending."""
    if path.suffix == ".parquet":
        pq.write_table(rows, path, row_group_size=BATCH_ROWS)
    else:
        feather.write_feather(rows, str(path), chunksize=BATCH_ROWS, **options)
    return path


def read(kind: str, url: Path | str, split: str = "test", **spec: Any) -> tuple[list[Batch], list[Reading[Any, Any]]]:
    """All batches of a split and their readings, rows named by a key."""
    columns = Columns(**{"label": "y", "split": "split", "key": "key", **spec.pop("columns")})
    source = sources()[kind]("d", DataSpec(url=str(url), columns=columns, classes=3, **spec), open_store("memory://un"))
    readings = [source.read(chunk, 7) for chunk in source.chunks(split)]
    return [batch for reading in readings for batch in reading], readings


KINDS = [
    ("parquet", {"features": ("a", "b")}, {}),
    ("tabular", {"features": ("a", "b")}, {"categories": ("name", "coloured")}),
    ("series", {"features": "steps", "shape": (1, 4)}, {"ragged": True}),
    ("tokens", {"features": "name", "shape": (4,)}, {}),
    ("tokens", {"features": "name", "shape": (4,)}, {"tokenizer": "words", "min_count": 1}),
]


@pytest.mark.parametrize(("kind", "columns", "options"), KINDS)
@pytest.mark.parametrize("compression", ["uncompressed", "lz4", "zstd"])
def test_the_same_rows_as_from_parquet(
    tmp_path: Path, kind: str, columns: dict[str, Any], options: dict[str, Any], compression: str
):
    for name in ("rows.parquet", "rows.arrow"):
        write(tmp_path / name, table(), **({"compression": compression} if name.endswith("arrow") else {}))
    expected, found = (
        read(kind, tmp_path / name, columns=columns, options=options) for name in ("rows.parquet", "rows.arrow")
    )
    for one, other in zip(expected[0], found[0], strict=True):
        tensors = [(*batch.inputs, *batch.kwargs.values(), batch.uid_N, batch.label_N) for batch in (one, other)]
        assert all(torch.equal(*each) for each in zip(*tensors, strict=True))
    assert [(one.read, one.excluded) for one in expected[1]] == [(one.read, one.excluded) for one in found[1]]


@pytest.mark.parametrize("place", ["s3", "memory"])
def test_from_anywhere(tmp_path: Path, s3_url: str, place: str):
    there = open_store({"s3": f"{s3_url}/arrow", "memory": f"memory://arrow/{tmp_path.name}"}[place])
    there.put_once("rows/a.feather", write(tmp_path / "a.feather", table()).read_bytes())
    given = {"columns": {"features": ("a", "b")}, "chunk_rows": BATCH_ROWS}
    here, far = read("parquet", tmp_path / "a.feather", **given)[0], read("parquet", f"{there.url}/rows", **given)[0]
    assert torch.equal(torch.cat([b.inputs[0] for b in here]), torch.cat([b.inputs[0] for b in far]))


def test_a_file_is_all_of_its_bytes_and_its_rows_are_numbered(tmp_path: Path):
    path = write(tmp_path / "a.arrow", pa.table({"a": np.arange(1e5), "b": np.zeros(100_000)}), compression="zstd")
    columns = {"features": ("a", "b"), "label": None, "split": None, "key": None}
    before, (_, *_) = read("parquet", path, "all", columns=columns)
    uid_N = torch.cat([batch.uid_N for batch in before])
    assert torch.equal(uid_N, uid_N[0] + torch.arange(100_000))
    content = bytearray(
        write(path, pa.table({"a": np.arange(1e5), "b": np.zeros(100_000)}), compression="uncompressed").read_bytes()
    )
    plain, _ = read("parquet", path, "all", columns=columns)
    at = content.index(np.float64(50_000).tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    changed, _ = read("parquet", path, "all", columns=columns)
    assert int(plain[0].uid_N[0]) != int(changed[0].uid_N[0]) != int(before[0].uid_N[0])


def test_a_corrupt_batch_is_in_the_ledger(tmp_path: Path):
    rows = table().select(["steps", "y", "split", "key"])
    path = write(tmp_path / "a.arrow", rows, compression="uncompressed")
    content = bytearray(path.read_bytes())
    offsets = rows["steps"].combine_chunks().slice(BATCH_ROWS, BATCH_ROWS).offsets.to_numpy()
    first = (offsets - offsets[0])[:BATCH_ROWS].tobytes()
    at = content.index(first)
    content[at + 4 : at + 8] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    given = {"columns": {"features": "steps", "shape": (1, 4)}, "options": {"ragged": True}}
    _, (reading,) = read("series", path, max_unreadable=0.5, **given)
    (damage,) = reading.damage
    assert (damage.rows, damage.first_row) == (BATCH_ROWS, BATCH_ROWS)
    assert "row group 1 is corrupt" in damage.reason
    assert reading.read + reading.unreadable + reading.excluded == ROWS
    with pytest.raises(DataError, match=rf"a\.arrow, row {BATCH_ROWS}: row group 1 is corrupt"):
        read("series", path, **given)


@pytest.mark.parametrize("kept", [0.1, 0.6, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float):
    path = write(tmp_path / "a.arrow", table())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(DataError, match=r"a\.arrow: the Arrow file is damaged"):
        read("parquet", path, columns={"features": ("a", "b")})


def test_a_stream_is_told_from_a_file(tmp_path: Path):
    path = tmp_path / "a.arrow"
    with pa.ipc.new_stream(str(path), table().schema) as writer:
        writer.write_table(table())
    with pytest.raises(DataError, match=r"a\.arrow: an Arrow stream, which has no footer; expected an Arrow file"):
        read("parquet", path, columns={"features": ("a", "b")})


def test_labels_out_of_range_are_found_in_the_rows(tmp_path: Path):
    rows = table()
    write(tmp_path / "a.arrow", rows.set_column(rows.schema.get_field_index("y"), "y", pa.array([3] * ROWS)))
    with pytest.raises(DataError, match=r"a\.arrow, row 0: label 3: expected 0 to 2"):
        read("parquet", tmp_path / "a.arrow", columns={"features": ("a", "b")})


def test_a_directory_may_hold_both(tmp_path: Path):
    rows = table()
    write(tmp_path / "a.arrow", rows.slice(0, 30))
    write(tmp_path / "b.parquet", rows.slice(30))
    found, _ = read("parquet", tmp_path, columns={"features": ("a", "b")})
    expected = sorted(row["key"] for row in rows.to_pylist() if row["split"] == "test")
    assert sorted(torch.cat([batch.uid_N for batch in found]).tolist()) == sorted(expected)
