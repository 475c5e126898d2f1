"""The file system behind a URL: fsspec's door, and s3fs's.

Layer 1: the only file that imports s3fs, and with `published.py`, which DuckDB reads through, the only one that imports
fsspec. S3 takes endpoint, credentials, region and certificates from where every AWS tool takes them (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE, AWS_REGION, AWS_CA_BUNDLE, config files,
roles), and AWS_S3_ADDRESSING_STYLE = path | virtual | auto. None of it is pickled, stored or printed.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Coroutine
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import fsspec
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem

from pipeline.aws_settings import check_settings
from pipeline.errors import DataError, StoreError

# of a body that is being sent something has to go within this time; aiohttp's limit is on the answer once all is sent
SENDING_S = 20.0
# how often s3fs asks: each request, and of a read each of those times all over again. A read from a server that is
# silent takes 142 s so; it would take 6 minutes with s3fs's own five, and `Store` repeats as well
TRIES = 3


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it; one instance per process, which never caches a listing."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        return _local(), str(Path(os.path.expanduser(url)).absolute())
    if scheme in ("s3", "s3a"):
        environment = frozenset((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
        fs = _s3(os.getpid(), environment)
        return fs, fs._strip_protocol(url)
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:
        raise DataError(f"{scheme}://: no installed package reads this scheme ({error})") from error


@cache
def _local() -> Any:
    return fsspec.filesystem("file")


@cache
def following_links() -> Any:
    """The local file system, in whose listings a link is the file or directory that it leads to."""
    return _FollowingLinks()


class _FollowingLinks(LocalFileSystem):  # type: ignore[misc]
    """A link to nothing, or to a directory that it lies in, stays one: its type is "other"."""

    def info(self, path: Any, **kwargs: Any) -> dict[str, Any]:
        """What a listing says of an entry, asked for once more where it is a link."""
        if not (isinstance(path, os.DirEntry) and path.is_symlink()):
            return super().info(path, **kwargs)  # type: ignore[no-any-return]
        try:
            found: dict[str, Any] = super().info(path.path, **kwargs)
        except OSError:
            return super().info(path, **kwargs)  # type: ignore[no-any-return]
        is_loop = found["type"] == "directory" and _lies_in(path.path, os.path.realpath(path.path))
        return found | {"type": "other"} if is_loop else found


def _lies_in(link: str, directory: str) -> bool:
    """Whether one of the directories on the way to a link is that one, or is below it."""
    on_the_way = (os.path.realpath(parent) for parent in Path(link).parents)
    return any(Path(real).is_relative_to(directory) for real in on_the_way)


@lru_cache(maxsize=4)
def _s3(process: int, environment: frozenset[tuple[str, str]]) -> Any:
    # the arguments are the cache's key: s3fs is not safe to use after a fork, and reads the environment only once
    import s3fs  # 0.8 s, and only S3 needs it
    from botocore.exceptions import BotoCoreError

    known = dict(environment)
    check_settings(known)
    region = known.get("AWS_REGION") or known.get("AWS_DEFAULT_REGION")
    style = known.get("AWS_S3_ADDRESSING_STYLE")
    config: dict[str, Any] = {"s3": {"addressing_style": style}} if style else {}
    config["http_session_cls"] = _limited_session()
    if "AWS_MAX_ATTEMPTS" not in known:
        # `_persist` repeats as well: botocore's own five, with long pauses, would take a minute to report a wrong URL
        config["retries"] = {"mode": "standard", "total_max_attempts": 3}

    class S3(s3fs.S3FileSystem):  # type: ignore[misc]
        retries = TRIES

        async def set_session(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return await super().set_session(*args, **kwargs)
            except ValueError as error:
                if isinstance(error, BotoCoreError):
                    raise
                # botocore's own words repeat the value
                raise StoreError(
                    "the AWS settings cannot be used: one of the AWS_ variables, or of the entries of the AWS config "
                    "file (endpoint_url, max_attempts …), is no URL or no number where botocore expects one"
                ) from None

    return S3(
        client_kwargs={"region_name": region} if region else {},
        config_kwargs=config,
        max_concurrency=1,  # a whole object is one GET, without a HEAD before it
        use_listings_cache=False,
        skip_instance_cache=True,
    )


@cache
def _limited_session() -> Any:
    """aiobotocore's way to send a request, which comes to an end whatever the server does.

    aiohttp waits without a limit for a server to take a body, and for the "100 Continue" that botocore asks for first.
    A server that is silent is no HTTPClientError here: botocore would ask it three times for each time of s3fs's.
    """
    from aiobotocore.httpsession import AIOHTTPSession
    from botocore.exceptions import ReadTimeoutError

    class Limited(AIOHTTPSession):  # type: ignore[misc]
        async def send(self, request: Any) -> Any:
            try:
                if request.method not in ("PUT", "POST"):
                    # without a body all that takes time here is aiohttp's to limit, or a wait for a free connection
                    return await super().send(request)
                return await _while_it_goes_on(super().send(request), request.body)
            except (TimeoutError, ReadTimeoutError):
                raise AnswerTimeout from None

    return Limited


async def _while_it_goes_on(sending: Coroutine[Any, Any, Any], body: Any) -> Any:
    """What comes of sending; TimeoutError once nothing more of the body has gone for `SENDING_S`."""
    task = asyncio.ensure_future(sending)
    try:
        gone = -1
        while gone != (gone := _gone(body)):
            await asyncio.wait({task}, timeout=SENDING_S)
            if task.done():
                return task.result()
        raise TimeoutError
    finally:
        task.cancel()


def _gone(body: Any) -> int:
    from botocore.httpchecksum import AwsChunkedWrapper

    stream = body._raw if isinstance(body, AwsChunkedWrapper) else body
    return stream.tell() if isinstance(stream, io.IOBase) and not stream.closed else 0


class AnswerTimeout(FSTimeoutError):  # type: ignore[misc]  # noqa: N818
    """A server took a request, or a part of it, and said nothing."""
