"""Whether the environment's AWS settings can be used, said before botocore raises what no one can act on.

Layer 1: knows the variables, not botocore. A value is repeated where no secret can be in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from pipeline.credentials import holds_credentials
from pipeline.errors import StoreError, nearest

_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_CHOICES = {
    "AWS_S3_ADDRESSING_STYLE": ("path", "virtual", "auto"),
    "AWS_RETRY_MODE": ("standard", "adaptive", "legacy"),
}


def check_settings(environment: Mapping[str, str]) -> None:
    """StoreError at the first variable that is no endpoint, number, choice or file where it has to be one."""
    given = {name: value for name, value in environment.items() if value}
    for name in _ENDPOINTS:
        if name in given and not _is_endpoint(given[name]):
            secret = "@" in given[name] or holds_credentials(given[name])
            shown = "" if secret else f" = {given[name]!r}"
            raise StoreError(
                f"{name}{shown}: expected http://HOST:PORT or https://HOST:PORT, without a name or password"
            )
    attempts = given.get("AWS_MAX_ATTEMPTS", "1")
    if not attempts.isdecimal() or int(attempts) < 1:
        raise StoreError(f"AWS_MAX_ATTEMPTS = {attempts!r}: expected a whole number from 1")
    for name, choices in _CHOICES.items():
        if name in given and given[name] not in choices:
            raise StoreError(f"{name} = {given[name]!r}: {nearest(given[name], choices)}")
    bundle = given.get("AWS_CA_BUNDLE")
    if bundle and not os.access(bundle, os.R_OK):
        raise StoreError(f"AWS_CA_BUNDLE = {bundle!r}: expected a file of certificates that can be read")


def _is_endpoint(value: str) -> bool:
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        return False
    is_plain = "@" not in parts.netloc and not any(letter.isspace() for letter in value)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and is_plain
