"""Ray, really: a cluster of two CPUs for the session, workers that die, stall and raise, and how a run takes it."""

from __future__ import annotations

import inspect
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import ray
import torch

from pipeline import schedule
from pipeline.cluster import pool
from pipeline.cluster.connection import connect, own_signals
from pipeline.cluster.executor import RayExecutor, executor_at, ray_executor
from pipeline.cluster.pool import Pool
from pipeline.cluster.reason import last_line
from pipeline.cluster.workers import lacking, room_of, start_worker
from pipeline.devices import machine_bytes
from pipeline.errors import DataError, JobError, StoreError
from pipeline.executor import Lost
from pipeline.job_sections import Resources
from pipeline.run import run
from pipeline.store import open_store
from pipeline.task import run_task
from tests import ray_tasks
from tests.census import published, run_inline, small_job
from tests.servers import children, wait_until

pytestmark = pytest.mark.real


@pytest.fixture
def executor(ray_cluster: str) -> Iterator[RayExecutor]:
    with ray_executor(ray_cluster, Resources(workers=2, retries=1)) as one:
        yield one


def both_workers(executor: RayExecutor) -> set[object]:
    """The processes of an executor of two workers, once both are there."""
    pids: set[object] = set()

    def two() -> bool:
        pids.clear()
        pids.update(pid for _, pid in executor.map(ray_tasks.pid, range(4)))
        return len(pids) == 2

    wait_until(two, timeout_s=60)
    return pids


def test_each_task_has_one_receipt(executor: RayExecutor) -> None:
    assert sorted(executor.map(ray_tasks.square, range(50))) == [(number, number**2) for number in range(50)]
    assert list(executor.map(ray_tasks.square, [])) == []


def test_workers_keep_freed_memory_from_task_to_task_and_none_behind_the_last(executor: RayExecutor) -> None:
    both_workers(executor)
    for _ in range(2):
        had = [kept for _, kept in executor.map(ray_tasks.keeps_memory, range(12))]
        # the first task of each of two workers
        assert had.count(False) == 2


def test_a_map_that_ends_behind_its_pool_asks_nothing_of_ray(ray_cluster: str) -> None:
    with ray_executor(ray_cluster, Resources(workers=1, retries=1)) as executor:
        receipts = executor.map(ray_tasks.square, range(3))
        assert next(receipts) == (0, 0)
    receipts.close()  # type: ignore[attr-defined]
    assert not ray.is_initialized()


def test_a_worker_killed_in_the_middle_of_a_task_costs_nothing(executor: RayExecutor, tmp_path: Path) -> None:
    before = {receipt for _, receipt in executor.map(ray_tasks.pid, range(20))}
    assert sorted(executor.map(partial(ray_tasks.dies_once, tmp_path), range(8))) == [
        (number, number) for number in range(8)
    ]
    assert len(before) == 2
    assert len(before & both_workers(executor)) == 1, "the dead worker is replaced"


@pytest.mark.parametrize(("kind", "is_kept"), [("AcceleratorError", False), ("OutOfMemoryError", True)])
def test_a_worker_whose_gpu_failed_is_replaced(ray_cluster: str, tmp_path: Path, kind: str, is_kept: bool) -> None:
    with ray_executor(ray_cluster, Resources(workers=1, retries=1)) as executor:
        ((_, (before, after)),) = executor.map(partial(ray_tasks.raises_once, tmp_path, kind), range(1))
    assert (before == after) == is_kept


def test_what_poisons_workers_is_lost_alone_and_says_why(executor: RayExecutor) -> None:
    outcomes = dict(executor.map(ray_tasks.poisoned, range(6)))
    lost = {number: outcome.reason for number, outcome in outcomes.items() if isinstance(outcome, Lost)}
    assert lost.keys() == {2, 4}
    assert lost[2].startswith("2 tries came to nothing, the last with The actor died")
    lines = inspect.getsource(ray_tasks).splitlines()
    (raising,) = [number for number, text in enumerate(lines, 1) if "a defect" in text]
    place = f"{ray_tasks.__file__}:{raising}"
    assert lost[4] == f"2 tries came to nothing, the last with ZeroDivisionError: a defect ({place})"


