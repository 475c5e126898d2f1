"""What an open run needs of the store, so that nothing of it is taken for garbage while it is at work.

Layer 1. Written before anything is planned on what exists, a function of the run alone; after the commit it still says
which states and checkpoints the run was made from.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from pipeline.errors import StoreError
from pipeline.store import Store

NAME = "_claims.json"


@dataclass(frozen=True)
class Claims:
    """Ids of checkpoints, and pairs of (folders of states, ids of chunks) that a run may read of each of them."""

    checkpoints: tuple[str, ...]
    cells: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]


def claims_key(run: str) -> str:
    """Where the claims of a run are stored."""
    return f"runs/{run}/{NAME}"


def log_prefix(run: str) -> str:
    """Where the drivers of a run say that they are at work, and what they did; the names are in order of time."""
    return f"runs/{run}/log/"


def write_claims(store: Store, run: str, claims: Claims) -> None:
    """Store what a run needs, unless that is known already."""
    store.put_once(claims_key(run), json.dumps(asdict(claims), sort_keys=True).encode())


def read_claims(store: Store, run: str) -> Claims:
    """What a run needs; MissingObject if it never said so, StoreError if that is damaged."""
    try:
        value = json.loads(store.get(claims_key(run)))
        cells = tuple((tuple(states), tuple(chunks)) for states, chunks in value["cells"])
        return Claims(tuple(value["checkpoints"]), cells)
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{claims_key(run)} is damaged ({type(error).__name__}); remove it and run again") from error
