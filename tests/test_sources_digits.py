"""The digits of scikit-learn: what they are, and how they get into the store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pipeline.errors import DataError, JobError
from pipeline.hashing import splitmix64
from pipeline.job_sections import DataSpec
from pipeline.sources.base import Chunk
from pipeline.sources.digits import Digits
from pipeline.store import open_store
from tests.row_files import joined, read_all


def digits(store_url: str, **spec: Any) -> Digits:
    return Digits("digits", DataSpec(source="digits", **spec), open_store(store_url))


def test_digits_are_those_of_scikit_learn(tmp_path: Path):
    source = digits(str(tmp_path), chunk_rows=200)
    assert source.shape == (1, 8, 8)
    assert source.classes == 10
    image, label = load_digits(return_X_y=True)
    seen: list[int] = []
    for split in ("train", "test"):
        x, uid_N, label_N = joined(read_all(source, split, 64)[0])
        assert x.shape[1:] == (1, 8, 8)
        np.testing.assert_array_equal(x.reshape(-1, 64).numpy() * 16, image[uid_N])
        np.testing.assert_array_equal(label_N, label[uid_N])
        assert all((splitmix64(uid) < 2**63 // 5) == (split == "test") for uid in uid_N.tolist())
        seen += uid_N.tolist()
    assert sorted(seen) == list(range(1797))
    assert 0.19 < len(uid_N) / 1797 < 0.21


def test_planning_digits_writes_nothing_and_reading_stages_them_once(tmp_path: Path):
    source = digits(str(tmp_path))
    chunks = source.chunks("test")
    assert list(tmp_path.iterdir()) == []
    list(source.read(chunks[0], 64))
    assert [key.rpartition("-")[0] for key in source.store.keys("")] == ["data/digits/test"]
    read_all(source, "train")
    assert len(source.store.keys("data/digits/")) == 3


def test_digits_are_the_same_chunks_in_every_store(tmp_path: Path, s3_url: str):
    here, there = digits(str(tmp_path)), digits(s3_url)
    assert here.chunks("train") == there.chunks("train")
    for one, other in zip(joined(read_all(here, "test")[0]), joined(read_all(there, "test")[0]), strict=True):
        assert torch.equal(one, other)


def test_digits_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pipeline.sources import digits as module

    module._files.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(JobError, match=r"needs scikit-learn: pip install 'neuron-census\[demo\]'"):
        digits(str(tmp_path)).chunks("test")


def test_digits_staged_elsewhere_by_other_versions(tmp_path: Path):
    source = digits(str(tmp_path))
    (chunk,) = source.chunks("test")
    other = Chunk(**{**vars(chunk), "url": "data/digits/test-000000000000.parquet"})
    with pytest.raises(DataError, match="planned with another version of pyarrow or scikit-learn"):
        list(source.read(other, 64))


def test_digits_take_no_url(tmp_path: Path):
    with pytest.raises(JobError, match=r"\[data\.digits\] url: source 'digits' knows it by itself"):
        digits(str(tmp_path), url="s3://elsewhere")
