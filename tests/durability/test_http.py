"""The same over HTTP: S3's protocol through a proxy that drops requests, loses answers and cuts them off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from pipeline.errors import CensusError
from pipeline.executor import InlineExecutor
from pipeline.run import run
from pipeline.store import open_store
from tests.durability.proxy import FaultyProxy
from tests.durability.schedules import tiny_job, undisturbed

SEEDS = 20
SAMPLE = 3


@pytest.fixture(scope="module")
def proxy(s3_server: str) -> Iterator[FaultyProxy]:
    one = FaultyProxy(s3_server)
    yield one
    one.close()


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[] if seed < SAMPLE else pytest.mark.slow) for seed in range(SEEDS)]
)
def test_http_schedule(
    seed: int, directory: Path, proxy: FaultyProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    # the store's own patience is under test, not that of the layers below it
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    proxy.begin(seed, likelihood=0.2)
    for _ in range(20):
        try:
            outcome = run(tiny_job(directory), open_store(s3_url), InlineExecutor())
            break
        except CensusError as error:
            proxy.history.append(f"driver ends with {error}")
    proxy.begin(seed, likelihood=0.0)
    run_id, expected = undisturbed(directory)
    assert outcome.run == run_id
    store = open_store(s3_url)
    stored = {key: store.get(key) for key in store.modified() if "/log/" not in key}
    assert stored == expected, f"seed {seed} replays this"
