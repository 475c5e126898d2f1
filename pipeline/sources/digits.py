"""The 1,797 handwritten digits of 8 × 8 pixels that scikit-learn ships, staged in the store as Parquet.

Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (CC BY 4.0). The uid of a row is its number in
scikit-learn's data set, so that `load_digits().images[uid]` is an exemplar. A row is for testing where splitmix64(uid),
its lower 63 bits, is in the lowest fifth of their range (357 rows), else for training: a rule without order or seed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError, JobError
from pipeline.hashing import sha256, splitmix64
from pipeline.inputs import InputFile
from pipeline.job_sections import Columns, DataSpec
from pipeline.rows.footers import Footer, parse_footer
from pipeline.sources.base import RowGroupSource
from pipeline.store import Store

GROUP_ROWS = 100
TEST_BELOW = 2**63 // 5
GREATEST = 16.0  # pixels are 0 to 16
COLUMNS = Columns(features="image", label="label", key="index", split="split", shape=(1, 8, 8))


class Digits(RowGroupSource):
    """Two training files and a test file, each of several row groups; one input of shape (1, 8, 8), scaled to 0…1."""

    name: ClassVar[str] = "digits"

    def __init__(self, data: str, spec: DataSpec, store: Store) -> None:
        super().__init__(data, spec.model_copy(update={"columns": COLUMNS, "classes": 10}), store)
        for key in ("url", "columns", "classes", "labels"):
            if key in spec.model_fields_set:
                raise self.refusal(key, "source 'digits' knows it by itself; leave it out")

    def footers(self) -> Sequence[Footer]:
        """The footers of the files, made in memory: planning writes nothing."""
        return [
            parse_footer(name, InputFile(f"{self.store.url}/{name}", len(content), ""), io.BytesIO(content))
            for name, content in _files().items()
        ]

    def locate(self, name: str) -> str:
        """Where the file is in the store, staged there if it is not yet."""
        if name not in self.store.keys(name):
            if name not in _files():
                raise DataError(f"data {self.data}: {name} was planned with another version of pyarrow or scikit-learn")
            self.store.put_once(name, _files()[name])
        return f"{self.store.url}/{name}"


@cache
def _files() -> Mapping[str, bytes]:
    """Every file by its key in the store, which names its content."""
    try:
        from sklearn.datasets import load_digits  # seconds, and only where nothing is staged yet
    except ImportError as error:
        raise JobError("source 'digits' needs scikit-learn: pip install 'neuron-census[demo]'") from error
    image_NP, label_N = load_digits(return_X_y=True)
    uids = range(len(label_N))
    test = [uid for uid in uids if splitmix64(uid) < TEST_BELOW]
    train = sorted(set(uids) - set(test))
    half = len(train) // 2
    files = {}
    for name, chosen in (("train-0", train[:half]), ("train-1", train[half:]), ("test", test)):
        content = _parquet(image_NP[chosen] / GREATEST, label_N[chosen], chosen, name.partition("-")[0])
        files[f"data/digits/{name}-{sha256(content)[:12]}.parquet"] = content
    return files


def _parquet(image_NP: np.ndarray, label_N: np.ndarray, uids: Sequence[int], split: str) -> bytes:
    table = pa.table(
        {
            "index": pa.array(uids, pa.int64()),
            "image": pa.array(list(image_NP.astype(np.float32)), pa.list_(pa.float32())),
            "label": pa.array(label_N, pa.int64()),
            "split": pa.array([split] * len(uids), pa.string()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=GROUP_ROWS)
    content: bytes = sink.getvalue().to_pybytes()
    return content


SOURCE = Digits
