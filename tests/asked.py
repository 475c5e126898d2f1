"""Questions to a store, each by a connection of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from pipeline.query import Connection, ask, connect
from pipeline.store import Store, open_store
from tests.handmade import write_run


@contextmanager
def opened(store: Store, **options: Any) -> Iterator[Connection]:
    with closing(connect(store, **options)) as con:
        yield con


def answers(store: Store, sql: str, **options: Any) -> list[tuple[Any, ...]]:
    with opened(store, **options) as con:
        return list(ask(con, sql).rows)


def two_runs(url: str) -> Store:
    """A store with an older run of two pairs of models, and a newer one of one of the pairs."""
    store = open_store(url)
    write_run(store, "old", ("mlp-0", "mlp-0-init", "cnn-0", "cnn-0-init"))
    write_run(store, "young", change={"z_mean": 1.0})
    return store
