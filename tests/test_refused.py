"""A job that is refused leaves no trace, however late its mistake shows: not even what was counted or hashed for it."""

from __future__ import annotations

import errno
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
from click.testing import CliRunner, Result

from pipeline.cli import cli
from pipeline.cluster.jobs import JobServer
from pipeline.executor import InlineExecutor
from pipeline.job import load_job
from pipeline.models.base import Task
from pipeline.resolve import resolve
from pipeline.sources.tabular import Tabular
from pipeline.store import open_store
from tests.models.build import build
from tests.servers import RayNode, wait_for

JOB = """
name = "refused"
[data.table]
source = "tabular"
url = "{folder}/rows.parquet"
classes = 2
columns = {{ features = ["size"], label = "label", split = "split" }}
options = {{ categories = ["colour"] }}
{models}
[[models]]
family = "deepfm"
data = "table"
training = {{ steps = 2 }}
[statistics.response]
{more}
"""
MISTAKES = {
    "states that no memory holds": ("[statistics.exemplars]\nk = 100000000000", "the states would take"),
    "states that outgrow the limit": ("[resources]\nmax_state_gib = 1e-9", "the states would take"),
    "sites that no model has": ('[sites]\ninclude = ["kind:lstm"]', "expected patterns that leave a site"),
}
LOADED = '[[models]]\ndata = "table"\nload = {{ url = "{folder}/models/*", {load} }}'


def write_job(folder: Path, *, models: str = "", more: str = "") -> str:
    rows = {
        "size": [0.5, 1.5, 2.5, 3.5] * 8,
        "colour": ["red", "green"] * 16,
        "label": [0, 1] * 16,
        "split": ["train"] * 24 + ["test"] * 8,
    }
    pq.write_table(pa.table(rows), folder / "rows.parquet")
    path = folder / "job.toml"
    path.write_text(JOB.format(folder=folder, models=models, more=more))
    return str(path)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, env={"COLUMNS": "250"})


def refused(done: Result, said: str) -> None:
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize(
    "command", [["plan"], ["run", "--ray", "none"], ["run", "--ray", "local"], ["run", "--ray", "none", "--prefect"]]
)
def test_what_only_the_plan_shows(command: list[str], mistake: str, tmp_path: Path) -> None:
    more, said = MISTAKES[mistake]
    job, store = write_job(tmp_path, more=more), tmp_path / "store"
    refused(call(command[0], job, *command[1:], "--store", str(store)), said)
    assert not store.exists()


def test_every_part_of_a_job_that_names_what_is_not_is_said_at_once(tmp_path: Path) -> None:
    job = Path(write_job(tmp_path, models='[[models]]\nfamily = "mpl"\ndata = "table"'))
    text = job.read_text().replace('source = "tabular"', 'source = "tabula"')
    job.write_text(text.replace("steps = 2", "step = 2").replace("statistics.response", "statistics.respons"))
    done = call("plan", str(job), "--store", str(tmp_path / "store"))
    for said in (
        "job.toml:4: [data.table] source",
        "job.toml:10: [models[0]] family",
        "job.toml:15: [models[1].training] step",
        "[statistics]",
    ):
        refused(done, said)
    assert len(done.output.splitlines()) == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            'train = "tran"',
            'job.toml:6: [data.table] train = "tran": expected a split with rows to train on; did you mean '
            "'train'? known: test, train\n",
        ),
        (
            'measure = ["train", "valid"]',
            'job.toml:6: [data.table] measure = ["train", "valid"]: expected splits with rows to measure, and there is '
            "none of 'valid'; known: test, train\n",
        ),
        # between the two that there are, of which the only row group has both
        (
            'measure = ["testing"]',
            'job.toml:6: [data.table] measure = ["testing"]: expected splits with rows to measure, and there is '
            "none of 'testing'; did you mean 'test'? known: test, train\n",
        ),
        (
            'train = "traim"',
            'job.toml:6: [data.table] train = "traim": expected a split with rows to train on; did you mean '
            "'train'? known: test, train\n",
        ),
    ],
)
@pytest.mark.parametrize("command", [["plan"], ["run", "--ray", "none"]])
def test_a_split_without_rows(command: list[str], given: str, said: str, tmp_path: Path) -> None:
    job = Path(write_job(tmp_path))
    job.write_text(job.read_text().replace("classes = 2\n", f"{given}\nclasses = 2\n"))
    # numbers alone: what the training rows hold is counted before
    job.write_text(job.read_text().replace('options = { categories = ["colour"] }\n', ""))
    refused(call(*command, str(job), "--store", str(tmp_path / "store")), said)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (', split = "split"', "it has no rows, or none with a split in column 'split': expected some to train on"),
        ("", "it has no rows: expected some to train on and to measure"),
    ],
)
def test_data_without_rows(split: str, said: str, tmp_path: Path) -> None:
    job = Path(write_job(tmp_path))
    job.write_text(job.read_text().replace(', split = "split"', split))
    pq.write_table(pq.read_table(tmp_path / "rows.parquet").slice(0, 0), tmp_path / "rows.parquet")
    for options in ('options = { categories = ["colour"] }\n', ""):
        job.write_text(job.read_text().replace('options = { categories = ["colour"] }\n', options))
        done = call("plan", str(job), "--store", str(tmp_path / "store"))
        refused(done, f"job.toml:3: [data.table] {said}")
        assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("what", ["rows.parquet", "models/a.safetensors"])
