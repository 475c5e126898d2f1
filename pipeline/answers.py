"""What the failure of a storage driver means: taken, to be repeated, or refused, and who must do what about it.

Layer 1: imports botocore only once something has failed. s3fs gives HTTP answers as plain OSErrors, some under a
misleading number (a lost conditional write is EINVAL on some servers), so what counts is the chain of causes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

_ADVICE: dict[int, str] = {
    errno.ENOSPC: ": free space there, then run again",
    errno.EDQUOT: ": raise the quota, then run again",
    errno.EROFS: ": choose a store that can be written",
    errno.EPERM: ": the file system must support hard links; choose another directory",
    errno.EOPNOTSUPP: ": the file system must support hard links; choose another directory",
}

_OF_BOTOCORE = ": check the AWS_ variables and the AWS config file"
# what botocore makes of settings and names that are not valid, by its class; its words repeat their values
_SETTINGS = {
    "ProfileNotFound": "AWS_PROFILE names no profile of the AWS config files: correct it, or unset it",
    "ParamValidationError": "the name of the bucket or object is not valid: a bucket has letters, digits, '.', '-' and "
    "'_' only",
    "EndpointProviderError": "no address of a server comes of AWS_ENDPOINT_URL, AWS_REGION and the bucket's name: "
    "correct them",
    "InvalidRegionError": "AWS_REGION, or AWS_DEFAULT_REGION, is no region's name: expected one as us-east-1",
    "ConfigParseError": "the AWS config file is not valid: correct it (~/.aws/config, or AWS_CONFIG_FILE)",
}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def server_answer(error: BaseException) -> tuple[int, str]:
    """The HTTP status and S3 error code behind an error, "" of a server without codes; (0, "") if none answered."""
    from aiohttp import ClientResponseError  # on the path of errors only
    from botocore.exceptions import ClientError

    for cause in _causes(error):
        if isinstance(cause, ClientError):
            status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(cause.response.get("Error", {}).get("Code", ""))
        if isinstance(cause, ClientResponseError):
            return cause.status, ""
    return 0, ""


def is_absent(error: BaseException) -> bool:
    """Whether the answer is that nothing is there; some drivers say so of a server that does not answer, too."""
    is_missing = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
    return is_missing and server_answer(error)[0] in (0, 404) and not _is_unanswered(error)


def is_taken(error: BaseException) -> bool:
    """Whether a create-only write was refused because the key is taken."""
    return any(isinstance(cause, FileExistsError) for cause in _causes(error)) or server_answer(error)[0] == 412


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment."""
    # 409: another conditional write of the same key is under way
    status, code = server_answer(error)
    if status:
        return status in (408, 409, 429) or status >= 500 or code in ("RequestTimeout", "SlowDown", "IncompleteBody")
    return _is_unanswered(error)


def _is_unanswered(error: BaseException) -> bool:
    from aiohttp import ClientConnectionError, ClientPayloadError
    from botocore.exceptions import ConnectionError, HTTPClientError, IncompleteReadError

    # an answer that was cut off is none
    kinds = ConnectionError | HTTPClientError | IncompleteReadError
    kinds |= ClientConnectionError | ClientPayloadError | TimeoutError
    return any(isinstance(cause, kinds) for cause in _causes(error))


def reason(error: BaseException, *, access: str = "reading, writing, listing and deleting") -> str | None:
    """What is wrong and who must do what; never a server's own text, which may repeat what it was sent.

    `access` is what has to be allowed there.
    """
    from aiohttp import ClientConnectionError
    from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError

    status, code = server_answer(error)
    answer = f"({', '.join(filter(None, (code, f'HTTP {status}')))})" if status else f"({type(error).__name__})"
    if code == "NoSuchBucket":
        return f"the bucket does not exist {answer}: create it, or correct the URL"
    if code in ("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed", "InvalidToken"):
        return f"the credentials are not valid, or no longer {answer}: renew them (and check this machine's clock)"
    if any(isinstance(cause, NoCredentialsError | PartialCredentialsError) for cause in _causes(error)):
        return "no credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role"
    if setting := next((_SETTINGS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _SETTINGS), None):
        return setting
    if _is_unanswered(error):
        *_, root = _causes(error)
        where = "the URL" if isinstance(error, FileNotFoundError | ClientConnectionError) else "AWS_ENDPOINT_URL"
        return f"the server does not answer ({type(root).__name__}): check {where}, the network and the server"
    if isinstance(error, PermissionError) and error.errno != errno.EPERM:
        return f"access denied {answer}: its operator must allow {access} here"
    if is_absent(error):
        return "there is no such file or directory"
    if status:
        return f"the server refuses {answer}"
    if isinstance(error, OSError | BotoCoreError):
        number = (error.errno or 0) if isinstance(error, OSError) else 0
        advice = _ADVICE.get(number, "") if number or isinstance(error, OSError) else _OF_BOTOCORE
        return f"{os.strerror(number) if number else type(error).__name__}{advice}"
    return None
