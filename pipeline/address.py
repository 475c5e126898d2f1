"""Where Ray is: what an address says, and whether anybody listens there, before seconds are spent on importing Ray.

Layer 1: knows nothing of Ray but how its addresses look.
"""

from __future__ import annotations

import socket

from pipeline.errors import StoreError

NONE, LOCAL = "none", "local"
KNOCK_TIMEOUT_S = 5.0


def knock(address: str) -> None:
    """StoreError if an address is of another door than Ray's, or nothing listens there; "auto" is Ray's to find."""
    if address.startswith(("ray://", "http://", "https://")):
        raise StoreError(
            f"{address}: give the address of the cluster's head as HOST:6379, or `auto` on one of its nodes; "
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
    return StoreError(f"Ray at {address!r} {doing}: {why}. Start it, or use --ray local or none")
