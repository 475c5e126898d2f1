"""A proxy in front of an S3 server that refuses for it, loses its answers and cuts them off: HTTP's faults."""

from __future__ import annotations

import http.client
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any
from urllib.parse import urlsplit

PUTS = {"500": 3, "503": 3, "409": 2, "dropped": 3, "unacknowledged": 5}
GETS = {"500": 3, "503": 3, "dropped": 2, "cut off": 5}
CODES = {"500": "InternalError", "503": "SlowDown", "409": "ConditionalRequestConflict"}


class FaultyProxy(ThreadingHTTPServer):
    """Serves on a free port from construction to `close`; what it does to a request is drawn from (seed, request)."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.target = urlsplit(target).netloc
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.seed = 0
        self.likelihood = 0.0
        self.history: list[str] = []
        self.closing = threading.Event()
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def begin(self, seed: int, likelihood: float) -> None:
        """Start a schedule."""
        with self._lock:
            self.seed, self.likelihood = seed, likelihood
            self._asked.clear()
            self.history.clear()

    def fault(self, method: str, path: str) -> str | None:
        kinds = {"PUT": PUTS, "GET": GETS}.get(method)
        # buckets and probes have names that are drawn anew: no schedule could repeat them
        key = path.split("/", 2)[-1]
        if kinds is None or "probe-" in path or ("?" not in key and "/" not in key):
            return None
        with self._lock:
            self._asked[f"{method} {key}"] += 1
            count = self._asked[f"{method} {key}"]
        random = Random(f"{self.seed}/{method}/{key}/{count}")
        if random.random() >= self.likelihood:
            return None
        chosen = random.choices(list(kinds), list(kinds.values()))[0]
        with self._lock:
            self.history.append(f"{chosen}: {method} {count} of {key}")
        return chosen

    def handle_error(self, *_: Any) -> None:
        """A client that hung up is none of our business."""

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault(self.command, self.path)
        if fault in CODES:
            self._refuse(int(fault), CODES[fault])
        elif fault == "dropped":
            self._hang_up()
        elif fault == "silent":
            self.server.closing.wait()
            self._hang_up()
        else:
            status, headers, content = self._forward(body)
            if fault == "unacknowledged":
                self._hang_up()
            else:
                self._reply(status, headers, content, cut=fault == "cut off" and len(content) > 1)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.server.target, timeout=30)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _reply(self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._hang_up()

    def _refuse(self, status: int, code: str) -> None:
        content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>a fault</Message></Error>".encode()
        self._reply(status, [("Content-Type", "application/xml")], content)

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