@pytest.mark.parametrize(
    ("files", "place"),
    [
        (["/venv/lib/python3.11/site-packages/pipeline/task.py", "/src/models/mine.py"], " (/src/models/mine.py:2)"),
        (
            ["/src/models/mine.py", "/venv/lib/python3.11/site-packages/pipeline/statistics/added.py"],
            " (pipeline/statistics/added.py:2)",
        ),
        (
            ["/src/pipeline/reduce.py", "/venv/lib/python3.11/site-packages/torch/functional.py"],
            " (/src/pipeline/reduce.py:1)",
        ),
        (
            [
                "/src/pipeline/flow/tap.py",
                "/home/u/pipeline/.venv/lib/python3.12/site-packages/spacy/pipeline/tagger.py",
            ],
            " (/src/pipeline/flow/tap.py:1)",
        ),
        (
            ["/home/pipeline/of/mine.py", "<frozen importlib._bootstrap>", "numpy/random/_generator.pyx", "<key>.3"],
            " (/home/pipeline/of/mine.py:1)",
        ),
        (["/usr/lib64/python3.11/json/decoder.py"], ""),
    ],
)
def test_a_defect_is_told_with_the_innermost_line_that_is_not_of_a_library(files: list[str], place: str) -> None:
    frames = "".join(f'  File "{file}", line {line}, in f\n    g()\n' for line, file in enumerate(files, 1))
    said = 'wrong\n  File "/of/the/message.py", line 7'
    text = f"ray::Worker.call() (pid=1)\n{frames}ValueError: {said}"
    error = ray.exceptions.RayTaskError("call", text, ValueError(said))
    assert last_line(error) == f"ValueError: wrong{place}"


def test_what_a_person_must_act_on_is_raised_as_it_is(executor: RayExecutor) -> None:
    with pytest.raises(DataError, match="file 0 is damaged"):
        list(executor.map(ray_tasks.refused, [0]))
    assert sorted(executor.map(ray_tasks.square, range(3))) == [(0, 0), (1, 1), (2, 4)]


def test_a_straggler_is_done_by_another_worker(
    executor: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "STRAGGLER_MIN_S", 0.2)
    assert sorted(executor.map(partial(ray_tasks.stalls_once, tmp_path), range(4))) == [
        (number, number) for number in range(4)
    ]
    both_workers(executor)


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_ten_thousand_tasks_leave_nothing_in_the_driver(executor: RayExecutor) -> None:
    both_workers(executor)
    seen: dict[int, float] = {}
    tasks = [bytes(1000) + str(number).encode() for number in range(10_000)]
    for count, (number, receipt) in enumerate(executor.map(ray_tasks.echo, tasks), start=1):
        assert receipt == tasks[number]
        if count in (2_000, 10_000):
            seen[count] = resident_mib()
    print(f"driver: {seen[2_000]:.0f} MiB after 2,000 tasks, {seen[10_000]:.0f} MiB after 10,000")
    # 8 MB went out and came back; what is kept for each task is a few numbers
    assert seen[10_000] - seen[2_000] < 16


class Cancelled(BaseException):
    """Raised by a signal, as a cancelled flow is."""


def cancel(*_: object) -> None:
    raise Cancelled


def test_whoever_stops_listening_stops_the_work(ray_cluster: str, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGALRM, cancel)
    try:
        with pytest.raises(Cancelled):
            sleep_until_cancelled(ray_cluster, tmp_path)
    finally:
        signal.signal(signal.SIGALRM, before)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    wait_until(lambda: not any(is_alive(pid) for pid in pids), timeout_s=2)


def sleep_until_cancelled(address: str, folder: Path) -> None:
    with ray_executor(address, Resources(workers=2)) as executor:
        both_workers(executor)
        signal.setitimer(signal.ITIMER_REAL, 2)
        list(executor.map(partial(ray_tasks.sleeps, folder), range(2)))


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_the_handler_of_sigterm_stays(ray_cluster: str) -> None:
    def handler(*_: object) -> None:
        """The one that cancels a flow."""

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with ray_executor(ray_cluster, Resources(workers=1)):
            assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("started", [1, 3])
def test_sigterm_while_ray_starts_ends_the_run_in_order(tmp_path: Path, started: int) -> None:
    small_job(tmp_path)
    command = [sys.executable, "-m", "pipeline.cli", "run", str(tmp_path / "job.toml"), "--ray", "local"]
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as temporary:
        process = subprocess.Popen(
            [*command, "--store", str(tmp_path / "store")],
            env={**os.environ, "RAY_TMPDIR": temporary},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            # the first process of Ray's; and more of them, while the driver still waits for the node
            wait_until(lambda: len(children(process.pid)) >= started, timeout_s=120)
            family = children(process.pid)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=120)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        wait_until(lambda: not any(is_alive(pid) for pid in family), timeout_s=30)
    assert (process.returncode, said) == (143, "interrupted; run the same command again to go on\n")
    assert not (tmp_path / "store" / "runs").exists()


