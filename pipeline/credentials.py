"""Which URLs hold a secret: such a one is refused, and never repeated in a message.

Layer 0: imports nothing of the pipeline.
"""

from __future__ import annotations

import re

# what signs a URL, in its query or behind a ";", as S3, GCS, Azure and services with keys or tokens have it
_SIGNS = re.compile(
    r"[?&;#](x[-_](amz|goog)[-_](signature|credential|security[-_]token)|(aws|goog(le)?)_?access_?(key_?)?id"
    r"|(shared_?access_?)?sig(nature)?|sas(_?token)?|([a-z]+[-_]?)?token|jwt|bearer"
    r"|((api|access|account|auth|private|secret|subscription|x[-_]api)[-_]?)?key|([a-z]+[-_]?)?secret([-_]?access[-_]?key)?"
    r"|(user|db)?[-_]?(password|passwd|passphrase|pass|pwd)|pw|auth(orization)?|credentials?)=",
    re.IGNORECASE,
)
# whose URLs have a container where others have a name and a password
_NAMES_BEFORE_AT = ("abfs", "wasb")
# what is meant to be a URL, with a slash too few
_MISTYPED = re.compile(r"^(s3a?|gs|gcs|https?|file|memory):/?(?!/)", re.IGNORECASE)


def holds_credentials(url: str) -> bool:
    """Whether a URL holds a name and a password, or what signs it.

    >>> holds_credentials("s3:/key:secret@bucket"), holds_credentials("https://host/x?private_token=1")
    (True, True)
    >>> holds_credentials("abfss://box@account/x"), holds_credentials("https://host/x?keyword=1&monkey=2")
    (False, False)
    """
    # the part of a URL that may hold a name and a password
    scheme, _, rest = _MISTYPED.sub(r"\1://", url).partition("://")
    is_named = "@" in re.split(r"[/?#]", rest, maxsplit=1)[0] and not scheme.startswith(_NAMES_BEFORE_AT)
    return is_named or _SIGNS.search(url) is not None
