"""Load a model's checkpoint and find its sites, once per process.

Layer 3. Every task that needs a model goes through here: the same probe, so the same sites, everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pipeline.batch import Batch
from pipeline.devices import CPU, moved
from pipeline.errors import DataError
from pipeline.fit.objective import Objective
from pipeline.flow.discover import Discovery, discover, refuse_no_choice
from pipeline.flow.forwards import Forwards
from pipeline.hashing import sha256
from pipeline.job_sections import DataSpec, SiteSelection
from pipeline.models.base import Checkpoint, checkpoint_key, decode_checkpoint
from pipeline.origins import Origin, module_of, objective_of, shown
from pipeline.registry import sources
from pipeline.rows.tally import forget_parsed
from pipeline.run_models import Model
from pipeline.sources.base import Chunk
from pipeline.store import Store

# rows that a model is shown to find its sites and to check its patterns
PROBE_ROWS = 16
# and where some of its parameters do not act on those
WIDE_PROBE_ROWS = 64
# beyond either of these a process lets go of models that are not of its task; how many one task holds the plan decides
KEPT_MODELS = 16
KEPT_BYTES = 2 << 30
# of two data sets the first few rows, and of those that need more the next: a whole graph is read again
KEPT_PROBES = 4
KEPT_PROBE_BYTES = 64 << 20
ON_CPU = torch.device(CPU)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to be measured. `sha256` is its checkpoint's, as stored; `objective` what it is scored as."""

    origin: Origin
    module: nn.Module
    discovery: Discovery
    checkpoint: Checkpoint
    sha256: str
    objective: Objective

    def shown(self, batch: Batch) -> Batch:
        """A batch of the data set as the model takes it."""
        return shown(self.origin, batch)

    @cached_property
    def forwards(self) -> Forwards:
        """How it computes, as far as chunks have shown."""
        return Forwards(self.discovery)


@dataclass(frozen=True)
class Probe:
    """Where the rows come from that a model is shown to find its sites: the first ones of a chunk.

    `others` are looked into in order where that has none: what a footer says of a split may be wrong.
    """

    data: str
    spec: DataSpec
    chunk: Chunk
    others: tuple[Chunk, ...] = ()


def load(model: Model, probe: Probe, sites: SiteSelection, store: Store, device: torch.device = ON_CPU) -> Loaded:
    """The model with its weights on a device, in eval mode, and its sites. ModelError where it cannot be."""
    call = _Call(model, probe, sites, store, device)
    if call not in _KEPT:
        _KEPT[call] = _loaded(call)
    return _KEPT[call]


def keep_only(models: Collection[str]) -> None:
    """Let go of every model but those that a task is about, once a process holds many, or large ones."""
    held = sum(weight_bytes(loaded.module) for loaded in _KEPT.values())
    ids = {call.arguments[0].id for call in _KEPT} | set(models)
    if len(ids) > KEPT_MODELS or held > KEPT_BYTES:
        for call in [call for call in _KEPT if call.arguments[0].id not in models]:
            del _KEPT[call]


def forget() -> None:
    """Let go of every model, of what they are shown and of what its values are numbered by."""
    _KEPT.clear()
    _FIRST.clear()
    forget_parsed()


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(one.numel() * one.element_size() for one in (*module.parameters(), *module.buffers()))


class _Call:
    """Arguments of `load`, by what tells a loaded model from another."""

    def __init__(self, model: Model, probe: Probe, sites: SiteSelection, store: Store, device: torch.device) -> None:
        self.arguments = (model, probe, sites, store, device)
        chosen = sites.model_dump_json()
        self._key = (model.id, model.name, model.origin.dtype, probe.chunk.id, store.url, chosen, device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Call) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


# resident: a worker that takes another task of the same models has them already
_KEPT: dict[_Call, Loaded] = {}
# first rows by data set, chunk, number and store
_FIRST: dict[tuple[str, str, int, str], Batch] = {}


def _loaded(call: _Call) -> Loaded:
    model, probe, sites, store, device = call.arguments
    key = checkpoint_key(model.id)
    content = store.get(key)
    checkpoint = decode_checkpoint(content, key=key)
    module = module_of(model.origin, checkpoint).to(device)

    def first(rows: int) -> Batch:
        return moved(probe_batch(probe, store, rows), device, getattr(torch, model.origin.dtype))

    found = find_sites(module, lambda rows: shown(model.origin, first(rows)), sites)
    refuse_no_choice(found, sites.include, sites.exclude)
    objective = objective_of(model.origin, module, lambda: first(PROBE_ROWS))
    return Loaded(model.origin, module, found, checkpoint, sha256(content), objective)


def find_sites(module: nn.Module, first: Callable[[int], Batch], sites: SiteSelection) -> Discovery:
    """The sites of a module as the first few rows show them, or more where those leave parameters idle."""
    # what is drawn would be for the order of the tasks to say
    find = partial(discover, module, include=sites.include, exclude=sites.exclude, rows=sites.rows, may_draw=False)
    found = find(first(PROBE_ROWS))
    if not found.idle:
        return found
    # a detector may find nothing in the first rows
    wide = find(first(WIDE_PROBE_ROWS))
    return wide if wide.idle < found.idle else found


def probe_batch(probe: Probe, store: Store, rows: int = PROBE_ROWS) -> Batch:
    """The first rows of the first of the probe's chunks that has any, the caller's own. DataError where none has.

    Read once for all models of a task: a bucket takes a tenth of a second to give them.
    """
    key = (probe.data, probe.chunk.id, rows, store.url)
    if key in _FIRST:
        return _copied(_FIRST[key])
    batch = _read_first(probe, store, rows)
    if _bytes(batch) <= KEPT_PROBE_BYTES:
        while len(_FIRST) >= KEPT_PROBES:
            del _FIRST[next(iter(_FIRST))]
        _FIRST[key] = _copied(batch)
    return batch


def _copied(batch: Batch) -> Batch:
    """A batch of its own memory: a model may change what it is given."""
    tensors = {name: value for name, value in vars(batch).items() if name not in ("call", "position_axes", "narrow")}
    return replace(batch, **pytree.tree_map_only(torch.Tensor, torch.clone, tensors))


def _bytes(batch: Batch) -> int:
    held = [one for one in pytree.tree_leaves([batch.inputs, dict(batch.kwargs)]) if isinstance(one, torch.Tensor)]
    return sum(one.numel() * one.element_size() for one in held)


def _read_first(probe: Probe, store: Store, rows: int) -> Batch:
    source = sources()[probe.spec.source](probe.data, probe.spec, store)
    for chunk in (probe.chunk, *probe.others):
        for batch in source.read(chunk, rows):
            return batch  # type: ignore[no-any-return]
    chunk = probe.chunk
    raise DataError(f"data {probe.data}: {chunk.url} has no rows of split {chunk.split!r} to begin with")