def test_ray_s_handler_takes_the_place_of_no_other() -> None:
    def handler(*_: object) -> None:
        raise Cancelled

    install, before = signal.signal, signal.signal(signal.SIGTERM, handler)
    try:
        with own_signals():
            assert signal.signal(signal.SIGTERM, signal.SIG_IGN) is handler
            assert signal.getsignal(signal.SIGTERM) is handler
            with pytest.raises(Cancelled):
                signal.raise_signal(signal.SIGTERM)
            # of no other signal
            other = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            assert signal.signal(signal.SIGUSR1, other) is signal.SIG_IGN
        with pytest.raises(Cancelled), own_signals():
            signal.raise_signal(signal.SIGTERM)
        assert signal.signal is install
    finally:
        signal.signal(signal.SIGTERM, before)


def test_more_than_the_cluster_has_is_refused(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "START_TIMEOUT_S", 2.0)
    with (
        pytest.raises(StoreError, match=r"no worker started within 2 s: the cluster has 2 CPUs, 1 GPUs"),
        ray_executor(ray_cluster, Resources(workers=1, gpus_per_worker=2)) as executor,
    ):
        list(executor.map(ray_tasks.square, [1]))


@pytest.mark.parametrize(
    ("resources", "asked"),
    [
        (Resources(cpus_per_worker=64), "64 CPUs"),
        (Resources(memory_gib=100_000), "1 CPU, 100000 GiB of memory"),
        (Resources(workers=1, gpus_per_worker=2), "1 CPU, 2 GPUs"),
    ],
)
def test_what_no_node_has_is_said_early_and_once(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch, resources: Resources, asked: str
) -> None:
    monkeypatch.setattr(pool, "START_TIMEOUT_S", 3.0)
    monkeypatch.setattr(pool, "NOTE_AFTER_S", 0.5)
    notes: list[str] = []
    with (
        pytest.raises(StoreError) as raised,
        ray_executor(ray_cluster, resources, notes.append) as executor,
    ):
        list(executor.map(ray_tasks.square, [1]))
    nodes = r"2 CPUs, 1 GPUs, \d+\.\d GiB of memory"
    lacking = rf"a worker takes {asked}, which no node of Ray's has \(nodes: {nodes}\)"
    (note,) = notes
    assert re.fullmatch(rf"{lacking}: waiting for one that has it, 3 s in all", note)
    ended = rf"no worker started within 3 s: the cluster has {nodes}, of which {nodes} are free; {lacking}; ask .*"
    assert re.fullmatch(ended, str(raised.value))


def test_of_a_cluster_that_is_only_busy_nothing_is_said_to_lack(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "START_TIMEOUT_S", 3.0)
    monkeypatch.setattr(pool, "NOTE_AFTER_S", 0.5)
    notes: list[str] = []
    with ray_executor(ray_cluster, Resources(workers=1, cpus_per_worker=2), notes.append) as executor:
        list(executor.map(ray_tasks.square, [1]))
        more = Pool(
            *[lambda: start_worker(Resources()), lambda: lacking(Resources())], size=1, retries=0, note=notes.append
        )
        with pytest.raises(StoreError, match=r"2 CPUs, .* of which 0 CPUs, .* are free; ask for less"):
            list(RayExecutor(more, retries=0).map(ray_tasks.square, [1]))
        more.close()
    assert notes == []


def test_what_this_machine_could_never_hold_is_refused_as_soon_as_ray_has_counted() -> None:
    # less than the machine has, and more than Ray leaves to workers
    memory_gib = int(0.99 * machine_bytes() / 2**30)
    with (
        pytest.raises(JobError, match=rf"a worker takes 1 CPU, {memory_gib} GiB of memory, which .* under \["),
        executor_at("local", Resources(memory_gib=float(memory_gib))),
    ):
        raise AssertionError("unreachable")
    assert not ray.is_initialized()


def test_the_cluster_says_how_many_workers(ray_cluster: str) -> None:
    with ray_executor(ray_cluster, Resources()) as executor:
        assert executor.workers == 2
    with ray_executor(ray_cluster, Resources(cpus_per_worker=2)) as executor:
        assert executor.workers == 1


