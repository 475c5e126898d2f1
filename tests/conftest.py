"""Fixtures shared by all tests: one S3 server for the session, and buckets in it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

# what jobs do by default, and set before torch is imported: on a busy machine more threads wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

# read where Triton's kernels are defined: without a GPU they run in its interpreter, on the CPU
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from tests.servers import prefect, ray_cluster, ray_head, seaweed  # noqa: F401  (fixtures)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server in this process; the environment points every client at it."""
    from moto.server import ThreadedMotoServer  # 1.6 s, only for tests that use S3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
        patch.setenv("AWS_REGION", "us-east-1")
        yield endpoint
    server.stop()


@pytest.fixture
def s3_url(s3_server: str) -> str:
    """The URL of a prefix in a new bucket."""
    from pipeline.filesystems import filesystem

    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    fs, _ = filesystem(f"s3://{bucket}")
    fs.call_s3("create_bucket", Bucket=bucket)
    return f"s3://{bucket}/census"
