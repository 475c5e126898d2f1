"""The flow on a real Prefect server: what it shows, when it fires, how it is cancelled, and doing without a server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
from click.testing import CliRunner

from pipeline.cli import cli
from pipeline.manifest import committed_runs
from pipeline.models.base import Task
from pipeline.store import Store, open_store
from tests.census import published, run_inline, small_job
from tests.durability.schedules import tiny_job
from tests.models.build import build
from tests.servers import (
    BIN,
    Prefect,
    RayNode,
    Server,
    answers,
    children,
    free_port,
    start_prefect,
    wait_until,
    workers_of,
)

pytestmark = pytest.mark.real


FLOW = """
import sys
from flows.census import take_census

class Notes:
    def stage(self, name, total, done): print("stage", name, flush=True)
    def advance(self, count): pass
    def note(self, text): print("note", text, flush=True)

job, store, ray = sys.argv[1:]
outcome = take_census(job, store=store, ray=ray, progress=Notes())
print("outcome", outcome.run, outcome.cells)
"""


def flow(job: Path, store: Path, ray: str, *, api: str) -> subprocess.Popen[str]:
    """The flow in a process of its own: Prefect reads its settings once, on import."""
    environment = {**os.environ, "PREFECT_API_URL": api}
    command = [sys.executable, "-c", FLOW, str(job), str(store), ray]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_the_flow_changes_no_byte_and_leaves_its_artifacts(prefect: Prefect, tmp_path: Path) -> None:
    job = small_job(tmp_path)
    plain, store = run_inline(job, str(tmp_path / "plain"))
    process = flow(tmp_path / "job.toml", tmp_path / "flow", "none", api=prefect.api)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert output.splitlines() == [
        *(f"stage {name}" for name in ("train", "measure", "reduce", "pack")),
        f"outcome {plain.run} {plain.cells}",
    ]
    assert published(open_store(str(tmp_path / "flow")), plain.run) == published(store, plain.run)
    artifacts = asked(prefect, "artifacts/filter")
    percents = {one["key"]: one["data"] for one in artifacts if one["type"] == "progress"}
    assert percents == {f"census-{name}": 100.0 for name in ("train", "measure", "reduce", "pack")}
    (summary,) = [one["data"] for one in artifacts if one["type"] == "markdown"]
    assert summary.startswith(f"Run `{plain.run}`: 1 model trained, {plain.cells} cells measured")
    (flow_run,) = asked(prefect, "flow_runs/filter")
    assert flow_run["state_type"] == "COMPLETED"


def asked(prefect: Prefect, what: str, **body: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = prefect.ask("POST", what, **body)
    return found


def test_without_its_server_a_run_goes_on_and_says_so_once(tmp_path: Path) -> None:
    tiny_job(tmp_path)
    port = free_port()
    process = flow(tmp_path / "job.toml", tmp_path / "store", "none", api=f"http://bob:s3cret@127.0.0.1:{port}/api")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    (note,) = [line for line in output.splitlines() if line.startswith("note ")]
    assert note == f"note Prefect at http://127.0.0.1:{port}/api does not answer: the run goes on without it"
    assert "s3cret" not in output
    assert len(committed_runs(open_store(str(tmp_path / "store")))) == 1


class OnlyHealthy(BaseHTTPRequestHandler):
    """A server that is well, and gone at the next question."""

    well, asked = 200, 503

    def do_GET(self) -> None:
        self.send_response(self.well if self.path.endswith("/health") else self.asked)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_server_that_goes_before_the_flow_begins_keeps_nothing_from_being_done(tmp_path: Path) -> None:
    tiny_job(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), OnlyHealthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        process = flow(
            tmp_path / "job.toml", tmp_path / "store", "none", api=f"http://127.0.0.1:{server.server_port}/api"
        )
        output, _ = process.communicate(timeout=200)
        server.shutdown()
    assert process.returncode == 0, output
    assert output.splitlines().count("note Prefect does not answer any more: the run goes on without it") == 1
    assert len(committed_runs(open_store(str(tmp_path / "store")))) == 1


class Closed(OnlyHealthy):
    """A server that knows nobody who asks."""

    asked = 401


class BehindAClosedDoor(OnlyHealthy):
    """A server behind another, which lets nobody in."""

    well, asked = 401, 403


@pytest.mark.parametrize("kind", [Closed, BehindAClosedDoor])
def test_credentials_that_prefect_refuses_are_said_to_be_and_not_what_they_are(
    tmp_path: Path, kind: type[OnlyHealthy], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_job(tmp_path)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:wr0ng")
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        process = flow(
            tmp_path / "job.toml", tmp_path / "store", "none", api=f"http://127.0.0.1:{server.server_port}/api"
        )
        output, _ = process.communicate(timeout=200)
        server.shutdown()
    assert process.returncode == 0, output
    (note,) = [line for line in output.splitlines() if line.startswith("note ")]
    assert note.startswith("note Prefect refuses the credentials, or that there are none (PREFECT_API_AUTH_STRING, or ")
    assert note.endswith("PREFECT_API_KEY): the run goes on without it")
    assert "wr0ng" not in output
    assert len(committed_runs(open_store(str(tmp_path / "store")))) == 1


def state_of(prefect: Prefect, flow_run: str) -> str:
    return str(prefect.ask("GET", f"flow_runs/{flow_run}")["state_type"])


LONG = """
name = "long"
[data.digits]
source = "digits"
[[models]]
family = "mlp"
data = "digits"
seeds = [0, 1, 2, 3]
hyperparameters = { widths = [256, 256] }
training = { steps = 100_000 }
[statistics.weights]
"""

DEPLOY = """
import sys
from flows.up import Nightly, deploy
from prefect.schedules import Cron
print(deploy(Nightly(*sys.argv[1:]), "test", Cron("0 0 1 1 *")))
"""


def test_cancelling_stops_ray_within_two_seconds(prefect: Prefect, ray_head: RayNode, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(LONG)
    environment = {**os.environ, "PREFECT_API_URL": prefect.api}
    command = [sys.executable, "-c", DEPLOY, str(tmp_path / "job.toml"), str(tmp_path / "store"), ray_head.address]
    deployment = subprocess.check_output(command, env=environment, text=True).split()[-1]
    worker = Server(
        *[str(BIN / "prefect"), "worker", "start", "--pool", "neuron-census", "--type", "process"],
        environment={
            "PREFECT_API_URL": prefect.api,
            "PREFECT_HOME": str(tmp_path),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        },
        log=tmp_path / "log",
    )
    try:
        flow_run = prefect.ask("POST", f"deployments/{deployment}/create_flow_run")["id"]
        # two workers that have trained for a while
        wait_until(lambda: len(workers_of(ray_head)) == 2, timeout_s=120)
        time.sleep(5)
        prefect.ask("POST", f"flow_runs/{flow_run}/set_state", state={"type": "CANCELLING"})
        wait_until(lambda: workers_of(ray_head) == [], timeout_s=2)
        wait_until(lambda: state_of(prefect, flow_run) not in ("RUNNING", "CANCELLING"), timeout_s=60)
        assert state_of(prefect, flow_run) == "CANCELLED"
    finally:
        worker.stop()


@pytest.mark.slow
def test_a_server_that_dies_keeps_nothing_from_being_measured(tmp_path: Path) -> None:
    own = start_prefect(tmp_path)
    try:
        wait_until(lambda: answers(own.port), timeout_s=120)
        small_job(tmp_path, seeds="0, 1, 2")
        process = flow(tmp_path / "job.toml", tmp_path / "store", "none", api=own.api)
        assert process.stdout is not None
        assert process.stdout.readline() == "stage train\n"
        own.server.kill()
        output, _ = process.communicate(timeout=200)
    finally:
        own.server.kill()
    assert process.returncode == 0, output
    assert len([line for line in output.splitlines() if line.startswith("note Prefect does not answer")]) == 1
    assert len(committed_runs(open_store(str(tmp_path / "store")))) == 1


LOADED = """
[[models]]
data = "tiny"
load = { url = "checkpoints/*", family = "mlp", arguments = { widths = [4] } }
"""


@pytest.mark.parametrize(
    ("name", "cron", "message"),
    [
        ("night", "nonsense", "--cron 'nonsense': expected minute, hour"),
        ("night", "61 2 * * *", "--cron '61 2 * * *': expected minute, hour"),
        *((f"a{mark}b", "0 2 * * *", f"name = 'a{mark}b': expected a name without") for mark in "/%&<>"),
    ],
)
def test_what_prefect_would_refuse_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, cron: str, message: str
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "")  # put back as it was
    monkeypatch.setattr("flows.up._running", None)
    job = tmp_path / "job.toml"
    job.write_text(f'name = "{name}"\ndata.d.url = "d"\n[[models]]\nfamily = "mlp"\ndata = "d"\n')
    done = CliRunner().invoke(cli, ["up", str(job), "--store", str(tmp_path / "store"), "--cron", cron])
    assert (done.exit_code, message in done.stderr) == (2, True), (done.output, done.exception)


def test_a_port_where_a_server_answers_is_refused(
    prefect: Prefect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "")  # put back as it was
    tiny_job(tmp_path)
    arguments = ["up", str(tmp_path / "job.toml"), "--store", str(tmp_path / "store"), "--port", str(prefect.port)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2
    assert f"a Prefect server answers at http://127.0.0.1:{prefect.port}/api already" in done.stderr
    assert not (tmp_path / "store").exists()


def put_checkpoint(directory: Path, seed: int) -> None:
    state = build("mlp", Task((3,), 2), seed=seed, widths=(4,)).state_dict()
    draft = directory / "draft"
    safetensors.torch.save_file(state, draft)
    (directory / "checkpoints").mkdir(exist_ok=True)
    draft.rename(directory / "checkpoints" / f"{seed}.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_schedule_measures_what_is_new_once_and_stops_when_told(tmp_path: Path) -> None:
    tiny_job(tmp_path)
    with (tmp_path / "job.toml").open("a") as job:
        job.write(LOADED)
    put_checkpoint(tmp_path, 0)
    store = open_store(str(tmp_path / "store"))
    command = [str(BIN / "neuron-census"), "up", str(tmp_path / "job.toml"), "--store", store.url, "--ray", "none"]
    command += ["--cron", "* * * * *", "--port", str(free_port())]
    (tmp_path / "home").mkdir()
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def committed(count: int) -> dict[str, Any]:
        wait_until(lambda: len(committed_runs(store)) == count, timeout_s=240, every_s=1)
        return store.modified("states/") | store.modified("models/")

    try:
        before = committed(1)
        put_checkpoint(tmp_path, 1)
        more = committed(2)
        assert {key: more[key] for key in before} == before, "nothing of the old ones again"
        # its weights, and a cell on each of the three chunks
        assert len(more) == len(before) + 4
        (tmp_path / "rows" / "1.parquet").write_bytes(more_rows())
        both = committed(3)
        time.sleep(65)
        assert committed(3) == both
        assert {key: both[key] for key in more} == more
        family = children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stdout is not None
        # the three with news at least
        assert len(re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d UTC: completed$", process.stdout.read(), re.M)) >= 3
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), timeout_s=10)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_night_that_lost_its_power_is_made_up_for_and_another_job_does_not_run_it(tmp_path: Path) -> None:
    tiny_job(tmp_path)
    text = (tmp_path / "job.toml").read_text()
    (tmp_path / "other.toml").write_text(re.sub('name = ".*"', 'name = "other"', text, count=1))
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "home")}
    # how long a place stays with whoever died: five minutes by itself
    environment["PREFECT_SERVER_CONCURRENCY_INITIAL_DEPLOYMENT_LEASE_DURATION"] = "30"
    store, others = open_store(str(tmp_path / "store")), open_store(str(tmp_path / "others"))

    @contextmanager
    def up(job: str, into: Store) -> Iterator[subprocess.Popen[bytes]]:
        command = [str(BIN / "neuron-census"), "up", str(tmp_path / job), "--store", into.url, "--ray", "none"]
        command += ["--cron", "* * * * *", "--port", str(free_port())]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            yield process
        finally:
            for pid in [process.pid, *children(process.pid)] if process.poll() is None else []:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    with up("job.toml", store) as process:
        wait_until(lambda: any(key.endswith(".begun") for key in store.keys("runs/")), timeout_s=240, every_s=0.05)
        family = children(process.pid)
        process.kill()
        # what it started ends with it
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), timeout_s=60)
    assert not committed_runs(store), "killed before its end"
    with up("job.toml", store) as process:
        wait_until(lambda: len(committed_runs(store)) == 1, timeout_s=400, every_s=1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    logs = len(store.keys("runs/"))
    with up("other.toml", others):
        wait_until(lambda: len(committed_runs(others)) == 1, timeout_s=240, every_s=1)
        time.sleep(65)
        assert len(store.keys("runs/")) == logs, "what is down is not scheduled"


def more_rows() -> bytes:
    random = np.random.default_rng(1)
    rows = {"x": random.normal(size=(36, 3)).tolist(), "y": random.integers(0, 2, 36), "split": ["train"] * 36}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(rows), sink, row_group_size=12)
    return bytes(sink.getvalue())
