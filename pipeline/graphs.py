"""A batch's forward and all that its sites add, launched at once: captured as a CUDA graph, done again for others.

Layer 2. On a GPU a small batch waits for Python, launch by launch. Once batches of a kind were shown one like the
other, the next is captured, and those behind it are copied to where it lay. A graph does what was done then, whatever
Python would do now: so there is one only for models whose modules decide nothing by what they keep (`keeps_nothing`),
where all is added in place (`Accumulator.room`) and nothing waits for the GPU. It launches the same kernels, so the
bits are the same.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from pipeline.batch import Batch
from pipeline.devices import GPU
from pipeline.flow.script import Script
from pipeline.flow.signature import Signature, signature_of
from pipeline.flow.trace import copied
from pipeline.kernels.accumulate import Accumulator

# batches of a kind that follow a script launch by launch: behind them nothing is made, moved or compiled any more
WARM = 2
# batches before those that are one launch, of a model that was shown none: a tap's, a script's, and that captured
BEFORE = WARM + 3
# a graph takes as long to make as some ten batches, and keeps its batch
MOST = 8
# kinds and forms of batches that are counted
MOST_COUNTED = 64
# whose modules keep nothing from one forward in eval mode to the next
_KNOWN = ("torch.nn.", "pipeline.models.", "pipeline.attention")
# Triton makes other code for tensors that do not begin at a multiple of so many bytes
_ALIGNED = 16
# what torch says where Python waits for a GPU
_WAITS = "called a synchronizing CUDA operation"


class Shown(NamedTuple):
    """What a model returns for a batch, how many presentations were added to what, and the script that was followed.

    `added` is None where anything was added that is no accumulator's.
    """

    out: Any
    added: Mapping[Accumulator, int] | None
    script: Script | None


Show = Callable[[Batch], Shown]
# models of which no graph could be captured
_UNFIT: WeakSet[nn.Module] = WeakSet()
# whose memory another graph may have as well
_ALIVE: WeakSet[torch.cuda.CUDAGraph] = WeakSet()


class Added:
    """What a batch adds to accumulators, as long as they have not begun anew."""

    def __init__(self, presentations: Mapping[Accumulator, int]) -> None:
        self._presentations = dict(presentations)
        self._begun = {one: one.begun for one in presentations}

    @property
    def fits(self) -> bool:
        """Whether as much can be added again, to the same memory."""
        return all(
            one.begun == self._begun[one] and one.room >= presentations
            for one, presentations in self._presentations.items()
        )

    def count(self) -> None:
        """Note that it was added again."""
        for one, presentations in self._presentations.items():
            one.count(presentations)


class Graphs:
    """The graphs of a model whose states run."""

    def __init__(self) -> None:
        self.remarks: list[str] = []
        # by kind and form: batches that were shown one like the other, and what the last one added
        self._warm: OrderedDict[Hashable, tuple[int, Added]] = OrderedDict()
        self._graphs: dict[Hashable, _Graph] = {}

    @property
    def number(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def show(self, model: nn.Module, batch: Batch, kind: Hashable, show: Show) -> Any:
        """What the model returns, as `show(batch)` says; by a graph if there is one of such batches of this kind."""
        found = _form_of(model, batch)
        if found is None:
            return show(batch).out
        form, leaves = found
        key = kind, form
        graph = self._graphs.get(key)
        if graph is not None:
            if graph.fits(model):
                return graph.show(leaves)
            del self._graphs[key]
        number, added = self._warm.pop(key, (0, None))
        if self.number >= MOST or (added is not None and not added.fits) or not keeps_nothing(model):
            number = 0
        if number >= WARM and _has_memory(batch.uid_N.device):
            graph = self._captured(model, batch, leaves, show)
            if graph is not None:
                self._graphs[key] = graph
                return graph.launch()
        # a capture that fails leaves torch's random numbers unusable, so it is not tried where it would
        shown, waits = _watched(show, batch) if number == WARM - 1 else (show(batch), "")
        if waits:
            self._give_up(model, waits)
        elif shown.script is not None and shown.added is not None:
            self._warm[key] = (number + 1, Added(shown.added))
            if len(self._warm) > MOST_COUNTED:
                self._warm.popitem(last=False)
        return shown.out

    def _captured(self, model: nn.Module, batch: Batch, leaves: Sequence[torch.Tensor], show: Show) -> _Graph | None:
        try:
            return _Graph(model, batch, leaves, show)
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

    def __init__(self, model: nn.Module, batch: Batch, leaves: Sequence[torch.Tensor], show: Show) -> None:
        with torch.inference_mode(False):
            self._batch = _of_its_own(batch)
        signature = signature_of(self._batch)
        assert signature is not None
        self._leaves = _leaves(self._batch, signature)
        if any(mine is theirs for mine, theirs in zip(self._leaves, leaves, strict=True)):
            raise RuntimeError("its batch holds tensors in what cannot be copied")
        self._modules = list(model.modules())
        self._model = _fingerprint(self._modules)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(batch.uid_N.device):
            shown = self._captured(show)
        if shown.added is None or shown.script is None:
            raise RuntimeError("its batch was not shown as those before")
        # the numbers of entries and positions that are the same in every batch are the script's
        self._out, self._added, self._script = shown.out, Added(shown.added), shown.script

    def _captured(self, show: Show) -> Shown:
        # it cannot use what is kept for launches
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with torch.cuda.stream(_stream(self._batch.uid_N.device)):
            # other threads pin memory meanwhile
            self._graph.capture_begin(pool=_pool(), capture_error_mode="thread_local")
            try:
                shown = show(self._batch)
            except BaseException:
                # memory of a capture that failed is left to it
                _ALIVE.clear()
                with suppress(RuntimeError):
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        _ALIVE.add(self._graph)
        return shown

    def fits(self, model: nn.Module) -> bool:
        """Whether there is room where it adds to, and the model is as it was."""
        return self._added.fits and self._modules[0] is model and self._model == _fingerprint(self._modules)

    def show(self, leaves: Sequence[torch.Tensor]) -> Any:
        """Do with a batch of these tensors what was done with the one that was captured."""
        with torch.inference_mode(False), torch.no_grad():
            for held, given in zip(self._leaves, leaves, strict=True):
                held.copy_(given, non_blocking=True)
        out = self.launch()
        self._added.count()
        return out

    def launch(self) -> Any:
        """Do it with the batch that it holds; what the model returns is the caller's own."""
        self._graph.replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, self._out)


