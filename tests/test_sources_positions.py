"""A label for each position, from a column of lists to the tables: what counts where, and what is no label of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.errors import DataError, JobError
from pipeline.job import load_job
from pipeline.job_sections import Columns, DataSpec
from pipeline.measure import measure
from pipeline.models.base import checkpoint_key, decode_checkpoint
from pipeline.query import connect
from pipeline.resolve import resolve
from pipeline.rows.reading import Reading
from pipeline.sources.base import FileSource
from pipeline.sources.parquet import Parquet
from pipeline.sources.series import Series
from pipeline.sources.tokens import Tokens
from pipeline.store import open_store
from tests.census import run_inline

IDS = {"tokenizer": "ids", "vocabulary": 9}
ROWS = [[1, 2, 3], [4], [5, 6, 7, 8, 1, 2], [3, 4], [5, 5]]
TAGS = [[0, 1, 2], [2], [0, None, -1, 1, 2, 0], None, [1, 1]]
# of four positions: −1 where there is no token, no label is known, or the row is cut
READ = [[0, 1, 2, -1], [2, -1, -1, -1], [0, -1, -1, 1], [-1] * 4, [1, 1, -1, -1]]


def write(path: Path, rows: list[Any], tags: list[Any], kind: pa.DataType | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"x": pa.array(rows), "tag": pa.array(tags, kind)}), path, row_group_size=2)
    return path


def opened(source: type[FileSource], url: Path, shape: tuple[int, ...], **spec: Any) -> FileSource:
    columns = Columns(features="x", shape=shape, label="tag")
    given: dict[str, Any] = {"classes": 3, "max_unreadable": 0.5, **spec}
    return source("rows", DataSpec(url=str(url), columns=columns, **given), open_store("memory://unused"))


def read(source: FileSource, batch_rows: int = 3) -> tuple[list[Batch], Reading]:
    readings = [source.read(chunk, batch_rows) for chunk in source.chunks("all")]
    return [batch for reading in readings for batch in reading], readings[0]


def labels(batches: list[Batch]) -> list[list[int]]:
    assert all(batch.label_N is None for batch in batches)
    return [row.tolist() for batch in batches for row in batch.label_NS]


@pytest.mark.parametrize("batch_rows", [1, 3, 5])
def test_each_position_has_the_label_at_its_place(tmp_path: Path, batch_rows: int) -> None:
    source = opened(Tokens, write(tmp_path / "a.parquet", ROWS, TAGS), (4,), options=IDS)
    assert labels(read(source, batch_rows)[0]) == READ
    assert source.labels_positions


def test_labels_may_be_names_and_positions_bytes_or_words(tmp_path: Path) -> None:
    names = [["b", "a", "a", "b"], ["a"], ["b", "b", None]]
    path = write(tmp_path / "a.parquet", ["abcd", "z", "xyz"], names)
    spec = {"classes": None, "labels": ("a", "b")}
    assert labels(read(opened(Tokens, path, (3,), **spec))[0]) == [[1, 0, 0], [0, -1, -1], [1, 1, -1]]
    words = write(tmp_path / "w.parquet", ["a cat sat .", "dog", "one, two"], names)
    source = opened(Tokens, words, (5,), options={"tokenizer": "words", "min_count": 1}, **spec)
    assert labels(read(source)[0]) == [[1, 0, 0, 1, -1], [0, -1, -1, -1, -1], [1, 1, -1, -1, -1]]


def test_words_of_rows_that_are_unreadable_for_their_labels_are_not_counted(tmp_path: Path) -> None:
    texts = ["a b b", "c c c c", None, "a d", "d d"]
    tags = [[0, 1, 2], [0, 1], None, None, [0, 1]]
    path = write(tmp_path / "a.parquet", texts, tags)
    source = opened(Tokens, path, (3,), options={"tokenizer": "words", "min_count": 2})
    # d three times, a and b twice; c in no row that is shown
    assert source.names.tokens[2:] == ("d", "a", "b")
    assert labels(read(source)[0]) == [[0, 1, 2], [-1] * 3, [0, 1, -1]]


def test_a_label_of_a_position_beyond_int64_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [[1, 2], [3]], [[0, None], [2**63 + 5]], pa.list_(pa.uint64()))
    with pytest.raises(DataError, match=r"a\.parquet, row 1: label 9223372036854775813: expected 0 to 2"):
        read(opened(Tokens, path, (3,), options=IDS))


def test_steps_of_series_have_labels(tmp_path: Path) -> None:
    ragged = write(tmp_path / "a.parquet", [[1.0, 2.0], [3.0, 4.0, 5.0], [6.0]], [[1, 0], [0, 0, 2], [-1]])
    source = opened(Series, ragged, (1, 3), options={"ragged": True})
    assert labels(read(source)[0]) == [[1, 0, -1], [0, 0, 2], [-1, -1, -1]]
    whole = write(tmp_path / "b.parquet", [[[1.0, 2.0], [3.0, 4.0]]] * 2, [[2, 1], [0, 0]])
    (batch,) = read(opened(Series, whole, (2, 2)))[0]
    assert (batch.label_NS.tolist(), batch.mask_NS) == ([[2, 1], [0, 0]], None)


@pytest.mark.parametrize("batch_rows", [1, 4])
def test_a_row_with_more_or_fewer_labels_than_positions_is_in_the_ledger(tmp_path: Path, batch_rows: int) -> None:
    rows, tags = [*ROWS, [], [7]], [[0, 1], [2], [0] * 6, None, [1, 1], [0], []]
    batches, reading = read(opened(Tokens, write(tmp_path / "a.parquet", rows, tags), (4,), options=IDS), batch_rows)
    assert labels(batches) == [[2, -1, -1, -1], [0] * 4, [-1] * 4, [1, 1, -1, -1]]
    assert torch.cat([batch.inputs[0] for batch in batches]).tolist() == [
        [4, 0, 0, 0], [5, 6, 7, 8], [3, 4, 0, 0], [5, 5, 0, 0],
    ]  # fmt: skip
    assert [(one.first_row, one.reason) for one in reading.damage] == [
        (0, "2 labels for 3 positions"), (5, "it has no token"), (6, "0 labels for 1 positions"),
    ]  # fmt: skip
    assert (reading.read, reading.unreadable, reading.rows) == (4, 3, 7)


def test_what_is_no_class_is_said_with_its_row(tmp_path: Path) -> None:
    tags = [[0, 1], [2], [0] * 6, [0, 3], [1, 1]]
    source = opened(Tokens, write(tmp_path / "a.parquet", ROWS, tags), (4,), options=IDS)
    with pytest.raises(DataError, match="row 3: label 3: expected 0 to 2"):
        read(source)


def test_a_label_column_that_cannot_be_is_refused(tmp_path: Path) -> None:
    floats = write(tmp_path / "f.parquet", ROWS, [[0.5]] * 5)
    with pytest.raises(DataError, match=r"column 'tag' is list<.*double>, expected integers .*, or lists of those"):
        opened(Tokens, floats, (4,), options=IDS).chunks("all")
    flat = write(tmp_path / "n.parquet", [[1.0, 2.0]] * 5, TAGS)
    with pytest.raises(DataError, match=r"column 'tag' is list<.*int64>, expected integers"):
        opened(Parquet, flat, (2,)).chunks("all")
    write(tmp_path / "both" / "a.parquet", ROWS, TAGS)
    write(tmp_path / "both" / "b.parquet", ROWS, [0, 1, 2, 0, 1])
    with pytest.raises(DataError, match=r"a label for each row in .*b.parquet and one for each position in .*a.parq"):
        opened(Tokens, tmp_path / "both", (4,), options=IDS).chunks("all")


JOB = """
name = "tagged"
[numerics]
batch_rows = 2
[data.rows]
source = "tokens"
url = "rows.parquet"
classes = 3
chunk_rows = 2
options = { tokenizer = "ids", vocabulary = 9 }
columns = { features = "x", shape = [4], label = "tag" }
[[models]]
family = "FAMILY"
data = "rows"
hyperparameters = { layers = 1, width = 8, heads = 2 }
training = { steps = 3 }
[statistics.labels]
[statistics.response]
"""


def test_a_run_counts_each_position_by_its_label(tmp_path: Path) -> None:
    """From the job to the table, against the hidden layer's output as a hook sees it."""
    write(tmp_path / "rows.parquet", ROWS, TAGS)
    job_file = tmp_path / "job.toml"
    job_file.write_text(JOB.replace("FAMILY", "gpt"))
    job = load_job(job_file)
    _, store = run_inline(job, str(tmp_path / "store"))
    (model,) = [one for one in resolve(job, store).models if one.control_of is None]
    module = model.origin.build()
    module.load_state_dict(decode_checkpoint(store.get(checkpoint_key(model.id))).weights)
    seen: list[np.ndarray] = []
    up = module.eval().get_submodule("blocks.0.up")
    up.register_forward_hook(lambda layer, given, out: seen.append(out.detach().double().numpy()))
    label_NT = np.array(READ)
    token_NT = torch.tensor([(row + [0] * 4)[:4] for row in ROWS])
    with torch.no_grad():
        module(token_NT)
    (z_NTU,) = seen
    a_NTU = nn.functional.gelu(torch.from_numpy(z_NTU), approximate="tanh").numpy()
    table = (
        connect(store)
        .sql("select * from classes where model = ? and site = 'blocks.0.up'", params=[model.id])
        .to_arrow_table()
    )
    for row in table.to_pylist():
        of_class = label_NT == row["class"]
        a, z = a_NTU[of_class][:, row["unit"]], z_NTU[of_class][:, row["unit"]]
        assert (row["n"], row["fired"]) == (of_class.sum(), (z > 0).sum())
        np.testing.assert_allclose([row["a_mean"], row["a_std"]], [a.mean(), a.std()], rtol=1e-4, atol=1e-7)
    assert table.num_rows == 3 * z_NTU.shape[2]


