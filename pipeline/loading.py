"""Load a model's checkpoint and find its sites, once per process.

Layer 3. Every task that needs a model goes through here: the same probe, so the same sites, everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.errors import DataError, ModelError
from pipeline.flow.discover import Discovery, discover
from pipeline.job import DataSpec, SiteSelection
from pipeline.models.base import Checkpoint, checkpoint_key, decode_checkpoint
from pipeline.registry import sources
from pipeline.resolve import Model
from pipeline.sources.base import Chunk
from pipeline.store import Store

# rows that a model is shown to find its sites and to check its patterns
PROBE_ROWS = 16
# models that a process keeps; the sizes of groups are the plan's business
KEPT_MODELS = 16


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to be measured."""

    module: nn.Module
    discovery: Discovery
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Probe:
    """Where the rows come from that a model is shown to find its sites: the first ones of a chunk."""

    data: str
    spec: DataSpec
    chunk: Chunk


def load(model: Model, probe: Probe, sites: SiteSelection, store: Store) -> Loaded:
    """The model with its weights, in eval mode, and its sites. ModelError where it cannot be."""
    return _loaded(model.id, _Call(model, probe, sites, store))


class _Call:
    """Arguments of `load` that the model id stands for in the cache."""

    def __init__(self, model: Model, probe: Probe, sites: SiteSelection, store: Store) -> None:
        self.arguments = (model, probe, sites, store)
        self._key = (model.id, model.name, probe.chunk.id, store.url, sites)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Call) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@lru_cache(maxsize=KEPT_MODELS)
def _loaded(_: str, call: _Call) -> Loaded:
    model, probe, sites, store = call.arguments
    checkpoint = decode_checkpoint(store.get(checkpoint_key(model.id)))
    with torch.random.fork_rng(devices=[]):
        module = model.recipe.build().to(getattr(torch, model.recipe.dtype))
    try:
        module.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        raise ModelError(f"model {model.name}: its checkpoint does not fit: {error}") from error
    found = discover(module, probe_batch(probe, store), include=sites.include, exclude=sites.exclude)
    return Loaded(module.eval(), found, checkpoint)


def probe_batch(probe: Probe, store: Store) -> Batch:
    """The first rows of the probe's chunk."""
    source = sources()[probe.spec.source](probe.data, probe.spec, store)
    batch = next(iter(source.read(probe.chunk, PROBE_ROWS)), None)
    if batch is None:
        chunk = probe.chunk
        raise DataError(f"data {probe.data}: {chunk.url} has no rows of split {chunk.split!r} to begin with")
    return batch  # type: ignore[no-any-return]
