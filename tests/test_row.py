"""A row as it was measured, printed from every source, and found again from what a run has left."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from pipeline.cli import cli
from pipeline.job import job_identity, load_job, read_spec
from pipeline.job_sections import Columns, DataSpec
from pipeline.registry import sources
from pipeline.report.row import row_page
from pipeline.row import row_in
from pipeline.sources.base import Source
from pipeline.store import open_store
from tests.census import digits_file, parquet_job, run_inline


def source(kind: str, url: Path, columns: dict[str, Any], **spec: Any) -> Source:
    whole = {"train": "all", "measure": ("all",)}
    made = DataSpec(source=kind, url=str(url), columns=Columns(**columns), **{**whole, **spec})
    return sources()[kind]("rows", made, open_store("memory://unused"))  # type: ignore[no-any-return]


def printed(found: Source, number: int, split: str = "all") -> str:
    """The page of the row with a number in the order of reading."""
    chunks = found.chunks(split)
    uids = [int(uid) for chunk in chunks for batch in found.read(chunk, 2) for uid in batch.uid_N]
    shown = row_in(found, chunks, uids[number])
    assert shown is not None
    sink = io.StringIO()
    Console(file=sink, width=400).print(row_page(shown, width=80, colour=False))
    assert re.match(rf"row {uids[number]} of rows/{split}\n", sink.getvalue())
    return sink.getvalue()


def file(folder: Path, **columns: Any) -> Path:
    path = folder / "rows.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def png(folder: Path, name: str, value: int) -> bytes:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((2, 2), value, dtype=np.uint8)).save(folder / name)
    return (folder / name).read_bytes()


def test_numbers_and_class_by_name(tmp_path: Path) -> None:
    path = file(tmp_path, age=[1.0, 2.5, 3.0], size=[4.0, -7.0, 6.0], kind=["cat", "dog", "dog"])
    columns = {"features": ("age", "size"), "label": "kind"}
    page = printed(source("parquet", path, columns, labels=("cat", "dog")), 1)
    assert f"{path}, row 1\nclass 1 (dog)\n" in page
    assert "2 numbers as the models are given them, from -7 to 2.5" in page
    assert re.search(r"age +2\.5\d*\nsize +-7\.0", page)


def test_the_digits() -> None:
    found = sources()["digits"]("rows", DataSpec(source="digits"), open_store("memory://digits"))
    page = printed(found, 0, "test")
    assert "where column 'index' names it" in page
    assert "1 × 8 × 8 numbers as the models are given them, from 0 to 1" in page


def test_many_numbers_are_cut_off(tmp_path: Path) -> None:
    path = file(tmp_path, x=[[float(number) for number in range(50)]])
    assert "feature 39" in (page := printed(source("parquet", path, {"features": "x", "shape": (50,)}), 0))
    assert "… 10 more" in page
    assert "class" not in page


def test_a_matrix_is_a_picture(tmp_path: Path) -> None:
    path = file(tmp_path, x=[[0.0, 1.0, -1.0, 0.0]], y=pa.array([None], pa.int64()), name=["first"])
    columns = {"features": "x", "shape": (1, 2, 2), "label": "y", "key": "name"}
    page = printed(source("parquet", path, columns, classes=3), 0)
    assert "rows.parquet, where column 'name' names it\nclass unknown\n" in page
    assert "1 × 2 × 2 numbers" in page
    assert "|  @@|\n|OO  |\n" in page


def test_categories_of_a_table(tmp_path: Path) -> None:
    path = file(tmp_path, age=[1.0, 2.0, 3.0], colour=["red", "green", None])
    found = source("tabular", path, {"features": ("age",)}, options={"categories": ("colour",)})
    assert "colour = green" in printed(found, 1)
    assert "colour = (unseen)" in (page := printed(found, 2))
    assert re.search(r"1 number as the models are given them, .*\n(.*\n)*age +1\.22", page)


def test_steps_of_a_series_without_what_fills_them_up(tmp_path: Path) -> None:
    path = file(tmp_path, x=[[[1.0, 2.0]] * 3, [[3.0, 4.0]]], y=[[0, 1, 1], [2]])
    columns = {"features": "x", "shape": (2, 5), "label": "y"}
    page = printed(source("series", path, columns, classes=3, options={"ragged": True}), 0)
    assert "2 × 3 numbers as the models are given them, from 1 to 2" in page
    assert "classes of its positions: 0 1 1\n" in page


@pytest.mark.parametrize(
    ("options", "text", "said"),
    [
        ({"tokenizer": "bytes"}, ["ab", "Grüße\n'x'"], "11 of at most 12 tokens\nGrüße\n'x'\n"),
        ({"tokenizer": "words", "min_count": 1}, ["one", "one two"], "2 of at most 12 tokens\none two\n"),
        ({"tokenizer": "ids", "vocabulary": 9}, [[1], [7, 8]], "2 of at most 12 tokens\ntoken 7 token 8\n"),
        ({"tokenizer": "bytes", "packed": True}, ["abcdefghijkl", "xyz"], "of at most 12 tokens\n"),
    ],
    ids=str,
)
def test_tokens(options: dict[str, Any], text: list[Any], said: str, tmp_path: Path) -> None:
    path = file(tmp_path, text=text)
    assert said in printed(source("tokens", path, {"features": "text", "shape": (12,)}, options=options), 1)


def test_images(tmp_path: Path) -> None:
    path = file(tmp_path, image=[png(tmp_path, "a.png", 0), png(tmp_path, "b.png", 255)], y=[0, 1])
    columns = {"features": "image", "shape": (1, 2, 2), "label": "y"}
    page = printed(source("images", path, columns, classes=2), 1)
    assert "class 1\n" in page
    assert "from 1 to 1\n|@@@@|\n|@@@@|\n" in page


def test_a_folder_of_images_names_the_file(tmp_path: Path) -> None:
    for name in ("cat/a.png", "dog/b.png"):
        png(tmp_path, name, 255)
    found = source("image_folder", tmp_path, {"shape": (3, 2, 2)}, labels=("cat", "dog"))
    pages = [printed(found, number) for number in range(2)]
    assert any(f"{tmp_path}/dog/b.png\nclass 1 (dog)\n" in page for page in pages)
    assert all("channel 2" in page for page in pages)


def test_a_node_and_its_edges(tmp_path: Path) -> None:
    path = file(tmp_path, a=[0.5, 1.5, 2.5], name=[7, 8, 9])
    pq.write_table(pa.table({"source": [7, 9, 8], "target": [8, 8, 9]}), tmp_path / "edges.parquet")
    columns = {"features": ("a",), "key": "name"}
    page = printed(source("graph", path, columns, options={"edges": str(tmp_path / "edges.parquet")}), 1)
    assert "edges to it from 7 9\nedges from it to 9\n" in page
    assert re.search(r"a +1\.5", page)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["show", *arguments], env={"COLUMNS": "200"})


def test_an_exemplar_is_printed_by_the_command_that_the_neuron_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, rows in (("train", range(60)), ("test", range(60, 90))):
        digits_file(tmp_path / "data" / f"{split}.parquet", rows=rows, split=split)
    _, store = run_inline(parquet_job(tmp_path, more="[statistics.exemplars]"), str(tmp_path / "store"))
    before = store.keys()
    (command,) = re.findall(r"a row: neuron-census show (.*)", call("mlp-0/hidden0/3", "--store", store.url).stdout)
    asked = (*command.split(), "--store", store.url)
    # the names of the job's files begin where the job is
    monkeypatch.chdir(tmp_path.parent)
    refused(call(*asked), "say so by --job JOB.toml")
    done = call(*asked, "--job", str(tmp_path / "files.toml"))
    assert f"row {command.split()[-1]} of digits/test\ndata/test.parquet, row " in done.stdout
    monkeypatch.chdir(tmp_path)
    assert call(*asked).stdout == done.stdout
    refused(call("mlp-0/hidden0/3", "--row", "99999", "--store", store.url), "has no row with uid 99999")
    refused(call("mlp-0/hidden0", "--row", "1", "--store", store.url), "--row needs a neuron")
    digits_file(tmp_path / "data" / "test.parquet", rows=range(100, 130), split="test")
    refused(call(*asked), "the files are others than those that run")
    assert store.keys() == before


def refused(done: Any, said: str) -> None:
    assert (done.exit_code, said in done.output) == (2, True), done.output


@pytest.mark.parametrize("path", sorted(Path("jobs").glob("*.toml")), ids=lambda path: path.stem)
def test_a_data_set_is_read_back_from_what_names_a_job(path: Path) -> None:
    job = load_job(path)
    for name, spec in job.data.items():
        found = read_spec(job_identity(job)["data"][name], directory=str(path.parent))
        assert found.model_dump(exclude={"made_by"}) == spec.model_dump(exclude={"made_by"})
        assert found.location == spec.location
