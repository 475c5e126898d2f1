"""A batch's forward and all that its sites add, launched at once: captured as a CUDA graph, done again for others.

Layer 2. On a GPU a small batch waits for Python, launch by launch. Once batches of a kind were shown one like the
other, the next is captured, and those behind it are copied to where it lay. A graph does what was done then, whatever
Python would do now: so there is one only for models whose modules decide nothing by what they keep (`keeps_nothing`),
where all is added in place (`Accumulator.room`) and nothing waits for the GPU. It launches the same kernels, so the
bits are the same.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pipeline.batch import Batch
from pipeline.devices import GPU
from pipeline.flow.holdings import held_tensors
from pipeline.flow.script import Script
from pipeline.flow.signature import signature_of
from pipeline.flow.trace import copied
from pipeline.kernels.accumulate import Accumulator

# batches of a kind that follow a script launch by launch: behind them nothing is made, moved or compiled any more
WARM = 2
# batches before those that are one launch, of a model that was shown none: a tap's, a script's, and that captured
BEFORE = WARM + 3
# a graph takes as long to make as some ten batches, and keeps its batch
MOST = 8
# whose modules keep nothing from one forward in eval mode to the next
_KNOWN = ("torch.nn.", "pipeline.models.", "pipeline.attention")


class Shown(NamedTuple):
    """What a model returns for a batch, how many presentations were added to what, and the script that was followed.

    `added` is None where anything was added that is no accumulator's.
    """

    out: Any
    added: Mapping[Accumulator, int] | None
    script: Script | None

    @property
    def again(self) -> bool:
        """Whether the same could be done again."""
        return self.script is not None and self.added is not None and _have_room(self.added)


Show = Callable[[Batch], Shown]
# models of which no graph could be captured
_UNFIT: WeakSet[nn.Module] = WeakSet()
# whose memory another graph may have as well
_ALIVE: WeakSet[torch.cuda.CUDAGraph] = WeakSet()


class Graphs:
    """The graphs of a model whose states run."""

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self._warm: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Graph] = {}

    @property
    def number(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def show(self, model: nn.Module, batch: Batch, kind: Hashable, show: Show) -> Any:
        """What the model returns, as `show(batch)` says; by a graph if there is one of such batches of this kind."""
        key = _key_of(model, batch, kind)
        if key is None:
            return show(batch).out
        graph = self._graphs.get(key)
        if graph is not None and graph.fits:
            return graph.show(batch)
        if graph is not None:
            del self._graphs[key]
            self._warm[key] = 0
        if self._warm[key] >= WARM and self.number < MOST and _has_memory(batch.uid_N.device):
            graph = self._captured(model, batch, show)
            if graph is not None:
                self._graphs[key] = graph
                return graph.launch()
        if self._warm[key] == WARM - 1:
            # a capture that fails leaves torch's random numbers unusable
            shown, waits = _watched(show, batch)
            if waits:
                self._give_up(model, waits)
        else:
            shown = show(batch)
        self._warm[key] = self._warm[key] + 1 if shown.again else 0
        return shown.out

    def _captured(self, model: nn.Module, batch: Batch, show: Show) -> _Graph | None:
        try:
            return _Graph(model, batch, show)
        except Exception as error:  # noqa: BLE001
            # whatever it is that a graph cannot do: launch by launch it is done, or fails by itself
            self._give_up(model, str(error))
            return None

    def _give_up(self, model: nn.Module, why: str) -> None:
        _UNFIT.add(model)
        said = why.strip().partition("\n")[0]
        self.remarks.append(f"batches are shown to a GPU launch by launch, for no CUDA graph can be made: {said}")


class _Graph:
    """One captured batch: the accumulators have counted its presentations, and `launch` is what adds them."""

    def __init__(self, model: nn.Module, batch: Batch, show: Show) -> None:
        self._batch = _of_its_own(batch)
        self._leaves = _leaves(self._batch)
        self._held = [tensor for _, tensor in held_tensors(model).values()]
        self._places = [tensor.data_ptr() for tensor in self._held]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(batch.uid_N.device):
            shown = self._captured(show)
        if shown.added is None or shown.script is None:
            raise RuntimeError("its batch was not shown as those before")
        # the numbers of entries and positions that are the same in every batch are the script's
        self._out, self._added, self._script = shown.out, shown.added, shown.script

    def _captured(self, show: Show) -> Shown:
        # it cannot use what is kept for launches
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with torch.cuda.stream(_stream(self._batch.uid_N.device)):
            # other threads pin memory meanwhile
            self._graph.capture_begin(pool=_pool(), capture_error_mode="thread_local")
            try:
                shown = show(self._batch)
            except Exception:
                # memory of a capture that failed is left to it
                _ALIVE.clear()
                with suppress(RuntimeError):
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        _ALIVE.add(self._graph)
        return shown

    @property
    def fits(self) -> bool:
        """Whether there is room for what it adds, and the model's tensors are where they were."""
        where = (tensor.data_ptr() for tensor in self._held)
        return _have_room(self._added) and all(one == other for one, other in zip(where, self._places, strict=True))

    def show(self, batch: Batch) -> Any:
        """Do with a batch what was done with the one that was captured."""
        with torch.no_grad():
            for held, given in zip(self._leaves, _leaves(batch), strict=True):
                held.copy_(given, non_blocking=True)
        out = self.launch()
        for accumulator, presentations in self._added.items():
            accumulator.count(presentations)
        return out

    def launch(self) -> Any:
        """Do it with the batch that it holds; what the model returns is the caller's own."""
        self._graph.replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, self._out)


