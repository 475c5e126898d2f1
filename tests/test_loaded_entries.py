"""What a table `load` asks for: refused where it cannot be, pinned, and what its models are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import CensusError, JobError
from pipeline.hashing import sha256
from pipeline.job import load_job
from pipeline.resolve import resolve
from pipeline.store import open_store
from tests.loaded import MLP, job_of, put, weights


def test_an_untrained_twin_is_named_by_all_that_decides_its_weights(tmp_path: Path) -> None:
    put(tmp_path / "c.safetensors", weights(0, "cnn", widths=(4, 4)))
    load = "url = 'c.safetensors', family = 'cnn', arguments = { widths = [4, 4] }"

    def ids(numerics: str) -> dict[str, str]:
        path = job_of(tmp_path, load)
        path.write_text(f"{path.read_text()}[numerics]\n{numerics}\n")
        return {one.name: one.id for one in resolve(load_job(path), open_store(str(tmp_path / "store"))).models}

    batches, threads, same = ids("batch_rows = 64"), ids("threads = 2"), ids("dtype = 'float64'")
    plain = ids("")
    assert plain["cnn-init"] == same["cnn-init"]
    assert len({one["cnn-init"] for one in (plain, batches, threads)}) == 3, "what its BatchNorm sees, and how"
    assert len({one["c"] for one in (plain, batches, threads, same)}) == 1


WRONG = [
    ("url = 'models/*', family = 'mpl'", "", "[models[0].load] family = \"mpl\": unknown; did you mean 'mlp'?"),
    ("url = 'models/*', famly = 'mlp'", "", "[models[0].load] famly: unknown key; did you mean 'family'?"),
    (f"{MLP}", "", "[models[0].load] url is missing: expected url = … (file, directory or glob"),
    ("url = 'models/*', family = 'mlp', arguments = { width = 3 }", "", "width: unknown key; did you mean 'widths'?"),
    ("url = 'models/*', family = 'mlp', arguments = { widths = 3 }", "", "[models[0].load.arguments] widths = 3: exp"),
    ("url = 'models/*', family = 'tcn'", "", "[models[0].load] family tcn takes series, the data has image"),
    ("url = 'models/*'", "", "[models[0].load] a file of weights alone says nothing of its model: name load.family"),
    ("url = 'models/*', builder = 'os:system'", "", "load.builder = 'os:system': package os is not allowed"),
    ("url = 'models/*', builder = 'pipeline.no:No'", "", "[models[0].load] pipeline.no cannot be imported on "),
    ("url = 'models/*', builder = 'torch.nn:Linear', family = 'mlp'", "", "expected it only without family"),
    (f"url = 'models/*', sha256 = '{'0' * 64}', {MLP}", "", "expected the sha256 of what is there, "),
    (f"url = 'models/*', sha256 = 'abc', {MLP}", "", '[models[0].load] sha256 = "abc": expected 64 hexadecimal digits'),
    (f"url = 'nowhere/*', {MLP}", "", "/nowhere/*: there is no such file or directory; expected at least one m"),
    (f"url = 'nowhere/*', {MLP}", "", "job.toml:9: [models[0].load] /"),
    (f"url = 's3://key:hunter2@x/y', {MLP}", "", "[models[0]] load.url must not hold credentials"),
    (f"url = 'models/*', {MLP}", "seeds = [1]", "[models[0]] seeds says how to train: expected it or load, not both"),
]


@pytest.mark.parametrize(("load", "keys", "said"), WRONG)
def test_a_table_that_cannot_be_is_refused_before_anything_is_done(
    tmp_path: Path, load: str, keys: str, said: str
) -> None:
    put(tmp_path / "models" / "a.safetensors", weights(0))
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(CensusError) as caught:
        resolve(load_job(job_of(tmp_path, load, keys)), store)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2
    assert "hunter2" not in str(caught.value)
    assert not store.keys("runs/")


def test_a_pin_that_fits_is_accepted(tmp_path: Path) -> None:
    pin = sha256(put(tmp_path / "models" / "a.safetensors", weights(0)))
    job = load_job(job_of(tmp_path, f"url = 'models/*', sha256 = '{pin}', {MLP}"))
    assert [one.name for one in resolve(job, open_store(str(tmp_path / "store"))).models] == ["a", "mlp-init"]


def test_a_glob_is_pinned_as_one(tmp_path: Path) -> None:
    lines = [
        f"{sha256(put(tmp_path / 'models' / f'{name}.safetensors', weights(seed)))}  {name}.safetensors\n"
        for seed, name in enumerate("ab")
    ]
    pin = sha256("".join(lines).encode())
    job = load_job(job_of(tmp_path, f"url = 'models/*', sha256 = '{pin}', {MLP}"))
    store = open_store(str(tmp_path / "store"))
    assert [one.name for one in resolve(job, store).models] == ["a", "b", "mlp-init"]
    put(tmp_path / "models" / "b.safetensors", weights(5))
    with pytest.raises(JobError, match=r"\[models\[0\].load\] sha256 = .*: expected the sha256 of what is there, "):
        resolve(job, store)


def test_names_of_entries_tell_their_models_apart(tmp_path: Path) -> None:
    for seed, folder in enumerate(("left", "right")):
        put(tmp_path / folder / "a.safetensors", weights(seed))
    path = job_of(tmp_path, f"url = 'left', {MLP}")
    second = f"[[models]]\ndata = 'digits'\nload = {{ url = 'right', {MLP} }}\n[statistics.response]"
    path.write_text(path.read_text().replace("[statistics.response]", second))
    store = open_store(str(tmp_path / "store"))
    said = r"job.toml:10: \[models\[1\]\] its model 'a' has the same name as 'a' of \[models\[0\]\], .*job.toml:6: give"
    with pytest.raises(JobError, match=said):
        resolve(load_job(path), store)
    path.write_text(path.read_text().replace("load = { url = 'right'", "name = 'second'\nload = { url = 'right'"))
    assert [one.name for one in resolve(load_job(path), store).models] == ["a", "mlp-init", "second-a"]
