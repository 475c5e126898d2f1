"""Jobs of a real cluster: submitted once, followed, read, cancelled, gone on with; and what is refused before that."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline.cli import cli
from pipeline.cluster.jobs import JobServer
from pipeline.errors import JobError, StoreError
from pipeline.executor import InlineExecutor
from pipeline.job import load_job
from pipeline.run import run
from pipeline.store import open_store
from pipeline.submission import latest, submissions, submit
from tests.census import published
from tests.durability.schedules import tiny_job
from tests.servers import RayNode, free_port, wait_for, wait_until, workers_of

LONG = """
name = "long"
[data.digits]
source = "digits"
[[models]]
family = "mlp"
data = "digits"
hyperparameters = { widths = [256, 256] }
training = { steps = 100_000 }
[statistics.weights]
"""


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, env={"COLUMNS": "250"})


@pytest.fixture(scope="module")
def head(ray_head: RayNode) -> RayNode:
    """The head, once its dashboard serves: it starts after the rest."""
    wait_for(lambda: JobServer(ray_head.jobs), timeout_s=120)
    return ray_head


def job_anywhere(directory: Path) -> Path:
    """The tiny job, on rows that every node finds."""
    tiny_job(directory)
    path = directory / "job.toml"
    path.write_text(path.read_text().replace('url = "rows"', f'url = "{directory}/rows"'))
    return path


@pytest.mark.real
def test_a_job_is_submitted_once_and_changes_no_byte(head: RayNode, tmp_path: Path) -> None:
    path, store = job_anywhere(tmp_path), open_store(str(tmp_path / "store"))
    expected = open_store(str(tmp_path / "inline"))
    run_id = run(load_job(path), expected, InlineExecutor()).run
    submitted = call("submit", str(path), "--store", store.url, "--ray", head.jobs)
    assert submitted.output.startswith(f"run {run_id}: submitted as census-{run_id}-"), submitted.output
    again = call("submit", str(path), "--store", store.url, "--ray", head.jobs, "--follow")
    assert again.exit_code == 0, again.output
    assert again.output.startswith(f"run {run_id}: already at work as census-{run_id}-"), again.output
    assert published(store, run_id) == published(expected, run_id)
    assert call("submit", str(path), "--store", store.url, "--ray", head.jobs).output == (
        f"run {run_id} is already committed\n"
    )
    (job,) = submissions(head.jobs, run_id)
    assert (job.run, job.store, job.status) == (run_id, store.url, "SUCCEEDED")
    assert f"{run_id}  {store.url}" in call("status", run_id[:6], "--ray", head.jobs).output
    assert "measure" in call("logs", run_id[:6], "--ray", head.jobs).output


@pytest.mark.slow
@pytest.mark.real
def test_a_job_is_cancelled_and_goes_on_where_it_was(head: RayNode, tmp_path: Path) -> None:
    path, url = tmp_path / "job.toml", str(tmp_path / "store")
    path.write_text(LONG)
    first = submit(str(path), url, head.jobs)
    wait_until(lambda: workers_of(head), timeout_s=120)
    cancelled = call("cancel", first.run, "--ray", head.jobs)
    assert cancelled.output == f"run {first.run}: {first.job} is STOPPED\n"
    wait_until(lambda: workers_of(head) == [], timeout_s=10)
    second = submit(str(path), url, head.jobs)
    assert (second.is_new, second.job) == (True, f"{str(first.job)[:-2]}-2")
    assert submit(str(path), url, head.jobs).job == second.job
    assert latest(head.jobs, first.run).id == second.job
    call("cancel", first.run, "--ray", head.jobs)


def test_what_only_this_machine_has_is_not_submitted(tmp_path: Path) -> None:
    tiny_job(tmp_path)
    path = str(tmp_path / "job.toml")
    with pytest.raises(JobError, match=r"data.tiny.url = 'rows' is relative to the job file.*give a URL"):
        submit(path, "s3://bucket", "http://head:8265")
    with pytest.raises(StoreError, match=r"store ./census: a directory of this machine; a cluster needs s3://"):
        submit(str(job_anywhere(tmp_path)), "./census", "http://head:8265")


@pytest.mark.parametrize(
    ("address", "said"),
    [("head:6379", "jobs go to the address of the cluster's dashboard, http://HOST:8265"), (None, "does not answer")],
)
def test_a_cluster_that_takes_no_jobs_is_named(address: str | None, said: str, tmp_path: Path) -> None:
    address = address or f"http://127.0.0.1:{free_port()}"
    given = call("submit", str(job_anywhere(tmp_path)), "--store", str(tmp_path / "store"), "--ray", address)
    assert given.exit_code == 2
    assert given.output.startswith("error: ")
    assert address in given.output
    assert said in given.output
    assert not (tmp_path / "store").exists()
    assert "error: " in call("logs", "aa", "--ray", address).output