def keeps_nothing(model: nn.Module) -> bool:
    """Whether all modules are torch's or a built-in family's, which do the same in every forward in eval mode.

    And nothing of a user's is called by them or hooks into them: what that decides by cannot be known.
    """
    return not _hooked_everywhere() and all(
        _is_known(type(module))  # type: ignore[arg-type]
        and not _hooked(module)
        and not any(_is_foreign(value) for value in vars(module).values())
        for module in model.modules()
    )


@lru_cache(maxsize=1024)
def _is_known(kind: type) -> bool:
    # a parametrized module's class is torch's, and does what its base does
    return all(one is object or one.__module__.startswith(_KNOWN) for one in kind.__mro__)


def _is_foreign(value: Any) -> bool:
    """Whether something that a module holds is, or holds, code which is neither torch's nor ours."""
    if isinstance(value, Mapping):
        return any(map(_is_foreign, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(_is_foreign, value))
    # a tensor's class may do otherwise whatever is done with it
    code = type(value) if isinstance(value, torch.Tensor) else value
    if not callable(code) or isinstance(code, nn.Module):
        return False
    return not f"{getattr(code, '__module__', None) or 'torch'}.".startswith(("torch.", "pipeline."))


def _hooked(module: nn.Module) -> bool:
    own = vars(module)
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"]) or "forward" in own


def _hooked_everywhere() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def _fingerprint(modules: Sequence[nn.Module]) -> list[int]:
    """Which modules and tensors modules have, and where these are; nothing where something hooks in.

    Asked for every batch, so in one loop: `Module.modules` alone takes as long.
    """
    found: list[int] = []
    if _hooked_everywhere():
        return found
    for module in modules:
        if _hooked(module):
            return []
        own = vars(module)
        found += map(id, own["_modules"].values())
        for held in (own["_parameters"], own["_buffers"]):
            for tensor in held.values():
                if tensor is not None:
                    found += (id(tensor), tensor.data_ptr())
    return found


def _form_of(model: nn.Module, batch: Batch) -> tuple[Hashable, list[torch.Tensor]] | None:
    """What batches that one graph can take have in common, and the tensors of this one; None where there is none."""
    if batch.uid_N.device.type != GPU or batch.call is not None or model in _UNFIT:
        return None
    signature = signature_of(batch)
    if signature is None:
        return None
    leaves = _leaves(batch, signature)
    if not all(leaf.device.type == GPU and leaf.data_ptr() % _ALIGNED == 0 and _is_dense(leaf) for leaf in leaves):
        return None
    return (signature.key, tuple(leaf.dtype for leaf in leaves)), leaves


def _is_dense(leaf: torch.Tensor) -> bool:
    """Whether a copy lies as the tensor does."""
    return leaf.is_contiguous() or torch.empty_like(leaf, device="meta").stride() == leaf.stride()


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
    waits = [one for one in said if _WAITS in str(one.message)]
    for one in said:
        # torch says once that it does not see all
        if one not in waits and "debug mode is a prototype" not in str(one.message):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno, source=one.source)
    return shown, f"{waits[0].message} ({waits[0].filename}:{waits[0].lineno})" if waits else ""


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


def _leaves(batch: Batch, signature: Signature) -> list[torch.Tensor]:
    """All tensors of a batch, each once."""
    named = (batch.uid_N, batch.label_N, batch.label_NS)
    return [*signature.leaves, *(one for one in named if one is not None)]


def _of_its_own(batch: Batch) -> Batch:
    """A batch of its own memory, laid out alike."""
    names = {name: getattr(batch, name) for name in ("uid_N", "label_N", "label_NS")}
    return replace(copied(batch), **pytree.tree_map_only(torch.Tensor, torch.clone, names))
