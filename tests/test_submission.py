"""Jobs of a real cluster: submitted once, followed, read, cancelled, gone on with; and what is refused before that."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline.cli import cli
from pipeline.cluster.jobs import JobServer, Submission
from pipeline.errors import JobError, StoreError
from pipeline.executor import InlineExecutor
from pipeline.job import load_job
from pipeline.run import run
from pipeline.store import open_store
from pipeline.submission import _refuse_own_files, chosen, latest, submissions, submit
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


@pytest.mark.slow
@pytest.mark.real
def test_each_store_has_its_job_of_a_run(head: RayNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, url, other = tmp_path / "job.toml", str(tmp_path / "store"), str(tmp_path / "other")
    path.write_text(LONG)
    first, second = submit(str(path), url, head.jobs), submit(str(path), other, head.jobs)
    assert (first.run, first.job != second.job) == (second.run, True)
    for command in ("logs", "cancel"):
        refused = call(command, first.run, "--ray", head.jobs)
        assert refused.exit_code == 2
        assert f"{other}, {url}; choose one" in refused.output
    stopped = call("cancel", first.run, "--ray", head.jobs, "--store", url)
    assert stopped.output == f"run {first.run}: {first.job} is STOPPED\n"
    assert submit(str(path), other, head.jobs).job == second.job, "at work still"
    # what has ended in the other store is nobody's choice any more
    assert call("cancel", first.run, "--ray", head.jobs).output == f"run {first.run}: {second.job} is STOPPED\n"
    followed = call("logs", first.run, "--ray", head.jobs, "--store", url, "--follow")
    assert followed.exit_code == 1
    # submitted from where nothing compiles the kernel
    monkeypatch.setattr("pipeline.kernels.native_build.kernel", lambda: "no compiler here")
    third = call("submit", str(path), "--store", str(tmp_path / "third"), "--ray", head.jobs)
    assert "on this machine statistics run on the reference kernel, several times slower: no compiler" in third.output
    assert "the run has another id in the store" in third.output
    called = third.output.split()[1].rstrip(":")
    assert called != first.run
    assert call("cancel", called, "--ray", head.jobs).exit_code == 0


def test_what_only_this_machine_has_is_not_submitted(tmp_path: Path) -> None:
    tiny_job(tmp_path)
    path = str(tmp_path / "job.toml")
    with pytest.raises(JobError, match=r"data.tiny.url = 'rows' is relative to the job file.*give a URL"):
        submit(path, "s3://bucket", "http://head:8265")
    with pytest.raises(StoreError, match=r"store ./census: a directory of this machine; a cluster needs s3://"):
        submit(str(job_anywhere(tmp_path)), "./census", "http://head:8265")


GRAPH = """
name = "graph"
[data.cora]
source = "graph"
url = "s3://rows/nodes.parquet"
classes = 2
columns = {{ features = ["x"], label = "y", split = "split" }}
options = {{ edges = "{edges}" }}
[[models]]
family = "gcn"
data = "cora"
[statistics.weights]
"""


def test_other_files_of_a_source_are_not_submitted_either(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(GRAPH.format(edges="edges/*.parquet"))
    with pytest.raises(JobError, match=r"cora.options.edges = 'edges/\*.parquet' is relative to the job file.*s3://"):
        submit(str(path), "s3://bucket", HEAD)
    path.write_text(GRAPH.format(edges="s3://rows/edges/*.parquet"))
    _refuse_own_files(load_job(path), "s3://bucket")


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


HEAD = "http://head:8265"
RUN = "3f2a91"


def job(name: str, store: str, status: str = "RUNNING", *, run: str = RUN, minute: int = 0) -> Submission:
    return Submission(name, run, store, status, "", datetime(2026, 1, 1, 0, minute, tzinfo=UTC), None)


def test_the_job_at_work_is_the_one_that_is_meant() -> None:
    found = [job("first", "s3://a", "STOPPED"), job("alive", "s3://a"), job("ended", "s3://b", "FAILED")]
    assert chosen(found, "3f", address=HEAD, store=None).id == "alive"
    assert chosen(found, "3f", address=HEAD, store="s3://a").id == "alive"
    assert chosen(found, "3f", address=HEAD, store="s3://b").id == "ended"
    ended = [one._replace(status="FAILED") for one in found[:2]]
    assert chosen(ended, "3f", address=HEAD, store=None).id == "alive"


@pytest.mark.parametrize(("status", "where"), [("PENDING", "is at work for"), ("STOPPED", "was submitted into")])
def test_jobs_of_several_stores_are_named_and_none_is_taken(status: str, where: str) -> None:
    found = [job("b-1", "s3://b", status), job("a-1", "s3://a", status)]
    with pytest.raises(StoreError) as refused:
        chosen(found, "3f", address=HEAD, store=None)
    assert str(refused.value) == (
        f"{HEAD}: run {RUN} {where} several stores: s3://a, s3://b; choose one of them with --store"
    )
    assert chosen(found, "3f", address=HEAD, store="s3://b").id == "b-1"


def test_a_run_that_was_not_submitted_into_the_store_is_said() -> None:
    found = [job("a-1", "s3://a"), job("other", "s3://a", run="3f77")]
    with pytest.raises(StoreError, match=f"begins the id of several runs: {RUN}, 3f77; `neuron-census status --ray"):
        chosen(found, "3f", address=HEAD, store=None)
    with pytest.raises(StoreError, match="'3f' begins the id of no run that was submitted into s3://c; `neuron-cen"):
        chosen(found, "3f", address=HEAD, store="s3://c")
