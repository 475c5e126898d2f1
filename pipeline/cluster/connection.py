"""How a driver comes to a cluster, or starts one on this machine.

Layer 5.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from pipeline.address import LOCAL, knock, shown, unanswered
from pipeline.cluster.reason import last_line
from pipeline.errors import StoreError
from pipeline.job_sections import Resources


@contextmanager
def own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM, and let Ray put none in its place: its own ends the process with 15 and no word.

    So a signal does what it does at any other time, and at once: one that was kept until Ray has started would wait for
    a minute where Ray's processes are ended with this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    install = signal.signal

    def installed(signalnum: int, handler: Any) -> Any:
        return signal.getsignal(signalnum) if signalnum == signal.SIGTERM else install(signalnum, handler)

    # blocked instead, the signal would stay blocked in the processes that Ray starts, which are ended by it
    signal.signal = installed  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = install


def connect(address: str, resources: Resources) -> None:
    """Come to the cluster at an address, or start one here if it is `local`. StoreError without an answer."""
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    knock(address)
    try:
        if address == LOCAL:
            # Ray's ports are open to the network: it asks for a token, and this one nobody else has
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            cpus = max(resources.workers * resources.cpus_per_worker, os.cpu_count() or 1)
            ray.init(address=LOCAL, num_cpus=cpus, include_dashboard=False, _temp_dir=_temporary(), **quiet)
            return
        # how often, not how many seconds: Ray would take a quarter of an hour to give up a wrong port
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        if _is_elsewhere(error):
            known = shown(address)
            raise StoreError(
                f"this machine is no node of the Ray cluster at {known!r}: run this on one of its nodes (`ray start "
                f"--address={known} --num-cpus=0` makes it one), or use `neuron-census submit`"
            ) from error
        raise unanswered(address, last_line(error)) from error


def _is_elsewhere(error: BaseException | None) -> bool:
    """Whether the cluster answers, and Ray found no raylet of it on the driver's own host."""
    while error is not None and "No node info found" not in str(error):
        error = error.__cause__ or error.__context__
    return error is not None


def own_session(address: str) -> Path | None:
    """The directory of the Ray that was started here in ours, None of any other; `ray.shutdown` leaves it."""
    if address != LOCAL or "RAY_TMPDIR" in os.environ:
        return None
    return Path(_temporary(), ray.get_runtime_context().get_session_name())


def _temporary() -> str:
    """Where Ray keeps sockets and logs; StoreError where that is somebody else's."""
    # a socket's path has at most 107 characters, of which Ray needs 70: TMPDIR may be too long
    if given := os.environ.get("RAY_TMPDIR"):
        return given
    private = Path(f"/tmp/neuron-census-{os.getuid()}")
    private.mkdir(mode=0o700, exist_ok=True)
    seen = private.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid():
        raise StoreError(f"{private}: expected a directory of your own; set RAY_TMPDIR to one with a short path")
    private.chmod(0o700)
    # Ray lets everybody write into its own
    return str(private / "ray")
