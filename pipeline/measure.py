"""Measure one model on batches: the notebook's entrance, and what a task calls.

Layer 2. Everything for a batch happens in one pass while it is hot: inside the forward, each site's primitives are
computed once for all statistics and added to the running state; nothing else is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from pipeline.allocator import freed_memory_kept
from pipeline.batch import Batch
from pipeline.devices import CPU, moved
from pipeline.errors import JobError, ModelError
from pipeline.flow.apart import Held, cut
from pipeline.flow.discover import Discovery, discover, refuse_no_choice
from pipeline.flow.forwards import Forwards
from pipeline.flow.gradients import observe_gradients
from pipeline.forms import numbered, of_classes
from pipeline.hashing import row_hash
from pipeline.kernels import choose
from pipeline.kernels.accumulate import Accumulator
from pipeline.kernels.base import Primitive, State
from pipeline.registry import statistics as known_statistics
from pipeline.selecting import refuse_patterns
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import Controls, Statistic, joined
from pipeline.tables import arrow_table, table_columns

SAMPLE_SEED = 0x5EED
# batches to look for one in which every parameter acts
PROBES = 4
_log = logging.getLogger(__name__)
# a site by its name, the sample of rows, and whether it is shown with gradients
_Sample = tuple[str, int, bool]
# statistic name → site name → state
States = dict[str, dict[str, State]]


@dataclass(frozen=True, eq=False)
class _Asking:
    """The statistics of one site and sample: what grows the primitives of all, and those that observe themselves."""

    shift: int
    sums: Accumulator | None
    alone: Sequence[Statistic]


@dataclass
class Running:
    """The running states of one model: per site and sample, of every primitive that its statistics need.

    Rows of a sample are cut out of their batches, where the model lets them (see `flow/apart.py`), and held back until
    there are as many as a batch has: `finish` shows the model the last of them.

    kernel  by which they are grown, see `kernels.choose`
    """

    discovery: Discovery
    statistics: Sequence[Statistic]
    classes: int = 0
    kernel: str = field(default_factory=choose.name)

    def __post_init__(self) -> None:
        for statistic in self.statistics:
            for name, expected in statistic.unfit(self.classes).items():
                value = statistic.parameters[name]
                raise JobError(f"statistics.{statistic.name}.{name} = {value!r}: expected {expected}")
        self._sums: dict[_Sample, Accumulator] = {}
        self._own: dict[tuple[str, str], State] = {}
        # by the site's name, whether there are gradients, and the statistics
        self._asking: dict[tuple[str, bool, int], list[_Asking]] = {}
        self._held = Held(self.discovery.leaf_axes)
        self._forwards = Forwards(self.discovery)
        self._sampled = [one for one in self.statistics if one.sample_shift > 0 and self.discovery.apart]
        self._others = [one for one in self.statistics if one not in self._sampled]
        self._most_rows = 0

    def add(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on a batch, add what its sites are shown, return what the model returns."""
        part = self._in_any_sample(batch)
        out = self._show(model, batch, self._others if part is not None else self.statistics)
        self._most_rows = max(self._most_rows, batch.rows)
        if part is not None and part.rows:
            for due in self._held.add(part, most=self._most_rows):
                self._show(model, due, self._sampled)
        return out

    def finish(self, model: nn.Module) -> None:
        """Add the rows that are held back still, behind the last batch."""
        for due in self._held.rest():
            self._show(model, due, self._sampled)

    def _in_any_sample(self, batch: Batch) -> Batch | None:
        """The rows that some statistic of a sample takes; None where they are not cut out of the batch."""
        if not self._sampled:
            return None
        keep_N = _in_sample(batch.uid_N, min(one.sample_shift for one in self._sampled))
        return cut(batch, keep_N, self.discovery.leaf_axes)

    def _show(self, model: nn.Module, batch: Batch, statistics: Sequence[Statistic]) -> Any:
        """Run the model on a batch and let the statistics observe it; return what the model returns."""
        self._memo: dict[Any, Any] = {}
        observe = partial(self._observe, statistics)
        with choose.in_force(self.kernel):
            out = self._forwards.run(model, batch, observe)
            if self._has_loss(batch, statistics):
                observe_gradients(model, self.discovery, batch, observe)
        return out

    def _has_loss(self, batch: Batch, statistics: Sequence[Statistic]) -> bool:
        """Whether a statistic needs the gradients of a row of the batch."""
        shifts = {one.sample_shift for one in statistics if one.needs_gradients}
        labelled = self.classes > 0 and batch.label_N is not None
        return labelled and any(bool(_in_sample(batch.uid_N, shift).any()) for shift in shifts)

    def remarks(self) -> list[str]:
        """What a person should know of how it was done, each once."""
        return list(dict.fromkeys(remark for sums in self._sums.values() for remark in sums.remarks()))

    def states(self) -> States:
        """The state of every statistic at every site where it applies, on the CPU; to be asked for once finished."""
        if self._held.rows:
            raise RuntimeError(f"{self._held.rows} rows are held back: finish() first")
        grown = {key: sums.states() for key, sums in self._sums.items()}
        return {
            statistic.name: {
                site.name: _on_cpu(self._state(statistic, site, grown))
                for site in self.discovery.sites
                if statistic.applies(site)
            }
            for statistic in self.statistics
        }

    def _state(self, statistic: Statistic, site: Site, grown: Mapping[_Sample, Mapping[Primitive, State]]) -> State:
        if _observes_itself(statistic):
            return self._own.get((site.name, statistic.name)) or statistic.empty(site)
        states = grown.get((site.name, statistic.sample_shift, statistic.needs_gradients), {})
        needed = statistic.primitives(site)
        return joined({name: states[need] if need in states else need.empty(site) for name, need in needed.items()})

    def _observe(self, statistics: Sequence[Statistic], presentations: Presentations) -> None:
        site = presentations.site
        presentations = presentations.among(classes=self.classes, memo=self._memo)
        if site.row_fraction < 1:
            presentations = presentations.select_rows(_among(presentations.uid_N, site.row_fraction))
        key = (site.name, presentations.gradient_LSU is not None, id(statistics))
        asking = self._asking.get(key)
        if asking is None:
            # the lists of statistics are as long here as this is: none takes the id of another
            asking = self._asking[key] = self._asked(statistics, presentations)
        for one in asking:
            sample = _sampled(presentations, one.shift)
            if one.sums is not None:
                one.sums.add(sample)
            for statistic in one.alone:
                seen = statistic.observe(sample)
                before = self._own.get((site.name, statistic.name))
                self._own[site.name, statistic.name] = statistic.merge(site, before, seen) if before else seen

    def _asked(self, statistics: Sequence[Statistic], presentations: Presentations) -> list[_Asking]:
        """What statistics ask of a site, the largest sample first."""
        site, has_gradients = presentations.site, presentations.gradient_LSU is not None
        applying = [one for one in statistics if one.applies(site) and one.needs_gradients == has_gradients]
        asking = []
        for shift in sorted({statistic.sample_shift for statistic in applying}):
            chosen = [statistic for statistic in applying if statistic.sample_shift == shift]
            together = [one for one in chosen if not _observes_itself(one)]
            alone = [one for one in chosen if _observes_itself(one)]
            asking.append(_Asking(shift, self._sums_of(site, together) if together else None, alone))
        return asking

    def _sums_of(self, site: Site, statistics: Sequence[Statistic]) -> Accumulator:
        """What grows the primitives of statistics of one sample, the same whenever they are asked."""
        first = statistics[0]
        key = (site.name, first.sample_shift, first.needs_gradients)
        if key not in self._sums:
            needed = list(dict.fromkeys(need for one in statistics for need in one.primitives(site).values()))
            self._sums[key] = choose.accumulator(self.kernel, site, needed)
        return self._sums[key]