def keeps_nothing(model: nn.Module) -> bool:
    """Whether all modules are torch's or a built-in family's, which do the same in every forward in eval mode.

    And nothing hooks into them: what a user's own code decides by cannot be known.
    """
    return all(
        _is_known(type(module))  # type: ignore[arg-type]
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        for module in model.modules()
    )


@lru_cache(maxsize=1024)
def _is_known(kind: type) -> bool:
    # a parametrized module's class is torch's, and does what its base does
    return all(one is object or one.__module__.startswith(_KNOWN) for one in kind.__mro__)


def _key_of(model: nn.Module, batch: Batch, kind: Hashable) -> Hashable:
    """What batches that one graph can take have in common; None where there is none."""
    if batch.uid_N.device.type != GPU or batch.call is not None or model in _UNFIT or not keeps_nothing(model):
        return None
    signature = signature_of(batch)
    if signature is None or not all(leaf.device.type == GPU for leaf in _leaves(batch)):
        return None
    return kind, signature.key


def _watched(show: Show, batch: Batch) -> tuple[Shown, str]:
    """Show a batch, and say what of it waits for the GPU, if anything does."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            shown = show(batch)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [f"{one.message} ({one.filename}:{one.lineno})" for one in said if "synchronizing" in str(one.message)]
    return shown, waits[0] if waits else ""


@lru_cache(maxsize=8)
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where all graphs are captured: what one had of their memory can be another's only on the same stream."""
    return torch.cuda.Stream(device)


def _pool() -> Any:
    """The memory of the graphs that there are: one is done after the other, and none needs what another left there."""
    return next((graph.pool() for graph in _ALIVE), None)


def _has_memory(device: torch.device) -> bool:
    """Whether what a batch takes fits twice: for launches, and in a graph's own memory."""
    taken = torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    of_share = int(total * torch.cuda.get_per_process_memory_fraction(device))
    room = min(free + torch.cuda.memory_reserved(device), of_share) - taken
    return 2 * (torch.cuda.max_memory_allocated(device) - taken) <= room


def _have_room(added: Mapping[Accumulator, int]) -> bool:
    return all(accumulator.room >= presentations for accumulator, presentations in added.items())


def _leaves(batch: Batch) -> list[torch.Tensor]:
    """All tensors of a batch."""
    parts = (batch.inputs, dict(batch.kwargs), batch.mask_NS, batch.uid_N, batch.label_N, batch.label_NS)
    return [leaf for leaf in pytree.tree_leaves(parts) if isinstance(leaf, torch.Tensor)]


def _of_its_own(batch: Batch) -> Batch:
    """A batch of its own memory, laid out alike."""
    names = {name: getattr(batch, name) for name in ("uid_N", "label_N", "label_NS")}
    made = replace(copied(batch), **pytree.tree_map_only(torch.Tensor, torch.clone, names))
    mine, theirs = signature_of(made), signature_of(batch)
    if mine is None or theirs is None or mine.key != theirs.key:
        raise RuntimeError("a copy of its batch is laid out otherwise")
    return made
