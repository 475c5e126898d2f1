"""Measure one model on any batches: the notebook's entrance.

Layer 2. What a batch adds to is in `running.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pipeline.allocator import freed_memory_kept
from pipeline.batch import Batch
from pipeline.counted import few
from pipeline.devices import CPU, moved
from pipeline.errors import ModelError, nearest
from pipeline.flow.discover import Discovery, discover, refuse_no_choice
from pipeline.flow.holdings import held_tensors
from pipeline.flow.state import kept
from pipeline.flow.trace import forget, input_leaves
from pipeline.forms import numbered, of_classes
from pipeline.kernels import choose
from pipeline.registry import statistics as known_statistics
from pipeline.running import Running
from pipeline.selecting import refuse_patterns
from pipeline.site_table import site_table
from pipeline.statistics.base import Statistic
from pipeline.unit_tables import arrow_tables, controls_of

# batches to look for one in which every parameter acts
PROBES = 4
_log = logging.getLogger(__name__)


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    statistics: Iterable[Statistic] | None = None,
    twin: nn.Module | None = None,
    classes: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rows: Mapping[str, float] = MappingProxyType({}),
    name: str = "model",
    data: str = "data",
    split: str = "all",
) -> dict[str, pa.Table]:
    """Measure every neuron of any module on any iterable of batches; return the census's tables as Arrow.

    `batches` yields tensors, (x, y) pairs with int64 labels y, tuples or dicts of the forward's arguments (of a dict,
    "attention_mask" says which positions are no padding), or `Batch`es for everything else: a call of your own, masks,
    uids, lists of graphs. They are moved to where the model is; rows without uids are numbered in order. `twin` is the
    same model before training, as a control. With labels, `classes` is their number (0: no labels are used); a y of
    (N, S), or (N, H, W), has one for each position, −1 where unknown, and is counted where a site has as many.

    `include` and `exclude` are globs of a site's name, kind or gate ("kind:conv*": of its kind), and `rows` gives by
    such a pattern the fraction of the rows that its sites are measured on: {"kind:conv2d": 0.1}. The model comes back
    as it was, with whatever it keeps on itself. Raises ModelError where it cannot be read or no site is left, DataError
    where a label is none of the classes, ValueError for a wrong pattern, a twin of other sites, or what are no batches
    or statistics.

    >>> layer = nn.Linear(2, 3)
    >>> measure(layer, [torch.ones(4, 2)])["neurons"].num_rows
    3
    """
    chosen = None if statistics is None else list(statistics)
    _refuse_arguments(batches, chosen or (), classes, rows)
    refuse_patterns(include, exclude, rows)
    for role, one in (("model", model), ("twin", twin)):
        _refuse_no_module(role, one)
    chosen = list(known_statistics().values()) if chosen is None else chosen
    made = [one for one in model.parameters() if not is_lazy(one)]
    if any(one.needs_gradients for one in chosen) and any(one.is_inference() for one in made):
        _say_once("the model was made in inference mode: no gradient passes its weights, and importance may be empty")
    stream = _batches(batches, classes)
    device = _device_of(model)
    find = partial(discover, model, include=include, exclude=exclude, rows=rows)
    measured = [one for one in (model, twin) if one is not None]
    with _unmarked(*measured), kept(*measured), freed_memory_kept():
        found, probe, seen = _probed(find, stream, device)
        refuse_no_choice(found, include, exclude)
        _refuse_nothing(found)
        running = Running(found, chosen, classes, choose.name(device.type))
        twin_sites = None if twin is None else _sites_of_twin(twin, probe)
        if twin_sites is not None:
            _refuse_other_sites(found, twin_sites)
        for batch in chain(seen, stream):
            # of no row nothing is shown, and nothing tells whose it would be
            if not batch.rows:
                continue
            running.add(model, moved(batch, device))
            # those within objects are the caller's own
            forget(leaf for leaf, _ in input_leaves(batch))
        running.finish(model)
    for remark in [choose.remark(running.kernel, device.type), *running.remarks()]:
        _say_once(remark)
    keys = {"run": "", "model": name, "data": data, "split": split}
    controls = controls_of(running.discovery, twin_sites)
    tables = arrow_tables(running.discovery, running.states(), chosen, keys=keys, controls=controls)
    return {**tables, "sites": site_table(running.discovery, run="", model=name, data=data)}


def _sites_of_twin(twin: nn.Module, probe: Batch) -> Discovery:
    try:
        return discover(twin, moved(probe, _device_of(twin)))
    except ModelError as error:
        raise ModelError(f"the twin, shown the model's probe: {error}") from error


def _refuse_no_module(role: str, model: Any) -> None:
    """ValueError for what is no module with weights: a class, a function, a state_dict, one on the meta device."""
    if model is None and role == "twin":
        return
    if not isinstance(model, nn.Module):
        found = f"class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ValueError(f"{role} is a {found}: expected a torch.nn.Module")
    if any(held.is_meta for held in chain(model.parameters(), model.buffers())):
        raise ValueError(f"{role} is on the meta device: expected one with weights")


def _refuse_arguments(
    batches: Iterable[Any], statistics: Sequence[Statistic], classes: int, rows: Mapping[str, float]
) -> None:
    """ValueError where a batch stands for batches, a name for a statistic, or one of them is there twice."""
    if not isinstance(rows, Mapping):
        raise ValueError(f'rows = {rows!r}: expected a fraction for each pattern, {{"*": {rows!r}}}')
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
        raise ValueError(f"classes = {classes!r}: expected how many there are, or 0 for no labels")
    if isinstance(batches, torch.Tensor | np.ndarray | Mapping | Batch | str):
        raise ValueError(f"batches is one {type(batches).__name__}: expected several; [batch] is one batch")
    for number, one in enumerate(statistics):
        if not isinstance(one, Statistic):
            expected = f"a value of pipeline.registry.statistics(); {nearest(str(one), known_statistics())}"
            raise ValueError(f"statistics[{number}] is {one!r}: expected {expected}")
        if one.name in [other.name for other in statistics[:number]]:
            raise ValueError(f"statistics[{number}] is {one.name} a second time: measure each by itself")


def _refuse_other_sites(found: Discovery, twin: Discovery) -> None:
    """ValueError where a twin has none of the model's sites; said where it lacks some."""
    units, others = ({site.name: site.units for site in sites} for sites in (found.sites, twin.sites))
    if not units.items() & others.items():
        first, other = (", ".join(list(names)[:3]) or "none" for names in (units, others))
        raise ValueError(
            f"twin has no site of the model's, by name and units: the model's begin {first}, the twin's {other}; wrap "
            "both alike (torch.compile, DataParallel), or neither"
        )
    if lacking := [name for name in units if units[name] != others.get(name)]:
        _say_once(f"the twin has no site like {few(lacking, 'site')}: no control stands beside their units")


