"""The running states of one model: what its sites are shown, added up batch by batch.

Layer 2. Everything for a batch happens in one pass while it is hot: inside the forward, each site's primitives are
computed once for all statistics and added to the running state; nothing else is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.cells import misfit
from pipeline.contracts import asking_of, asking_primitives_of, primitives_of, unequal, unfit_state
from pipeline.errors import JobError, ModelError
from pipeline.flow.apart import Held, cut
from pipeline.flow.discover import Discovery
from pipeline.flow.forwards import Forwards
from pipeline.flow.gradients import classifies, observe_gradients
from pipeline.flow.state import Versions
from pipeline.graphs import Graphs, Shown
from pipeline.kernels import choose
from pipeline.kernels.accumulate import Accumulator
from pipeline.kernels.base import Primitive, State
from pipeline.samples import in_fraction, in_sample, sampled
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import Statistic, is_own, joined, shapes_of

# a site by its name, the sample of rows, and whether it is shown with gradients
_Sample = tuple[str, int, bool]
# statistic name → site name → state
States = dict[str, dict[str, State]]


@dataclass(frozen=True, eq=False)
class _Asking:
    """The statistics of one site and sample: what grows the primitives of those together, and who observes itself."""

    shift: int
    together: Sequence[Statistic]
    sums: Accumulator | None
    alone: Sequence[Statistic]


@dataclass
class Running:
    """The running states of one model: per site and sample, of every primitive that its statistics need.

    Rows of a sample are cut out of their batches, where the model lets them (see `flow/apart.py`), and held back until
    there are as many as a batch has: `finish` shows the model the last of them.

    kernel    by which they are grown, see `kernels.choose`
    forwards  of the model, from the rows before: it need not be found out again how it computes
    """

    discovery: Discovery
    statistics: Sequence[Statistic]
    classes: int = 0
    kernel: str = field(default_factory=choose.name)
    forwards: Forwards | None = None

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
        self._forwards = self.forwards or Forwards(self.discovery)
        self._sampled = [one for one in self.statistics if one.sample_shift > 0 and self.discovery.apart]
        self._others = [one for one in self.statistics if one not in self._sampled]
        self._most_rows = 0
        self._before: Versions | None = None
        self._graphs = Graphs()
        self._no_loss: str | None = None

    def add(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on a batch, add what its sites are shown, return what the model returns."""
        self._before = self._before or Versions(model, self.discovery.weights)
        part = self._in_any_sample(batch)
        out = self._show(model, batch, self._others if part is not None else self.statistics)
        self._most_rows = max(self._most_rows, batch.rows)
        if part is not None and part.rows:
            for due in self._held.add(part, most=self._most_rows):
                self._show(model, due, self._sampled)
        return out

    def finish(self, model: nn.Module) -> None:
        """Add the rows that are held back still, behind the last batch; ModelError if the weights are others by now."""
        for due in self._held.rest():
            self._show(model, due, self._sampled)
        changed = Versions(model, self.discovery.weights).changed(self._before) if self._before else None
        if changed:
            raise ModelError(
                f"{changed} was changed while the model was measured: what is told of its patterns would be of other "
                "weights than some of the batches met; measure before or after"
            )

    def _in_any_sample(self, batch: Batch) -> Batch | None:
        """The rows that some statistic of a sample takes; None where they are not cut out of the batch."""
        if not self._sampled:
            return None
        keep_N = in_sample(batch.uid_N, min(one.sample_shift for one in self._sampled))
        return cut(batch, keep_N, self.discovery.leaf_axes)

    def _show(self, model: nn.Module, batch: Batch, statistics: Sequence[Statistic]) -> Any:
        """Run the model on a batch and let the statistics observe it; return what the model returns."""
        # the lists of statistics are as long here as this is: none takes the id of another
        return self._graphs.show(model, batch, id(statistics), partial(self._shown, model, statistics))

    def _shown(self, model: nn.Module, statistics: Sequence[Statistic], batch: Batch) -> Shown:
        self._memo: dict[Any, Any] = {}
        # which rows have a gradient, and so what is done, is for their uids to say
        self._added: Counter[Accumulator] | None = None if any(one.needs_gradients for one in statistics) else Counter()
        observe = partial(self._observe, statistics)
        with choose.in_force(self.kernel):
            out = self._forwards.run(model, batch, observe)
            if self._has_loss(batch, statistics):
                if classifies(out, batch, self.classes):
                    observe_gradients(model, self.discovery, batch, observe, classes=self.classes)
                elif out is not None:
                    self._no_loss = self._no_loss or _without_loss(out, self.classes)
        return Shown(out, self._added, self._forwards.followed)

    def _has_loss(self, batch: Batch, statistics: Sequence[Statistic]) -> bool:
        """Whether a statistic needs the gradients of a row of the batch."""
        shifts = {one.sample_shift for one in statistics if one.needs_gradients}
        labelled = self.classes > 0 and batch.label_N is not None
        return labelled and any(bool(in_sample(batch.uid_N, shift).any()) for shift in shifts)

    def remarks(self) -> list[str]:
        """What a person should know of how it was done, each once."""
        grown = [remark for sums in self._sums.values() for remark in sums.remarks()]
        return list(dict.fromkeys([*grown, *self._graphs.remarks, *filter(None, [self._no_loss])]))

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
        states = grown.get((site.name, statistic.sample_shift, statistic.needs_gradients))
        own = self._own.get((site.name, statistic.name))
        if own is not None:
            _refuse_unfit(statistic, site, own)
            return own
        if states is None or _observes_itself(statistic):
            with asking_of(statistic, "empty()", site):
                return statistic.empty(site)
        needed = primitives_of(statistic, site)
        for name, need in needed.items():
            if need not in states:
                raise unequal(statistic, site, name, need)
        state = joined({name: states[need] for name, need in needed.items()})
        if is_own(statistic, needed.values()):
            _refuse_unfit(statistic, site, state)
        return state

    def _observe(self, statistics: Sequence[Statistic], presentations: Presentations) -> None:
        site = presentations.site
        presentations = presentations.among(classes=self.classes, memo=self._memo)
        if site.row_fraction < 1:
            self._added = None
            presentations = presentations.select_rows(in_fraction(presentations.uid_N, site.row_fraction))
        if not presentations.z_LSU.numel():
            # as an expert that no row of the batch went to: there is nothing to reduce
            return
        key = (site.name, presentations.gradient_LSU is not None, id(statistics))
        asking = self._asking.get(key)
        if asking is None:
            asking = self._asking[key] = self._asked(statistics, presentations)
        for one in asking:
            sample = sampled(presentations, one.shift)
            if one.sums is not None:
                with asking_primitives_of(one.together, site):
                    one.sums.add(sample)
            if one.shift or one.alone:
                self._added = None
            elif one.sums is not None and self._added is not None:
                self._added[one.sums] += sample.entries * sample.positions
            for statistic in one.alone:
                before = self._own.get((site.name, statistic.name))
                with asking_of(statistic, "observe()", site):
                    seen = statistic.observe(sample)
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
            asking.append(_Asking(shift, together, self._sums_of(site, together) if together else None, alone))
        return asking

    def _sums_of(self, site: Site, statistics: Sequence[Statistic]) -> Accumulator:
        """What grows the primitives of statistics of one sample, the same whenever they are asked."""
        first = statistics[0]
        key = (site.name, first.sample_shift, first.needs_gradients)
        if key not in self._sums:
            needed = list(dict.fromkeys(need for one in statistics for need in primitives_of(one, site).values()))
            with asking_primitives_of(statistics, site):
                self._sums[key] = choose.accumulator(self.kernel, site, needed)
        return self._sums[key]


def _refuse_unfit(statistic: Statistic, site: Site, state: State) -> None:
    """ContractError unless a state is one that may be stored: it would be taken for one that is spoilt."""
    with asking_of(statistic, "empty() or forms()", site):
        wrong = misfit(state, shapes_of(statistic, site)) and misfit(state, *statistic.forms(site))
    if wrong:
        raise unfit_state(statistic, site, wrong)


def _observes_itself(statistic: Statistic) -> bool:
    return type(statistic).observe is not Statistic.observe


def _without_loss(out: Any, classes: int) -> str:
    found = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
    return (
        f"importance is empty: the model returned {found} for a batch, expected one score of each of the {classes} "
        "classes for each row (N × classes)"
    )


def _on_cpu(state: State) -> State:
    return {name: value.detach().cpu() for name, value in state.items()}
