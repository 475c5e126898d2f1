"""`neuron-census run`: what it refuses, says, commits, and the other commands on what it made."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
from click.testing import Result

from tests.census import write_job
from tests.command_line import call, refused


def test_a_job_is_refused_in_one_message_and_nothing_is_written(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    url = str(tmp_path / "store")
    refused(call("run", str(job), store=url), f"error: {job}: there is no such job file")
    write_job(job)
    wrong = {
        'family = "mlp"': ('family = "mpl"', "did you mean 'mlp'?"),
        "batch_rows = 128": ("batch_row = 128", "did you mean 'batch_rows'?"),
        "steps = 30": ('steps = "30"', 'steps = "30": expected an integer'),
        "widths = [12]": ("widths = [12, 0]", "widths[1] = 0: expected greater than 0"),
        'source = "digits"': (
            'url = "nowhere"\ncolumns = { features = "x", label = "y", split = "z", shape = [1] }\nclasses = 2',
            "nowhere: there is no such",
        ),
    }
    for right, (mistake, said) in wrong.items():
        write_job(job)
        job.write_text(job.read_text().replace(right, mistake))
        refused(call("run", str(job), "--ray", "none", store=url), "error: ", said)
    # before Ray or Prefect is started
    for options in (["run", str(job), "--ray", "local"], ["run", str(job), "--prefect"], ["plan", str(job)]):
        refused(call(*options, store=url), "error: ", said)
    write_job(job)
    unwritable = tmp_path / "file"
    unwritable.write_text("")
    refused(call("run", str(job), "--ray", "none", store=str(unwritable / "store")), "no directory can be made there")
    refused(call("run", str(job), "--ray", "none", store="/proc/store"), "/proc/store: no directory can be made there")
    assert not Path(url).exists()


def test_a_ray_address_that_does_not_answer_leaves_nothing_behind(tmp_path: Path) -> None:
    job, url = write_job(tmp_path / "job.toml"), str(tmp_path / "store")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        said = f"error: Ray at '{address}' does not answer: [Errno 111] Connection refused. Start it, or use --ray"
        for more in ([], ["--prefect"]):
            refused(call("run", str(job), "--ray", address, *more, store=url), said)
    refused(call("run", str(job), "--ray", "head:port", store=url), "error: Ray at 'head:port' does not answer: ")
    refused(call("run", str(job), "--ray", "http://head:8265", store=url), "HOST:6379", "neuron-census submit")
    assert not Path(url).exists()


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ("memory_gib = 1_000_000", "error: resources.memory_gib = 1000000: {host} has "),
        (
            "cpus_per_worker = 4096",
            "error: resources.cpus_per_worker = 4096, or numerics.threads if that is more: {host} has ",
        ),
    ],
)
def test_a_worker_that_this_machine_could_not_hold_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resources: str, said: str
) -> None:
    monkeypatch.setattr("pipeline.cluster.executor.ray_executor", lambda *_: pytest.fail("Ray was started"))
    job, url = write_job(tmp_path / "job.toml", more=f"[resources]\n{resources}\n"), str(tmp_path / "store")
    for more in ([], ["--prefect"]):
        refused(call("run", str(job), "--ray", "local", *more, store=url), said.format(host=socket.gethostname()))
    assert not Path(url).exists()


@pytest.fixture(scope="module")
def census(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, str, Path]:
    """A real run by the command line."""
    directory = tmp_path_factory.mktemp("census")
    job = write_job(directory / "job.toml", more="[statistics.labels]\n[statistics.exemplars]")
    url = str(directory / "store")
    return call("run", str(job), "--ray", "none", store=url), url, job


def test_run_says_what_it_does_and_what_it_found(census: tuple[Result, str, Path]) -> None:
    result, url, job = census
    assert result.exit_code == 0, result.output
    assert re.search(r"^train: 1 of 1 in ", result.stderr, re.M)
    assert re.search(r"^run [0-9a-f]{16}: 1 model trained, \d+ cells measured, 0 reused$", result.stdout, re.M)
    for title in ("How much did training raise", "Which units are dead", "Which unit best detects which class?"):
        assert title in result.stdout
    again = call("run", str(job), "--ray", "none", store=url)
    assert (again.exit_code, "was committed before" in again.stdout) == (0, True)
    assert "committed" in call("plan", str(job), store=url).stdout


def test_the_other_commands_on_a_real_run(census: tuple[Result, str, Path]) -> None:
    _, url, _ = census
    assert call("verify", "--deep", store=url).exit_code == 0
    sites = json.loads(call("query", "SELECT site, input_kind FROM sites", "--format", "json", store=url).stdout)
    result = call("show", f"mlp-0/{sites[0]['site']}/3", store=url)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    for part in ("untrained", "cos(Cov(a,x), w)", "exemplars", "greatest"):
        assert part in result.stdout


DIVERGES = """
[[models]]
family = "mlp"
name = "wild"
data = "digits"
hyperparameters = { widths = [4] }
training = { steps = 100, learning_rate = 1e30 }
"""


def test_a_run_in_which_a_model_fails_commits_the_others_and_exits_1(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    result = call("run", str(write_job(tmp_path / "job.toml", more=DIVERGES)), "--ray", "none", store=url)
    assert result.exit_code == 1, result.output
    assert "failed: wild-0: " in result.stdout
    assert "Traceback" not in result.output
    names = call("query", "SELECT name, status FROM models ORDER BY name", "--format", "csv", store=url).stdout
    assert "mlp-0,ok\n" in names
    assert "wild-0,failed\n" in names
    refused(call("show", "wild-0", store=url), "model wild-0 was not measured, it failed: ")
