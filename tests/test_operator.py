"""What the operator gets wrong: each ends in one message that says who must do what, exit code 2, nothing written."""

from __future__ import annotations

import io
import ipaddress
import logging
import os
import pickle
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from botocore.exceptions import EndpointConnectionError
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import pipeline.store
from pipeline.cells import decode_cell, encode_cell
from pipeline.cli import cli
from pipeline.errors import StoreError
from pipeline.executor import InlineExecutor
from pipeline.inputs import input_file
from pipeline.manifest import committed_runs
from pipeline.models.base import decode_checkpoint, encode_checkpoint
from pipeline.plan import make_plan
from pipeline.resolve import resolve
from pipeline.rows.footers import read_footer
from pipeline.rows.groups import read_groups
from pipeline.run import run
from pipeline.store import open_store
from pipeline.task import run_task
from tests.durability.proxy import FaultyProxy
from tests.durability.schedules import tiny_job
from tests.servers import Prefect

# each is searched for in everything that a run leaves behind
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-secret-8f14e45f",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEBYaD-token-c9f0f895",
    "PREFECT_API_KEY": "pnu_key-45c48cce2e2d",
}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, env={"COLUMNS": "160"})


def refused(done: Result, *said: str) -> None:
    assert done.exit_code == 2, done.output
    assert [line.startswith("error: ") for line in done.stderr.splitlines()].count(True) == 1, done.output
    assert "Traceback" not in done.output
    for text in said:
        assert text in done.output
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        assert os.environ.get(name, "none") not in done.output


