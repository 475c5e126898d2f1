"""What an S3 server refuses, or does as none should: one message that says who must do what, exit code 2."""

from __future__ import annotations

import io
import ipaddress
import os
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import pipeline.store
from pipeline.errors import StoreError
from pipeline.inputs import input_file
from pipeline.rows.footers import read_footer
from pipeline.rows.groups import read_groups
from pipeline.store import open_store
from tests.durability.proxy import FaultyProxy
from tests.durability.schedules import tiny_job
from tests.operating import call, refused


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
