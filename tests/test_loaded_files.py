"""Loaded models and the files that they are in: gone, changed, the same, in a bucket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.errors import DataError
from pipeline.executor import InlineExecutor
from pipeline.filesystems import filesystem
from pipeline.job import load_job
from pipeline.manifest import manifest_key
from pipeline.resolve import resolve
from pipeline.run import run
from pipeline.store import open_store
from tests.loaded import MLP, job_of, put, table, take, weights


def test_files_may_be_gone_once_they_are_in_the_store(tmp_path: Path) -> None:
    put(tmp_path / "models" / "a.safetensors", weights(0))
    store = open_store(str(tmp_path / "store"))
    resolved = resolve(load_job(job_of(tmp_path)), store)
    (tmp_path / "models" / "a.safetensors").unlink()
    with pytest.raises(DataError, match="no such file"):
        take(job_of(tmp_path), store)
    assert resolved.models[0].name == "a"


class Replacing(InlineExecutor):
    """Lets somebody replace a file after it was named, before it is read."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content = path, content

    def map(self, function, tasks):
        if tasks and type(tasks[0]).__name__ == "LoadTask":
            self.path.write_bytes(self.content)
        return super().map(function, tasks)


def test_a_file_that_changes_under_a_run_leaves_it_open(tmp_path: Path) -> None:
    path = tmp_path / "models" / "a.safetensors"
    put(path, weights(0))
    other = put(tmp_path / "other.safetensors", weights(1))
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(DataError, match=r"a: .*its sha256 is .* it was changed; run again"):
        run(load_job(job_of(tmp_path)), store, Replacing(path, other))
    outcome = take(job_of(tmp_path), store)
    assert (outcome.loaded, outcome.failed) == (1, {})


def test_files_of_the_same_content_are_one_model(tmp_path: Path) -> None:
    for name in ("last", "best"):
        put(tmp_path / "models" / f"{name}.safetensors", weights(0))
    store = open_store(str(tmp_path / "store"))
    models = table(store, take(job_of(tmp_path), store).run, "models").set_index("name")
    assert sorted(models.index) == ["best", "mlp-init"]
    assert models.loc["best", "loaded_from"] == "models/best.safetensors, models/last.safetensors"


def test_models_may_be_links_and_one_to_nothing_is_named(tmp_path: Path) -> None:
    put(tmp_path / "models" / "a.safetensors", weights(0))
    put(tmp_path / "blobs" / "0123", weights(1))
    (tmp_path / "models" / "b.safetensors").symlink_to("../blobs/0123")
    (tmp_path / "linked").symlink_to("models")
    for url in ("models", "models/*.safetensors", "link*"):
        path = job_of(tmp_path, f"url = '{url}', {MLP}")
        resolved = resolve(load_job(path), open_store(str(tmp_path / "store")))
        assert [one.name for one in resolved.models] == ["a", "b", "mlp-init"]
    (tmp_path / "models" / "c.safetensors").symlink_to("../blobs/none")
    for url in ("models", "models/*", "link*"):
        with pytest.raises(DataError, match=r"c\.safetensors: a link to \.\./blobs/none, which is nothing"):
            resolve(load_job(job_of(tmp_path, f"url = '{url}', {MLP}")), open_store(str(tmp_path / "store")))


def test_files_that_differ_in_their_endings_alone_are_told_apart_by_them(tmp_path: Path) -> None:
    put(tmp_path / "models" / "a.safetensors", weights(0))
    torch.save(weights(1), tmp_path / "models" / "a.pt")
    put(tmp_path / "models" / "b.1.safetensors", weights(2))
    put(tmp_path / "models" / "b.2.safetensors", weights(3))
    resolved = resolve(load_job(job_of(tmp_path)), open_store(str(tmp_path / "store")))
    assert [one.name for one in resolved.models] == ["a.pt", "a.safetensors", "b.1", "b.2", "mlp-init"]
    assert len({one.id for one in resolved.models}) == 5


def test_what_a_store_held_before_changes_no_byte_of_a_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / f"{name}.safetensors", weights(0))
    used, fresh = (open_store(str(tmp_path / name)) for name in ("used", "fresh"))
    take(job_of(tmp_path, f"url = 'a.safetensors', {MLP}"), used)
    runs = [take(job_of(tmp_path, f"url = 'b.safetensors', {MLP}"), store).run for store in (used, fresh)]
    assert used.get(manifest_key(runs[0])) == fresh.get(manifest_key(runs[1]))


def test_models_lie_in_a_bucket(tmp_path: Path, s3_url: str) -> None:
    fs, root = filesystem(f"{s3_url}/zoo")
    for seed in range(2):
        fs.pipe_file(f"{root}/{seed}.safetensors", safetensors.torch.save(weights(seed)))
    store = open_store(s3_url)
    outcome = take(job_of(tmp_path, f"url = '{s3_url}/zoo/*.safetensors', {MLP}"), store)
    assert (outcome.loaded, outcome.failed) == (3, {})
    assert len(store.keys("data/digests/")) == 1
    models = table(store, outcome.run, "models").set_index("name")
    assert models.loc["1", "loaded_from"] == f"{s3_url}/zoo/1.safetensors"


def test_what_was_hashed_is_not_read_again(tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, root = filesystem(f"{s3_url}/zoo")
    for seed in range(2):
        fs.pipe_file(f"{root}/{seed}.safetensors", safetensors.torch.save(weights(seed)))
    job = load_job(job_of(tmp_path, f"url = '{s3_url}/zoo/*.safetensors', {MLP}"))
    store = open_store(s3_url)
    first = resolve(job, store)
    first.findings.release()
    read: list[str] = []
    monkeypatch.setattr("pipeline.foreign.digests.digests_of", lambda model: read.append(model.name) or {"x": "y"})
    assert resolve(job, store).run == first.run
    fs.pipe_file(f"{root}/1.safetensors", safetensors.torch.save(weights(5)))
    monkeypatch.undo()
    assert resolve(job, store).run != first.run
    assert read == []


def test_a_file_written_just_now_is_read_again(tmp_path: Path) -> None:
    put(tmp_path / "models" / "a.safetensors", weights(0))
    store = open_store(str(tmp_path / "store"))
    resolve(load_job(job_of(tmp_path)), store).findings.release()
    assert [json.loads(store.get(key)) for key in store.keys("data/digests/")] in ([], [{}])