class Refusing(ThreadingHTTPServer):
    """An S3 server that answers every request with one error, in which it repeats what it was sent."""

    daemon_threads = True

    def __init__(self, status: int, code: str) -> None:
        super().__init__(("127.0.0.1", 0), _Refusal)
        self.status, self.code = status, code
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Refusal(BaseHTTPRequestHandler):
    # the client waits to be told to send its body
    protocol_version = "HTTP/1.1"
    server: Refusing

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        repeated = "".join(f"<{name}>{value}</{name}>" for name, value in self.headers.items())
        body = f"<Error><Code>{self.server.code}</Code><Message>{repeated}</Message></Error>".encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _refuse

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "NoSuchBucket", "the bucket does not exist (NoSuchBucket, HTTP 404): create it, or correct the URL"),
        (403, "AccessDenied", "access denied (AccessDenied, HTTP 403): its operator must allow reading, writing"),
        (400, "ExpiredToken", "no longer (ExpiredToken, HTTP 400): renew them"),
        (403, "InvalidAccessKeyId", "no longer (InvalidAccessKeyId, HTTP 403): renew them"),
        (
            403,
            "SignatureDoesNotMatch",
            "(SignatureDoesNotMatch, HTTP 403): renew them (and check this machine's clock)",
        ),
    ],
)
def test_a_server_that_refuses(
    status: int, code: str, said: str, tmp_path: Path, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Refusing(status, code)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    tiny_job(tmp_path)
    try:
        for arguments in (("run", str(tmp_path / "job.toml"), "--ray", "none"), ("status",), ("gc",), ("verify",)):
            refused(call(*arguments, "--store", "s3://bucket/x"), "s3://bucket/x: cannot ", said)
    finally:
        server.shutdown()


def test_a_store_that_does_not_enforce_conditional_writes(
    tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Careless(FaultyProxy):
        """Drops If-None-Match, as some servers do."""

    proxy = Careless(os.environ["AWS_ENDPOINT_URL"])
    forward = proxy.RequestHandlerClass._forward  # type: ignore[attr-defined]

    def without(request: BaseHTTPRequestHandler, body: bytes) -> object:
        del request.headers["If-None-Match"]
        return forward(request, body)

    monkeypatch.setattr(proxy.RequestHandlerClass, "_forward", without)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    tiny_job(tmp_path)
    try:
        done = call("run", str(tmp_path / "job.toml"), "--ray", "none", "--store", s3_url)
        refused(done, "the store replaces an object that exists (it ignores If-None-Match)", "choose another store")
        assert open_store(s3_url).keys() == []
    finally:
        proxy.close()


def test_a_server_that_goes_away_while_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise EndpointConnectionError(endpoint_url="http://127.0.0.1")

    tiny_job(tmp_path)
    path = tmp_path / "rows" / "0.parquet"
    url, file = str(path), input_file(str(path))
    footer = read_footer(url, file)
    monkeypatch.setattr("pipeline.rows.groups.open_input", lambda _: Gone(path.read_bytes()))
    with pytest.raises(StoreError, match=r"0.parquet: cannot be read: the server does not answer"):
        list(read_groups(url, footer.file_id, [0], ["x"]))


def committed(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    run(tiny_job(tmp_path), open_store(str(store)), InlineExecutor())
    return store


def test_a_table_edited_by_hand(tmp_path: Path) -> None:
    store = committed(tmp_path)
    (part,) = store.glob("runs/*/tables/models/*.parquet")
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    done = call("verify", "--store", str(store))
    assert done.exit_code == 1
    assert f"{part.relative_to(store)} was changed: SHA-256" in done.output


def open_again(store: Path) -> None:
    """Take the run back to where its cells are there and its rows are not."""
    for path in [*store.glob("runs/*/reduced/*/*"), *store.glob("runs/*/_manifest.json")]:
        path.unlink()


def test_a_state_of_another_version(tmp_path: Path) -> None:
    store = committed(tmp_path)
    open_again(store)
    state = sorted(store.glob("states/*/*/*.safetensors"))[0]
    content = state.read_bytes()
    later = content.replace(b'\\"format\\": 2', b'\\"format\\": 3')
    assert len(later) == len(content)
    assert later != content
    state.write_bytes(later)
    arguments = ("run", str(tmp_path / "job.toml"), "--ray", "none", "--store", str(store))
    refused(call(*arguments), f"{state.relative_to(store)} has format 3", "use the version that wrote it, or delete it")
    state.write_bytes(content[:-1])
    refused(call(*arguments), f"{state.relative_to(store)} is damaged", "delete it and run again")
    assert not list(store.glob("runs/*/_manifest.json"))
    state.unlink()
    assert call(*arguments).exit_code == 0
    with pytest.raises(StoreError, match=r"a state object has format None"):
        decode_cell(content.replace(b'\\"format\\": 2', b'\\"tamrof\\": 2'))


def reencoded(path: Path, **changes: Any) -> None:
    """Write a cell as another program, or one on other weights, would have."""
    path.write_bytes(encode_cell(replace(decode_cell(path.read_bytes()), **changes)))


def test_states_of_weights_that_were_made_anew(tmp_path: Path) -> None:
    store = committed(tmp_path)
    open_again(store)
    weights = sorted(store.glob("models/*.safetensors"))[0]
    before = decode_checkpoint(weights.read_bytes())
    weights.write_bytes(encode_checkpoint(replace(before, weights={n: w + 1 for n, w in before.weights.items()})))
    arguments = ("run", str(tmp_path / "job.toml"), "--ray", "none", "--store", str(store))
    done = call(*arguments)
    refused(done, f"states/{weights.stem}/", "was measured on other weights", "made anew since: delete what is below")
    assert len(list(store.glob("runs/*/reduced/*/_done.json"))) == 1, "the other model is done"
    shutil.rmtree(store / "states" / weights.stem)
    (tables,) = store.glob("runs/*/tables")
    refused(call(*arguments), "part-00000.parquet holds other rows than belong there", "remove what is below runs/")
    shutil.rmtree(tables)
    assert call(*arguments).exit_code == 0
    assert call("verify", "--deep", "--store", str(store)).exit_code == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: {name: value[:-1] for name, value in state.items()},
            "has null.fired as torch.int64 (1, 2), not torch.int64 (2, 0)",
        ),
        (
            lambda state: {name: value.float() for name, value in state.items()},
            "has null.fired as torch.float32 (2, 2), not torch.int64 (2, 0)",
        ),
        (lambda state: {f"{name}s": value for name, value in state.items()}, "has null.fireds, "),
    ],
)
def test_states_that_do_not_fit_cost_no_other_model(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], said: str, tmp_path: Path
) -> None:
    store = committed(tmp_path)
    open_again(store)
    path = sorted(store.glob("states/*/*/*.safetensors"))[0]
    cell = decode_cell(path.read_bytes())
    reencoded(path, states={site: change(dict(state)) for site, state in cell.states.items()})
    arguments = ("run", str(tmp_path / "job.toml"), "--ray", "none", "--store", str(store))
    refused(call(*arguments), f"{path.relative_to(store)}: ", said, "delete it and run again")
    assert len(list(store.glob("runs/*/reduced/*/_done.json"))) == 1, "the other model is done"
    path.unlink()
    assert call(*arguments).exit_code == 0


