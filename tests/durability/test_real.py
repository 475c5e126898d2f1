"""Fifteen schedules on real parts: Ray's workers and a second node killed, drivers killed, an S3 server killed.

When something is killed is drawn from the seed, in objects stored by then. Each schedule ends with one commit, every
row in the ledger and the bytes of the undisturbed run. CI plays SAMPLE: workers killed, and the S3 server killed. That
a driver is killed it tests in test_run.py; `make test-all` plays all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from pipeline.cluster.executor import ray_executor
from pipeline.executor import InlineExecutor
from pipeline.job import load_job
from pipeline.job_sections import Resources
from pipeline.manifest import decode, manifest_key
from pipeline.run import run
from pipeline.store import Store, open_store
from pipeline.verify import verify_run
from tests.census import published, write_job
from tests.servers import RayNode, Seaweed, wait_for, wait_until, workers_of

pytestmark = pytest.mark.real

WORKERS, NODE, DRIVER, SERVER = (0, 1, 2, 3, 4), (5, 6), (7, 8, 9, 10), (11, 12, 13, 14)
SAMPLE = (0, 11)
# objects of an undisturbed run: a kill is drawn before the last of them
OBJECTS = 30


def seeds(chosen: tuple[int, ...]) -> pytest.MarkDecorator:
    marked = [pytest.param(seed, marks=[] if seed in SAMPLE else pytest.mark.slow) for seed in chosen]
    return pytest.mark.parametrize("seed", marked)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job") / "job.toml")


@pytest.fixture(scope="module")
def undisturbed(job: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, bytes]]:
    store = open_store(str(tmp_path_factory.mktemp("undisturbed")))
    outcome = run(load_job(job), store, InlineExecutor())
    return outcome.run, published(store, outcome.run)


@pytest.fixture
def bucket(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket of the real server, to which the environment points."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any-secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    name = f"schedule-{time.time_ns()}"
    seaweed.create_bucket(name)
    wait_for(open_store(f"s3://{name}").probe, timeout_s=60)
    return f"s3://{name}"


def check(store: Store, undisturbed: tuple[str, dict[str, bytes]]) -> None:
    run_id, expected = undisturbed
    assert published(store, run_id) == expected
    manifest = decode(store.get(manifest_key(run_id)))
    assert verify_run(store, manifest, deep=True).problems == ()


@contextmanager
def meanwhile(harm: Callable[[], None]) -> Iterator[None]:
    """Do something in another thread, and raise what it raises: that is why the rest failed, where it did."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            harm()
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        if raised:
            raise raised[0]


def stored(store: Store, count: int) -> Callable[[], bool]:
    return lambda: len(store.keys("states/")) + len(store.keys("runs/")) >= count


@seeds(WORKERS)
def test_workers_are_killed(seed: int, job: Path, undisturbed, ray_head: RayNode, tmp_path: Path) -> None:
    random = Random(seed)
    store = open_store(str(tmp_path / "store"))

    def kill_one() -> None:
        # between two looks there may be none, or the one that was seen may have ended
        os.kill(random.choice(workers_of(ray_head)), signal.SIGKILL)

    def harm() -> None:
        for count in sorted(random.sample(range(OBJECTS), 3)):
            wait_until(stored(store, count), timeout_s=200)
            wait_for(kill_one, timeout_s=60, every_s=0.05)

    with ray_executor(ray_head.address, Resources(workers=2, retries=5)) as executor, meanwhile(harm):
        wait_until(lambda: len(workers_of(ray_head)) >= 2, timeout_s=60)
        run(load_job(job), store, executor)
    check(store, undisturbed)


@seeds(NODE)
def test_a_node_is_killed(seed: int, job: Path, undisturbed, ray_head: RayNode, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    node = RayNode(head=ray_head.address, cpus=2)
    try:
        with ray_executor(ray_head.address, Resources(workers=4)) as executor:
            wait_until(lambda: len(workers_of(node)) == 2, timeout_s=120)

            def harm() -> None:
                wait_until(stored(store, Random(seed).randrange(OBJECTS)), timeout_s=200)
                node.kill()

            with meanwhile(harm):
                run(load_job(job), store, executor)
    finally:
        node.kill()
    check(store, undisturbed)


def driver(job: Path, url: str, ray: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline.cli", "run", str(job), "--store", url, "--ray", ray]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


@seeds(DRIVER)
def test_drivers_are_killed(seed: int, job: Path, undisturbed, ray_cluster: str, tmp_path: Path) -> None:
    random = Random(seed)
    store = open_store(str(tmp_path / "store"))
    for count in sorted(random.sample(range(OBJECTS), 2)):
        killed = driver(job, store.url, random.choice(["none", ray_cluster]))
        wait_until(lambda: stored(store, count)() or killed.poll() is not None, timeout_s=200)  # noqa: B023
        os.killpg(killed.pid, signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    # two of them at once: the killed ones' workers may be at work still
    together = [driver(job, store.url, ray_cluster), driver(job, store.url, "none")]
    for one in together:
        output, _ = one.communicate(timeout=250)
        assert one.returncode == 0, output.decode()
    check(store, undisturbed)


# the first to ask for the server waits for it as well
@pytest.mark.timeout(600)
@seeds(SERVER)
def test_the_s3_server_is_killed(seed: int, job: Path, undisturbed, seaweed: Seaweed, bucket: str) -> None:
    random = Random(seed)
    store = open_store(bucket)

    def harm() -> None:
        for count in sorted(random.sample(range(OBJECTS), 2)):
            wait_until(stored(store, count), timeout_s=200)
            seaweed.kill()
            time.sleep(random.choice([0.0, 5.0]))
            seaweed.start()

    with meanwhile(harm):
        end = time.monotonic() + 400
        while True:
            one = driver(job, bucket, "none")
            output, _ = one.communicate(timeout=250)
            if one.returncode == 0:
                break
            # the server was away for longer than anybody waits: the operator is told, and runs it again
            assert one.returncode == 2, output.decode()
            assert time.monotonic() < end, output.decode()
    check(store, undisturbed)
