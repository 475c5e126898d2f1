"""Where Ray is: what an address says, and whether anybody listens there, before seconds are spent on importing Ray.

Layer 1: knows nothing of Ray but how its addresses look. No address is printed but as `shown`.
"""

from __future__ import annotations

import re
import socket

from pipeline.errors import StoreError

NONE, LOCAL = "none", "local"
KNOCK_TIMEOUT_S = 5.0


def shown(text: str) -> str:
    """An address, or a text with URLs in it, without the names and passwords before the hosts.

    >>> shown("http://bob:secret@head:8265/api"), shown("bob:secret@head:6379"), shown("head:6379")
    ('http://head:8265/api', 'head:6379', 'head:6379')
    """
    return re.sub(r"(^|(?<=://))[^/?#\s]*@", "", text)


def knock(address: str) -> None:
    """StoreError if an address is of another door than Ray's, or nothing listens there; "auto" is Ray's to find."""
    if address.startswith(("ray://", "http://", "https://")):
        raise StoreError(
            f"{shown(address)}: give the address of the cluster's head as HOST:6379, or `auto` on one of its nodes; "
            "from outside, `neuron-census submit` takes its http:// address"
        )
    host, separator, port = address.rpartition(":")
    try:
        if separator:
            socket.create_connection((host, int(port)), timeout=KNOCK_TIMEOUT_S).close()
    except (ValueError, OSError) as error:
        raise unanswered(address, str(error)) from error


def unanswered(address: str, why: str) -> StoreError:
    """What is said where Ray is not found at an address, or cannot be started."""
    doing = "cannot be started here" if address == LOCAL else "does not answer"
    said = shown(why.replace(address, shown(address)))
    return StoreError(f"Ray at {shown(address)!r} {doing}: {said}. Start it, or use --ray local or none")
