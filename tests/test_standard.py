"""The standard larger sets on small files of their formats: fetched by URL, checked, and read by sources."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import fetch, prepare, standard
from jobs.fetch import Download
from pipeline.batch import Batch
from pipeline.job import load_job
from pipeline.registry import sources
from pipeline.store import open_store

LARGER = Path(__file__).parents[1] / "jobs" / "larger"
PIXELS = np.arange(4 * 28 * 28).reshape(4, 28, 28).astype(np.uint8)
COLOURS = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)


def idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return gzip.compress(header + values.astype(np.uint8).tobytes())


def tar(members: Mapping[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return sink.getvalue()


def zipped(members: Mapping[str, str]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return sink.getvalue()


def cifar(labels: list[int], images: np.ndarray) -> bytes:
    return b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True))


def banner(clicked: int, number: str, category: str) -> str:
    return "\t".join([str(clicked), *[number] * 13, *[category] * 26])


SERIES = "@problemName Small\n@data\n" + "".join(f"{','.join(['0.5'] * 500)}:{label}\n" for label in (-1, 1, -1))
FILES = {
    "MNIST": {
        ("train", "images"): idx(PIXELS),
        ("train", "labels"): idx(np.array([3, 1, 4, 1])),
        ("test", "images"): idx(PIXELS[:2]),
        ("test", "labels"): idx(np.array([5, 9])),
    },
    "CIFAR": tar(
        {
            "cifar-10-batches-bin/data_batch_1.bin": cifar([7, 8], COLOURS[:2]),
            "cifar-10-batches-bin/data_batch_2.bin": cifar([9], COLOURS[2:3]),
            "cifar-10-batches-bin/readme.html": b"...",
            "cifar-10-batches-bin/test_batch.bin": cifar([0, 1], COLOURS[3:]),
        }
    ),
    "MOVIELENS": zipped(
        {
            "ml-100k/u.data": "".join(f"{1 + row % 2}\t{1 + row % 3}\t{1 + row % 5}\t881250949\n" for row in range(20)),
            "ml-100k/u.user": "1|24|M|technician|85711\n2|53|F|other|94043\n",
            "ml-100k/u.item": "".join(f"{film}|Film {film} (1995)|01-Jan-1995||\n" for film in (1, 2, 3)),
        }
    ),
    "CRITEO": tar({"train.txt": "\n".join(banner(row % 2, str(row or ""), "68fd") for row in range(20)).encode()}),
    "CORA": tar(
        {
            "cora/cora.content": "\n".join(
                "\t".join([f"{31336 + paper}", *[f"{int(word == paper)}" for word in range(1433)], f"Kind_{paper % 7}"])
                for paper in range(12)
            ).encode(),
            "cora/cora.cites": "".join(f"{31336 + paper}\t{31337 + paper}\n" for paper in range(11)).encode(),
        }
    ),
    "UCR": zipped({"FordA_TRAIN.ts": SERIES, "FordA_TEST.ts": SERIES, "FordA.txt": "…"}),
}


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files at file:// URLs, and a folder that takes what is made of them."""
    for module in (fetch, prepare, standard):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    for name, content in FILES.items():
        if isinstance(content, bytes):
            monkeypatch.setattr(standard, name, at(tmp_path / f"{name}.file", content))
        else:
            parts = {key: at(tmp_path / f"{name}-{'-'.join(key)}", one) for key, one in content.items()}
            monkeypatch.setattr(standard, name, parts)
    return tmp_path


def at(path: Path, content: bytes) -> Download:
    path.write_bytes(content)
    return Download(path.as_uri(), hashlib.sha256(content).hexdigest())


def rows(job: str, split: str, folder: Path) -> Batch:
    """What the source of a job makes of the data that stands in `folder`."""
    spec = next(iter(load_job(LARGER / f"{job}.toml").data.values()))
    spec._directory = str(folder / "jobs")
    source = sources()[spec.source](job, spec, open_store(str(folder / "store")))
    (batch,) = [batch for chunk in source.chunks(split) for batch in source.read(chunk, 100)]
    return batch


@pytest.mark.parametrize("name", sorted(standard.MAKERS))
def test_each_becomes_rows_that_its_job_reads(published: Path, name: str):
    standard.MAKERS[name]("")
    counts = {"mnist": (4, 2), "cifar10": (3, 2), "criteo": (18, 2), "ucr": (3, 3)}
    train, test = rows(name, "train", published), rows(name, "test", published)
    if name in counts:
        assert (train.rows, test.rows) == counts[name]
    shapes = {
        "mnist": [(1, 28, 28)],
        "cifar10": [(3, 32, 32)],
        "movielens": [(1,), (5,)],
        "criteo": [(26,), (26,)],
        "ucr": [(1, 500)],
    }
    if name in shapes:
        assert [tuple(one.shape[1:]) for one in train.inputs] == shapes[name]


def test_pixels_are_where_they_were(published: Path):
    standard.mnist("")
    train = rows("mnist", "train", published)
    assert torch.equal(train.inputs[0], torch.tensor(PIXELS[:, None]) / 255)
    assert train.label_N is not None
    assert train.label_N.tolist() == [3, 1, 4, 1]
    standard.cifar10("")
    train = rows("cifar10", "train", published)
    assert torch.equal(train.inputs[0], torch.tensor(COLOURS[:3]) / 255)
    assert train.label_N is not None
    assert train.label_N.tolist() == [7, 8, 9]


def test_papers_are_joined_by_who_cites_whom(published: Path):
    standard.cora("")
    graph = rows("cora", "train", published)
    x_VD, edge_2E = graph.inputs
    assert torch.equal(x_VD, torch.eye(1433)[:12])
    assert edge_2E.tolist() == [list(range(1, 12)), list(range(11))]


def test_numbers_that_are_missing_are_filled_and_clicks_what_they_were(published: Path):
    standard.criteo("")
    table = standard.pq.read_table(published / "data" / "criteo" / "clicks.parquet")
    np.testing.assert_allclose(table["i13"].to_numpy(), [np.nan, *np.log1p(np.arange(1, 20))], rtol=1e-6)
    numbers, flags = rows("criteo", "test", published).inputs[0].split(13, 1)
    assert torch.equal(flags, torch.tensor([[1.0], [0.0]]).expand(2, 13))
    assert (numbers[0] == 0).all()
    assert table["clicked"].to_pylist() == [row % 2 for row in range(20)]
    assert table["split"].to_pylist()[:11] == ["test", *["train"] * 9, "test"]


@pytest.mark.parametrize(
    ("download", "given", "message"),
    [
        (("right", ""), "", r"no checksum is published for it; if you trust SHA-256 \w{64}, say so: --sha256"),
        (("right", "0" * 64), "", "SHA-256 .*, expected 0000.*: delete it and try again"),
        (("right", ""), "f" * 64, "SHA-256 .*, expected ffff"),
        (("nowhere", ""), "", "nowhere: cannot be fetched: .*this data set needs the internet"),
    ],
)
def test_what_is_not_what_it_should_be_is_not_read(
    published: Path, download: tuple[str, str], given: str, message: str
):
    (published / "right").write_bytes(b"content")
    url = (published / download[0]).as_uri()
    with pytest.raises(SystemExit, match=message):
        Download(url, download[1]).path(given)
    assert not list(published.glob("data/downloads/*.part")) or download[0] == "nowhere"


def test_a_checksum_that_is_given_is_enough(published: Path):
    (published / "right").write_bytes(b"content")
    path = Download((published / "right").as_uri()).path(hashlib.sha256(b"content").hexdigest().upper())
    assert path.read_bytes() == b"content"