def test_a_damaged_checkpoint_is_not_its_models_fault(tmp_path: Path) -> None:
    store = committed(tmp_path)
    open_again(store)
    (weights, *_) = sorted(store.glob("models/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    done = call("run", str(tmp_path / "job.toml"), "--ray", "none", "--store", str(store))
    refused(done, f"{weights.relative_to(store)} is damaged", "delete it and run again")
    assert not list(store.glob("runs/*/_manifest.json"))


def certificate(folder: Path) -> tuple[Path, Path]:
    """A key, and a certificate for 127.0.0.1 that it has signed itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a store of one's own")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (folder / "ca.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return folder / "key.pem", folder / "ca.pem"


@pytest.fixture
def secure(s3_server: str, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The endpoint of an S3 server behind TLS, and the authority that vouches for it."""
    key, authority = certificate(tmp_path)
    proxy = FaultyProxy(s3_server)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority, key)
    proxy.socket = context.wrap_socket(proxy.socket, server_side=True)
    yield proxy.endpoint.replace("http:", "https:"), authority
    proxy.close()


def test_another_server_by_the_usual_variables(
    secure: tuple[str, Path], s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, authority = secure
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_S3_ADDRESSING_STYLE", "path")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    # the proxy takes no body in chunks, which clients send over TLS
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setattr(pipeline.store, "FIRST_PAUSE_S", 0.0)
    with pytest.raises(StoreError, match=r"does not answer \(.*\): check AWS_ENDPOINT_URL"):
        open_store(s3_url).probe()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority))
    open_store(s3_url).probe()


def everything_in(store_url: str) -> bytes:
    store = open_store(store_url)
    return b"\0".join(key.encode() + store.get(key) for key in store.keys(""))


def assert_holds_no_secret(content: bytes, where: str) -> None:
    for name, value in SECRETS.items():
        assert value.encode() not in content, f"{name} is in {where}"


@pytest.fixture
def secrets(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that is reached with credentials which can be recognised."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return s3_url


def test_no_credential_is_pickled_stored_or_logged(
    secrets: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job, store = tiny_job(tmp_path), open_store(secrets)
    store.probe()
    plan = make_plan(resolve(job, store), store, workers=1)
    sent = [pickle.dumps((run_task, task, store)) for task in (*plan.train, *plan.measure)]
    assert sent
    assert_holds_no_secret(b"".join(sent), "what is sent to a worker")
    done = call("run", str(tmp_path / "job.toml"), "--ray", "none", "--store", secrets)
    assert done.exit_code == 0, done.output
    assert_holds_no_secret(done.output.encode() + caplog.text.encode(), "a message or log")
    assert_holds_no_secret(everything_in(secrets), "the store")
    assert len(committed_runs(store)) == 1


@pytest.mark.slow
@pytest.mark.real
def test_no_credential_reaches_ray_or_prefect(secrets: str, prefect: Prefect, tmp_path: Path) -> None:
    tiny_job(tmp_path)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as temporary:
        environment = {**os.environ, "RAY_TMPDIR": temporary, "PREFECT_API_URL": prefect.api}
        environment |= {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_LOGGING_LEVEL": "DEBUG"}
        command = [sys.executable, "-m", "pipeline.cli", "run", str(tmp_path / "job.toml"), "--ray", "local"]
        done = subprocess.run([*command, "--prefect", "--store", secrets], env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        assert_holds_no_secret(done.stdout + done.stderr, "a message")
        logs = [path for path in Path(temporary).rglob("*") if path.is_file()]
        assert any("raylet" in path.name for path in logs)
        for path in logs:
            assert_holds_no_secret(path.read_bytes(), f"Ray's {path.name}")
    assert_holds_no_secret(everything_in(secrets), "the store")
    for home in (tmp_path / "home", prefect.home):
        for path in home.rglob("*"):
            if path.is_file():
                assert_holds_no_secret(path.read_bytes(), f"Prefect's {path.name}")
    assert any(path.suffix == ".db" for path in prefect.home.rglob("*"))
