"""Stores the cells of one chunk while the next one is measured.

Layer 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.cells import CellState, cell_key, encode_cell
from pipeline.measuring.task import MeasureTask, Missing
from pipeline.stopwatch import Stopwatch
from pipeline.store import Store


class Storing:
    """Stores what a chunk gave in a thread while the next one is measured: a disk and a bucket take their time.

    One chunk at a time, so that the states of no more than one wait. A task is done when all of its cells are whole.
    """

    def __init__(self, task: MeasureTask, store: Store, watch: Stopwatch) -> None:
        self._task = task
        self._store = store
        self._watch = watch
        self._thread = ThreadPoolExecutor(1)
        self._begun: Future[None] | None = None

    def __enter__(self) -> Storing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # who is told to end does not wait for a server
        self._thread.shutdown(wait=kind is None or issubclass(kind, Exception), cancel_futures=True)

    def begin(self, measured: Sequence[tuple[Missing, Mapping[str, CellState]]]) -> None:
        """Store the cells of a chunk, once those of the one before are stored. StoreError where one cannot be."""
        self.wait()
        self._begun = self._thread.submit(self._store_all, measured)

    def wait(self) -> None:
        """Return when everything is stored; StoreError where it cannot be."""
        with self._watch.on("storing"):
            if self._begun is not None:
                self._begun.result()
        self._begun = None

    def _store_all(self, measured: Sequence[tuple[Missing, Mapping[str, CellState]]]) -> None:
        for cell, states in measured:
            _store_cells(self._task, cell, states, self._store)


def _store_cells(task: MeasureTask, cell: Missing, cells: Mapping[str, CellState], store: Store) -> None:
    store.put_all(
        (cell_key(cell.model.id, task.state_names[name], cell.chunk.id), encode_cell(state))
        for name, state in cells.items()
    )