def test_a_family_that_learns_the_class_of_a_row_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "rows.parquet", ROWS, TAGS)
    job_file = tmp_path / "job.toml"
    job_file.write_text(JOB.replace("FAMILY", "transformer"))
    with pytest.raises(JobError, match=r"learns the class of a row, and column 'tag' of data.rows has one for each"):
        resolve(load_job(job_file), open_store(str(tmp_path / "store")))


class Strided(nn.Module):
    """A convolution that keeps every position, and one that keeps every other."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Conv1d(2, 3, 3, padding=1)
        self.halved = nn.Conv1d(3, 3, 3, padding=1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.halved(self.kept(x).relu()).relu()


def test_a_site_of_other_positions_has_no_labels_and_says_why() -> None:
    x, label_NS = torch.randn(6, 2, 8), torch.arange(48).view(6, 8) % 3
    tables = measure(Strided(), [(x, label_NS)], classes=3)
    assert set(tables["classes"]["site"].to_pylist()) == {"kept"}
    reasons = dict(zip(tables["sites"]["site"].to_pylist(), tables["sites"]["reason"].to_pylist(), strict=True))
    assert reasons["kept"] is None
    assert reasons["halved"].startswith("no position's label is counted: its positions are not those")
    of_site = {row["site"]: row for row in tables["neurons"].to_pylist()}
    assert (of_site["kept"]["class_information"] is None, of_site["halved"]["class_information"]) == (False, None)