def _batches(batches: Iterable[Any], classes: int) -> Iterator[Batch]:
    stream = numbered(batches, by_position=classes > 0)
    if classes > 0:
        stream = of_classes(stream, classes)
    first = next(stream, None)
    if first is None:
        raise ValueError("measure() needs at least one batch")
    return chain([first], stream)


def _probed(
    find: Callable[[Batch], Discovery], stream: Iterator[Batch], device: torch.device
) -> tuple[Discovery, Batch, list[Batch]]:
    """The sites as the batch shows them in which most acts (a detector may find nothing at first), and those seen."""
    seen = [next(stream)]
    # of no row nothing can be seen
    while not seen[-1].rows and (batch := next(stream, None)) is not None:
        seen.append(batch)
    probe = seen[-1]
    found = find(moved(probe, device))
    first = len(seen)
    while found.idle and len(seen) < first - 1 + PROBES and (batch := next(stream, None)) is not None:
        seen.append(batch)
        other = find(moved(batch, device))
        if other.idle < found.idle:
            found, probe = other, batch
    return found, probe, seen


@contextmanager
def _unmarked(*models: nn.Module) -> Iterator[None]:
    """Leave nothing on the tensors that models hold."""
    try:
        yield
    finally:
        for model in models:
            forget(tensor for _, tensor in held_tensors(model).values())


def _refuse_nothing(found: Discovery) -> None:
    if found.sites:
        return
    reasons = "; ".join(f"{unread.name}: {unread.reason}" for unread in found.unread[:5])
    raise ModelError(f"the model has no site: {reasons or 'no parameter of it meets an input'}")


def _device_of(model: nn.Module) -> torch.device:
    return next((held.device for held in chain(model.parameters(), model.buffers())), torch.device(CPU))


@cache
def _say_once(remark: str | None) -> None:
    if remark is not None:
        _log.warning(remark)