def _observes_itself(statistic: Statistic) -> bool:
    return type(statistic).observe is not Statistic.observe


def _sampled(presentations: Presentations, shift: int) -> Presentations:
    if shift == 0:
        return presentations
    keep_N, is_all = presentations.remembered(("sample", shift), lambda: _sample(presentations.uid_N, shift))
    return presentations if is_all else presentations.select_rows(keep_N)


def _sample(uid_N: torch.Tensor, shift: int) -> tuple[torch.Tensor, bool]:
    keep_N = _in_sample(uid_N, shift)
    return keep_N, bool(keep_N.all())


def _among(uid_N: torch.Tensor, fraction: float) -> torch.Tensor:
    # the same hash as the samples of statistics: of two fractions the smaller one's rows are among the greater one's
    return row_hash(uid_N, seed=SAMPLE_SEED) < int(fraction * 2**63)


def _in_sample(uid_N: torch.Tensor, shift: int) -> torch.Tensor:
    return row_hash(uid_N, seed=SAMPLE_SEED) >> (63 - shift) == 0


def _on_cpu(state: State) -> State:
    return {name: value.detach().cpu() for name, value in state.items()}


def controls_of(discovery: Discovery, twin: Discovery | None) -> dict[str, Controls]:
    """What stands beside each site's numbers: the same site of the untrained twin, where it has the same shape."""
    twins = {site.name: site for site in twin.sites} if twin else {}
    return {site.name: Controls(twin=_comparable(site, twins.get(site.name))) for site in discovery.sites}


