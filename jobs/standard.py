"""The standard larger sets, from where their makers publish them, as Parquet: `python -m jobs.standard NAME`.

For machines with internet. Everything lands below `data/` beside this file, after its SHA-256 has been checked; of
files whose makers publish none, say `--sha256 HEX` once you have one that you trust. No file is unpickled, and archives
are read member by member, never unpacked.
"""

from __future__ import annotations

import argparse
import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.fetch import DATA, Download
from jobs.prepare import splits, write, write_univariate

GROUP_ROWS = 4096
CLICK_ROWS = 65_536
GOOD_RATING = 4

MNIST_FILES = "https://storage.googleapis.com/cvdf-datasets/mnist"
MNIST = {
    ("train", "images"): Download(
        f"{MNIST_FILES}/train-images-idx3-ubyte.gz", "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    ("train", "labels"): Download(
        f"{MNIST_FILES}/train-labels-idx1-ubyte.gz", "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    ("test", "images"): Download(
        f"{MNIST_FILES}/t10k-images-idx3-ubyte.gz", "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    ("test", "labels"): Download(
        f"{MNIST_FILES}/t10k-labels-idx1-ubyte.gz", "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
}
CIFAR = Download(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
MOVIELENS = Download(
    "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
    "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
)
CRITEO = Download("https://go.criteo.net/criteo-research-kaggle-display-advertising-challenge-dataset.tar.gz")
CORA = Download("https://linqs-data.soe.ucsc.edu/public/lbc/cora.tgz")
UCR = Download("https://timeseriesclassification.com/aeon-toolkit/FordA.zip")


def mnist(sha256: str) -> None:
    """MNIST (LeCun, Cortes & Burges 1998): 60,000 and 10,000 grey digits, as PNG."""
    for split in ("train", "test"):
        image_NP, label_N = (idx(MNIST[split, part].path().read_bytes()) for part in ("images", "labels"))
        write_pictures(f"mnist-60k/{split}", image_NP, label_N, split)


def idx(content: bytes) -> np.ndarray:
    """The array of bytes in a compressed IDX file: two zeros, a type, how many axes, their sizes, the values."""
    raw = gzip.decompress(content)
    axes = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=axes, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)


def cifar10(sha256: str) -> None:
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 colour images of ten kinds, as PNG."""
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    with tarfile.open(CIFAR.path()) as archive:
        for member in sorted(archive.getmembers(), key=lambda one: one.name):
            if member.name.endswith(".bin") and (file := archive.extractfile(member)) is not None:
                split = "test" if "test" in member.name else "train"
                parts[split].append(np.frombuffer(file.read(), dtype=np.uint8).reshape(-1, 1 + 3 * 32 * 32))
    for split, rows in parts.items():
        row_NP = np.concatenate(rows)
        image_NHWC = row_NP[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        write_pictures(f"cifar10/{split}", image_NHWC, row_NP[:, 0], split)


def write_pictures(name: str, image_N: np.ndarray, label_N: np.ndarray, split: str) -> None:
    """Images and their labels as a column of PNG files."""
    columns = {"image": [png(image) for image in image_N], "label": label_N.astype(np.int64)}
    write(name, {**columns, "split": [split] * len(label_N)}, group_rows=GROUP_ROWS)


def png(image: np.ndarray) -> bytes:
    """An image (H, W) or (H, W, 3) as a PNG file."""
    from PIL import Image  # only for images

    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(sink, format="PNG")
    return sink.getvalue()


def movielens(sha256: str) -> None:
    """MovieLens 100K (GroupLens; its README says what is allowed): is a film rated 4 or 5, by user and film?"""
    with zipfile.ZipFile(MOVIELENS.path()) as archive:
        rating_N4 = np.loadtxt(io.BytesIO(archive.read("ml-100k/u.data")), dtype=np.int64)
        users = [line.split("|") for line in archive.read("ml-100k/u.user").decode("latin-1").splitlines()]
        films = [line.split("|") for line in archive.read("ml-100k/u.item").decode("latin-1").splitlines()]
    user_of = {int(user[0]): user for user in users}
    film_of = {int(film[0]): film for film in films}
    user_N = [user_of[number] for number in rating_N4[:, 0].tolist()]
    film_N = [film_of[number] for number in rating_N4[:, 1].tolist()]
    columns = {
        "user": [user[0] for user in user_N],
        "age": [float(user[1]) for user in user_N],
        "gender": [user[2] for user in user_N],
        "occupation": [user[3] for user in user_N],
        "film": [film[1] for film in film_N],
        "year": [film[2][-4:] for film in film_N],
        "good": (rating_N4[:, 2] >= GOOD_RATING).astype(np.int64),
        "split": splits(len(rating_N4)),
    }
    write("movielens/ratings", columns, group_rows=8192)


NUMBERS = tuple(f"i{number}" for number in range(1, 14))
CATEGORIES = tuple(f"c{number}" for number in range(1, 27))


def criteo(sha256: str) -> None:
    """Criteo's display advertising challenge (2014): 45.8 million banners, 13 numbers, 26 categories, a click."""
    path = DATA / "criteo" / "clicks.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(CRITEO.path(sha256)) as archive:
        file = archive.extractfile("train.txt")
        assert file is not None
        writer: pq.ParquetWriter | None = None
        for table in clicks(line.decode() for line in file):
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()


def clicks(lines: Iterable[str]) -> Iterator[pa.Table]:
    """Lines of the challenge as tables: numbers as log(1 + x), null where there is none; every tenth row to test."""
    rows = enumerate(line.rstrip("\n").split("\t") for line in lines)
    while part := list(islice(rows, CLICK_ROWS)):
        columns: dict[str, list[object]] = {"clicked": [int(row[0]) for _, row in part]}
        for place, name in enumerate(NUMBERS, 1):
            columns[name] = [float(np.log1p(max(int(row[place]), 0))) if row[place] else None for _, row in part]
        for place, name in enumerate(CATEGORIES, 14):
            columns[name] = [row[place] or None for _, row in part]
        columns["split"] = ["test" if number % 10 == 0 else "train" for number, _ in part]
        yield pa.table(columns, schema=CLICKS)


CLICKS = pa.schema(
    [("clicked", pa.int64())]
    + [(name, pa.float32()) for name in NUMBERS]
    + [(name, pa.string()) for name in CATEGORIES]
    + [("split", pa.string())]
)


def cora(sha256: str) -> None:
    """Cora (Sen et al. 2008): 2,708 papers of seven kinds by the 1,433 words they hold, and who cites whom."""
    with tarfile.open(CORA.path(sha256)) as archive:
        papers, cites = (
            [line.split("\t") for line in file.read().decode().splitlines() if line]
            for name in ("cora/cora.content", "cora/cora.cites")
            if (file := archive.extractfile(name)) is not None
        )
    kinds = sorted({paper[-1] for paper in papers})
    nodes = {
        "paper": [paper[0] for paper in papers],
        "words": [[float(word) for word in paper[1:-1]] for paper in papers],
        "kind": [kinds.index(paper[-1]) for paper in papers],
        "split": splits(len(papers)),
    }
    write("cora/nodes", nodes, group_rows=len(papers))
    edges = {"target": [cited for cited, _ in cites], "source": [citing for _, citing in cites]}
    write("cora/edges", edges, group_rows=len(cites))


def ucr(sha256: str) -> None:
    """FordA of the UCR archive: 3,601 and 1,320 recordings of engines, 500 steps each; or another set of it."""
    with zipfile.ZipFile(UCR.path(sha256)) as archive:
        for name in archive.namelist():
            if name.endswith(("_TRAIN.ts", "_TEST.ts")):
                split = "train" if name.endswith("_TRAIN.ts") else "test"
                write_univariate(f"ucr/{split}", archive.read(name).decode(), split)


MAKERS: dict[str, Callable[[str], None]] = {
    "mnist": mnist,
    "cifar10": cifar10,
    "movielens": movielens,
    "criteo": criteo,
    "cora": cora,
    "ucr": ucr,
}


def main() -> None:
    """Make the data sets that are named."""
    arguments = argparse.ArgumentParser(prog="python -m jobs.standard", description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("name", choices=sorted(MAKERS))
    arguments.add_argument("--sha256", default="", help="of a file whose maker publishes none")
    chosen = arguments.parse_args()
    MAKERS[chosen.name](chosen.sha256)


if __name__ == "__main__":
    main()
