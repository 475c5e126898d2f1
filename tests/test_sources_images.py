"""Images in folders and columns: a chunk is its files' content, and what is no image is in the ledger."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.errors import DataError, JobError
from pipeline.job_sections import Columns, DataSpec
from pipeline.rows.pictures import Pictures
from pipeline.sources.base import Source
from pipeline.sources.image_folder import ImageFolder
from pipeline.sources.images import Images
from pipeline.store import open_store


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(content, kind)
    return content.getvalue()


def picture(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (4, 5, 3))


def tree(path: Path, names: dict[str, bytes]) -> Path:
    for name, content in names.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def animals(path: Path, count: int = 6) -> dict[str, np.ndarray]:
    found = {f"test/{('cat', 'dog')[n % 2]}/{n}.png": picture(n) for n in range(count)}
    tree(path, {name: png(pixels) for name, pixels in found.items()} | {"test/cat/notes.txt": b"no image"})
    tree(path, {"train/cat/x.png": png(picture(99))})
    return found


def folder(url: Path | str, shape: tuple[int, ...] = (3, 4, 5), *, options: Any = None, **spec: Any) -> ImageFolder:
    spec = {"train": "train", "measure": ("test",), **spec}
    given = DataSpec(url=str(url), columns=Columns(shape=shape), options=options or {}, **spec)
    return ImageFolder("zoo", given, open_store("memory://unused"))


def read(source: Source, split: str) -> tuple[torch.Tensor, list[int], list[int]]:
    batches = [batch for chunk in source.chunks(split) for batch in source.read(chunk, 4)]
    labels = [label for batch in batches if batch.label_N is not None for label in batch.label_N.tolist()]
    return (
        torch.cat([batch.inputs[0] for batch in batches]),
        labels,
        [uid for batch in batches for uid in batch.uid_N.tolist()],
    )


def test_an_image_whose_name_is_no_text_is_named(tmp_path: Path):
    animals(tmp_path)
    (tmp_path / "test/cat/0.png").rename(tmp_path / "test/cat" / os.fsdecode(b"\xff.png"))
    with pytest.raises(DataError, match=r"^b'.*/test/cat/\\xff\.png': its name is not UTF-8; rename it$"):
        folder(tmp_path).chunks("test")


@pytest.mark.parametrize("chunk_rows", [100, 2])
def test_every_file_is_a_row_with_its_folder_as_label(tmp_path: Path, chunk_rows: int):
    found = animals(tmp_path)
    source = folder(tmp_path, chunk_rows=chunk_rows)
    x, labels, uids = read(source, "test")
    expected = sorted((pixels.transpose(2, 0, 1) / 255).astype(np.float32).tobytes() for pixels in found.values())
    assert sorted(row.numpy().tobytes() for row in x) == expected
    cats = {(pixels.transpose(2, 0, 1) / 255).astype(np.float32).tobytes() for n, pixels in found.items() if "cat" in n}
    assert [label == 0 for label in labels] == [row.numpy().tobytes() in cats for row in x]
    assert len(set(uids)) == 6
    assert (source.classes, source.shape) == (2, (3, 4, 5))
    assert (len(source.chunks("test")) > 1) == (chunk_rows == 2)
    assert read(source, "train")[0].shape == (1, 3, 4, 5)


def test_a_new_file_changes_its_own_chunk_only(tmp_path: Path):
    animals(tmp_path, 20)
    before = {chunk.id for chunk in folder(tmp_path, chunk_rows=4).chunks("test")}
    tree(tmp_path, {"test/cat/new.png": png(picture(50))})
    after = {chunk.id for chunk in folder(tmp_path, chunk_rows=4).chunks("test")}
    assert len(before) > 3
    assert len(before - after) <= 1
    assert len(after - before) == 1


def test_a_file_that_changes_is_another_chunk_and_found_when_read(tmp_path: Path):
    animals(tmp_path)
    source = folder(tmp_path)
    (chunk,) = source.chunks("test")
    tree(tmp_path, {"test/cat/0.png": png(picture(70))})
    assert folder(tmp_path).chunks("test")[0].id != chunk.id
    with pytest.raises(DataError, match="images have changed since the run was planned"):
        list(folder(tmp_path).read(chunk, 4))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"\x89PNG no image", "no image can be decoded"),
        (b"", "no image can be decoded"),
        (png(picture(1))[:60], "no image can be decoded"),
        (png(picture(1, 8, 8, 3)), "the image has 8 × 8 pixels, expected 4 × 5"),
    ],
)
def test_what_is_no_image_is_in_the_ledger(tmp_path: Path, bad: bytes, reason: str):
    animals(tmp_path)
    tree(tmp_path, {"test/dog/3.png": bad})
    source = folder(tmp_path, max_unreadable=0.5)
    (chunk,) = source.chunks("test")
    reading = source.read(chunk, 4)
    assert sum(batch.rows for batch in reading) == 5
    assert (reading.read, reading.unreadable, reading.excluded) == (5, 1, 0)
    assert reading.damage[0].reason.startswith(f"test/dog/3.png: {reason}")
    with pytest.raises(DataError, match=rf"test/dog/3\.png: {reason}.*; 1 of 6 rows"):
        read(folder(tmp_path), "test")


def test_other_sizes_and_colours_are_brought_to_the_shape_where_the_job_says(tmp_path: Path):
    tree(tmp_path, {"a/1.png": png(np.full((8, 10, 3), 51)), "a/2.jpg": png(np.full((4, 5), 51), "JPEG")})
    spec = {"train": "all", "measure": ("all",), "options": {"resize": True}}
    x, labels, _ = read(folder(tmp_path, (1, 4, 5), **spec), "all")
    np.testing.assert_allclose(x, 0.2, atol=1e-6)
    assert labels == [0, 0]


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_sixteen_bits_keeps_them(channels: int, kind: str):
    level_HW = np.random.default_rng(0).integers(0, 1 << 16, (4, 5)).astype(np.uint16)
    found = Pictures("image", (channels, 4, 5), resize=False).decode_all([encoded(level_HW, kind)])
    np.testing.assert_array_equal(found.parts[0][0], np.stack([level_HW.astype(np.float32) / 65535] * channels))
    even = encoded(np.full((8, 10), 13107, dtype=np.uint16), kind)
    found = Pictures("image", (channels, 4, 5), resize=True).decode_all([even])
    np.testing.assert_allclose(found.parts[0], 0.2, atol=1e-6)


@pytest.mark.parametrize("level", [np.float32(0.5), np.int32(70_000)])
def test_pixels_without_a_known_greatest_are_unreadable(level: Any):
    found = Pictures("image", (1, 4, 5), resize=True).decode_all([encoded(np.full((4, 5), level), "TIFF")])
    assert not found.usable_N.any()
    assert found.reason == "its pixels are 32 bits deep, which have no known greatest: expected 8, or 16 of grey"


def test_folders_that_are_not_what_they_should_be(tmp_path: Path):
    animals(tmp_path)
    with pytest.raises(DataError, match=r"folder 'cat' is none of `labels`; did you mean 'cats'"):
        folder(tmp_path, labels=("cats", "dog")).chunks("test")
    with pytest.raises(DataError, match=r"expected images as CLASS/FILE below `url`"):
        folder(tmp_path, train="all", measure=("all",)).chunks("all")
    with pytest.raises(JobError, match=r"columns\.shape: expected channels \(1 or 3\), height and width"):
        folder(tmp_path, (2, 4, 5)).chunks("test")
    assert folder(tmp_path).chunks("nowhere") == ()


def test_a_folder_on_object_storage_gives_the_same_rows(tmp_path: Path, s3_url: str):
    animals(tmp_path)
    store = open_store(s3_url)
    for path in tmp_path.rglob("*.png"):
        store.put_once(f"zoo/{path.relative_to(tmp_path)}", path.read_bytes())
    here, there = read(folder(tmp_path), "test"), read(folder(f"{s3_url}/zoo"), "test")
    assert torch.equal(here[0], there[0])
    assert here[1:] == there[1:]


def images(path: Path, values: list[Any], kind: pa.DataType | None = None, **spec: Any) -> Images:
    pq.write_table(pa.table({"image": pa.array(values, kind)}), path / "a.parquet")
    columns = Columns(features="image", shape=(3, 4, 5))
    return Images("zoo", DataSpec(url=str(path), columns=columns, **spec), open_store("memory://unused"))


@pytest.mark.parametrize("struct", [False, True])
def test_a_column_of_images(tmp_path: Path, struct: bool):
    pixels = [picture(seed) for seed in range(3)]
    values: list[Any] = [png(one) for one in pixels]
    if struct:
        values = [{"bytes": value, "path": "x.png"} for value in values]
    x, _, uids = read(images(tmp_path, values), "all")
    np.testing.assert_array_equal(x, (np.stack(pixels).transpose(0, 3, 1, 2) / 255).astype(np.float32))
    assert len(set(uids)) == 3


def test_a_corrupt_image_in_a_column_is_in_the_ledger(tmp_path: Path):
    values = [png(picture(0)), b"nothing", None, png(picture(3))]
    source = images(tmp_path, values, max_unreadable=0.5)
    (chunk,) = source.chunks("all")
    reading = source.read(chunk, 4)
    assert [batch.rows for batch in reading] == [2]
    assert [one.first_row for one in reading.damage] == [1, 2]
    with pytest.raises(DataError, match=r"a\.parquet, row 1: no image can be decoded.*; 2 of 4 rows"):
        read(images(tmp_path, values), "all")
    with pytest.raises(DataError, match=r"column 'image' is string, expected bytes of an image each"):
        images(tmp_path, ["text"]).chunks("all")


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(JobError, match=r"images need Pillow: pip install 'neuron-census\[images\]'"):
        read(images(tmp_path, [b"x"]), "all")