def test_workers_share_a_gpu_by_their_fractions(ray_cluster: str) -> None:
    with ray_executor(ray_cluster, Resources(gpus_per_worker=1)) as executor:
        assert executor.workers == 1
    with ray_executor(ray_cluster, Resources(gpus_per_worker=0.5)) as executor:
        assert executor.workers == 2
        both_workers(executor)
        seen = {receipt for _, receipt in executor.map(ray_tasks.gpus, range(8))}
    assert len({pid for pid, _ in seen}) == 2
    assert {gpus for _, gpus in seen} == {"0"}
    with ray_executor(ray_cluster, Resources(workers=2, gpus_per_worker=0.25)) as executor:
        both_workers(executor)
        wait_until(lambda: ray.available_resources().get("GPU") == 0.5, timeout_s=30)


@pytest.mark.parametrize(
    ("resources", "workers"),
    [
        ({}, 16),
        ({"cpus_per_worker": 3}, 5),
        ({"gpus_per_worker": 0.25}, 8),
        # two fit into one GPU, and what is left of two GPUs is no third
        ({"gpus_per_worker": 0.4}, 4),
        ({"gpus_per_worker": 0.1}, 16),
        ({"gpus_per_worker": 0.1, "cpus_per_worker": 1, "memory_gib": 8.0}, 4),
        ({"gpus_per_worker": 0.3333}, 6),
        ({"gpus_per_worker": 2}, 1),
        ({"gpus_per_worker": 3}, 0),
    ],
)
def test_as_many_workers_as_a_node_has_room_for(resources: dict[str, float], workers: int) -> None:
    there = {"CPU": 16.0, "GPU": 2.0, "memory": 32.0 * 2**30}
    assert room_of(there, Resources(**resources)) == workers


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_training_where_torch_sees_no_gpu_is_the_submitter_s_to_mend(ray_cluster: str, tmp_path: Path) -> None:
    job, store = small_job(tmp_path, more="[resources]\ngpus_per_worker = 0.5\n"), open_store(str(tmp_path / "store"))
    with (
        ray_executor(ray_cluster, job.allotted) as executor,
        pytest.raises(JobError, match=r"gpus_per_worker asks for a GPU, and torch \S+ sees none on .*set it to 0"),
    ):
        run(job, store, executor)
    assert not store.keys("models/")


def test_an_address_that_does_not_answer_is_named() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(StoreError, match=f"Ray at '{address}' does not answer: .*Connection refused"):
            ray_executor(address, Resources()).__enter__()


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265"])
def test_addresses_for_other_doors_are_refused(address: str) -> None:
    with pytest.raises(StoreError, match=r"HOST:6379.*neuron-census submit"):
        ray_executor(address, Resources()).__enter__()


def test_what_is_sent_holds_no_credentials(s3_url: str) -> None:
    sent = pickle.dumps(partial(run_task, store=open_store(s3_url)))
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in sent
    assert os.environ["AWS_ACCESS_KEY_ID"].encode() + b"\x94" not in sent


def test_the_cluster_changes_no_byte(ray_cluster: str, tmp_path: Path) -> None:
    job = small_job(tmp_path)
    outcome, store = run_inline(job, str(tmp_path / "inline"))
    other = open_store(str(tmp_path / "ray"))
    with ray_executor(ray_cluster, Resources(workers=2)) as executor:
        assert run(job, other, executor).run == outcome.run
    assert published(other, outcome.run) == published(store, outcome.run)


EMBEDDED = """
import os
import shutil
from pathlib import Path
from pipeline.cluster.executor import ray_executor
from pipeline.job_sections import Resources

kept = Path(f"/tmp/neuron-census-{os.getuid()}")
def session():
    (own,) = (kept / "ray").glob(f"session_*_{os.getpid()}")
    return own

with ray_executor("local", Resources(workers=1)) as executor:
    assert [receipt for _, receipt in executor.map(abs, [-1, -2])] in ([1, 2], [2, 1])
    mode, ended = kept.stat().st_mode & 0o777, session()
assert mode == 0o700, oct(mode)
assert not ended.exists()
try:
    with ray_executor("local", Resources(workers=1)):
        raise LookupError
except LookupError:
    assert (session() / "logs").is_dir()
    shutil.rmtree(session())
"""


def test_what_ray_leaves_of_a_run_is_nobody_elses_and_goes_with_it() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"}
    done = subprocess.run(
        [sys.executable, "-c", EMBEDDED], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_directory_of_somebody_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    theirs = Path("/tmp/neuron-census-4000000000")
    theirs.mkdir()
    try:
        with pytest.raises(StoreError, match="expected a directory of your own; set RAY_TMPDIR"):
            connect("local", Resources(workers=1))
    finally:
        theirs.rmdir()