def test_a_file_that_may_not_be_read_is_said_where_the_job_names_it(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.safetensors").write_bytes(b"weights")
    job = write_job(tmp_path, models=LOADED.format(folder=tmp_path, load="family = 'deepfm'"))

    # who runs the tests may be allowed to read everything
    def guarded(path: str, mode: str) -> IO[bytes]:
        if path.endswith(what):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open(path, mode)

    monkeypatch.setattr("pipeline.inputs.open", guarded, raising=False)
    done = call("plan", job, "--store", str(tmp_path / "store"))
    said = f"{tmp_path}/{what}: cannot be read: access denied (PermissionError): its operator must allow reading and "
    refused(done, said)
    refused(done, "job.toml:3: [data.table] " if what == "rows.parquet" else "job.toml:11: [models[0].load] ")


@pytest.mark.parametrize("command", [["plan"], ["run", "--ray", "none"]])
def test_data_that_are_not_there_yet_name_what_makes_them(command: list[str], tmp_path: Path) -> None:
    job = Path(write_job(tmp_path))
    job.write_text(job.read_text().replace("classes = 2\n", 'made_by = "make rows"\nclasses = 2\n'))
    there = resolve(load_job(job), open_store("memory://unused")).run
    (tmp_path / "rows.parquet").rename(tmp_path / "others.parquet")
    said = f"job.toml:3: [data.table] {tmp_path}/rows.parquet: there is no such file, directory or match; expected at "
    refused(call(*command, str(job), "--store", str(tmp_path / "store")), said)
    refused(call(*command, str(job), "--store", str(tmp_path / "store")), "data file; make it by: make rows\n")
    assert not (tmp_path / "store").exists()
    # how data came to be is not what is measured
    (tmp_path / "others.parquet").rename(tmp_path / "rows.parquet")
    job.write_text(job.read_text().replace('made_by = "make rows"\n', ""))
    assert resolve(load_job(job), open_store("memory://unused")).run == there


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.real
def test_what_only_the_plan_shows_is_not_submitted(mistake: str, ray_head: RayNode, tmp_path: Path) -> None:
    wait_for(lambda: JobServer(ray_head.jobs), timeout_s=120)
    more, said = MISTAKES[mistake]
    job, store = write_job(tmp_path, more=more), tmp_path / "store"
    refused(call("submit", job, "--ray", ray_head.jobs, "--store", str(store)), said)
    assert not store.exists()


@pytest.mark.parametrize(
    ("load", "said"),
    [("sha256 = '" + "0" * 64 + "'", "expected the sha256 of what is there"), ("", "the states would take")],
)
def test_what_was_hashed_of_models_from_elsewhere(load: str, said: str, tmp_path: Path) -> None:
    task = Task((1,), 2, (3,))
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "a.safetensors"
    path.write_bytes(safetensors.torch.save(dict(build("deepfm", task).state_dict())))
    os.utime(path, (time.time() - 60,) * 2)
    models = LOADED.format(folder=tmp_path, load="family = 'deepfm'" + (f", {load}" if load else ""))
    job, store = write_job(tmp_path, models=models, more=MISTAKES["states that outgrow the limit"][0]), tmp_path / "s"
    for command in (["plan"], ["run", "--ray", "none"]):
        refused(call(command[0], job, *command[1:], "--store", str(store)), said)
        assert not store.exists()


def test_a_plan_keeps_what_it_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, store = write_job(tmp_path), str(tmp_path / "store")
    assert call("plan", job, "--store", store).exit_code == 0
    (counted,) = open_store(store).keys()
    assert counted.startswith("data/vocabularies/")
    monkeypatch.setattr(Tabular, "training_rows", lambda self, features: pytest.fail("counted again"))
    resolve(load_job(job), open_store(store))
    assert call("run", job, "--ray", "none", "--store", store).exit_code == 0


@pytest.mark.parametrize("ray", ["none", "local"])
def test_a_run_counts_once(ray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    counted = Tabular.training_rows
    monkeypatch.setattr(Tabular, "training_rows", lambda *given: passes.append(1) or counted(*given))
    # Ray takes seconds to start, and has no part in it
    monkeypatch.setattr("pipeline.cluster.executor.ray_executor", lambda *_: nullcontext(InlineExecutor()))
    done = call("run", write_job(tmp_path), "--ray", ray, "--store", str(tmp_path / "store"))
    assert (done.exit_code, passes) == (0, [1]), done.output