def _comparable(site: Site, other: Site | None) -> Site | None:
    return other if other is not None and site.pattern_UD.shape == other.pattern_UD.shape else None


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    statistics: Sequence[Statistic] | None = None,
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
    in the mode it had. Raises ModelError where it cannot be read or no site is left, DataError where a label is none of
    the classes, ValueError for a wrong pattern.

    >>> layer = nn.Linear(2, 3)
    >>> measure(layer, [torch.ones(4, 2)])["neurons"].num_rows
    3
    """
    refuse_patterns(include, exclude, rows)
    chosen = list(known_statistics().values()) if statistics is None else list(statistics)
    stream = numbered(batches, by_position=classes > 0)
    if classes > 0:
        stream = of_classes(stream, classes)
    first = next(stream, None)
    if first is None:
        raise ValueError("measure() needs at least one batch")
    device = _device_of(model)
    find = partial(discover, model, include=include, exclude=exclude, rows=rows)
    with _mode_kept(model, twin), freed_memory_kept():
        found, probe, seen = _probed(find, first, stream, device)
        refuse_no_choice(found, include, exclude)
        _refuse_nothing(found)
        running = Running(found, chosen, classes, choose.name(device.type))
        twin_sites = None if twin is None else discover(twin, moved(probe, _device_of(twin)))
        for batch in chain(seen, stream):
            running.add(model, moved(batch, device))
        running.finish(model)
    for remark in [choose.remark(running.kernel, device.type), *running.remarks()]:
        _say_once(remark)
    keys = {"run": "", "model": name, "data": data, "split": split}
    controls = controls_of(running.discovery, twin_sites)
    tables = arrow_tables(running.discovery, running.states(), chosen, keys=keys, controls=controls)
    return {**tables, "sites": site_table(running.discovery, run="", model=name, data=data)}


def _probed(
    find: Callable[[Batch], Discovery], first: Batch, stream: Iterator[Batch], device: torch.device
) -> tuple[Discovery, Batch, list[Batch]]:
    """The sites as the batch shows them in which most acts (a detector may find nothing at first), and those seen."""
    probe, seen = first, [first]
    found = find(moved(first, device))
    while found.idle and len(seen) < PROBES and (batch := next(stream, None)) is not None:
        seen.append(batch)
        other = find(moved(batch, device))
        if other.idle < found.idle:
            found, probe = other, batch
    return found, probe, seen


@contextmanager
def _mode_kept(*models: nn.Module | None) -> Iterator[None]:
    training = [module for model in models if model is not None for module in model.modules() if module.training]
    try:
        yield
    finally:
        for module in training:
            module.training = True


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


def arrow_tables(
    discovery: Discovery,
    states: States,
    statistics: Sequence[Statistic],
    *,
    keys: Mapping[str, str],
    controls: Mapping[str, Controls],
    errors: Mapping[str, Mapping[str, torch.Tensor]] = MappingProxyType({}),
) -> dict[str, pa.Table]:
    """The tables of units of one model on one split, sorted by site, the columns of `keys` in front.

    `errors` holds further columns of `neurons` by site: the standard errors.
    """
    columns = table_columns([replace(column, version=one.version) for one in statistics for column in one.COLUMNS])
    parts: dict[str, list[pa.Table]] = {}
    for site in sorted(discovery.sites, key=lambda one: one.name):
        given = {one.name: states[one.name][site.name] for one in statistics if one.applies(site)}
        for table, values in _site_rows(site, given, statistics, controls[site.name]):
            more = errors.get(site.name, {}) if table == "neurons" else {}
            rows = {**keys, "site": site.name, **values, **more}
            parts.setdefault(table, []).append(arrow_table(table, columns[table], rows))
    return {table: pa.concat_tables(of_sites) for table, of_sites in sorted(parts.items())}


def _site_rows(
    site: Site, states: Mapping[str, State], statistics: Sequence[Statistic], controls: Controls
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tables with column → values of one site: the units' one row each, then what each statistic adds elsewhere."""
    neurons: dict[str, Any] = {"unit": torch.arange(site.units)}
    others: list[tuple[str, dict[str, Any]]] = []
    for statistic in statistics:
        if statistic.name in states:
            for table, columns in statistic.columns(site, states[statistic.name], controls).items():
                if table == "neurons":
                    neurons.update(columns)
                else:
                    others.append((table, dict(columns)))
    yield "neurons", neurons
    yield from others


def site_table(discovery: Discovery, *, run: str, model: str, data: str) -> pa.Table:
    """The table `sites` of one model: every site, and every weight that is none, with the reason."""
    keys = {"run": run, "model": model, "data": data}
    rows = [
        {
            "site": site.name,
            "position": site.index,
            "path": site.path,
            "call": site.call,
            "kind": site.kind,
            "gate": site.gate,
            "norm": site.norm,
            "folded": ", ".join(site.folded) or None,
            "alias_of": site.alias_of,
            "units": site.units,
            "fan_in": site.fan_in,
            "groups": site.groups,
            "input_kind": site.inputs.kind,
            "input_shape": list(site.inputs.shape),
            "upstream": [f"{site.inputs.upstream[at]}/{unit}" for at, unit in site.inputs.upstream_unit] or None,
            "receptive_field": [number for axis in site.inputs.field for number in axis] or None,
            "row_fraction": site.row_fraction,
            "input_names": list(site.inputs.names) or None,
            "interpreted": True,
            "reason": site.note,
            "parameters": site.raw_UD.numel(),
            "error": site.error,
        }
        for site in discovery.sites
    ]
    rows += [
        {
            "site": unread.name,
            "interpreted": False,
            "reason": unread.reason,
            "parameters": unread.parameters,
        }
        for unread in discovery.unread
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = {name: [row.get(name) for row in rows] for name in names}
    return arrow_table("sites", table_columns([])["sites"], {**keys, **values})
