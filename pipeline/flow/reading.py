"""Reads the sites of a model off its recorded probe: selected, numbered, every parameter accounted for.

Layer 1.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import nn

from pipeline.errors import ModelError
from pipeline.flow.found import FoundCall, Trust, find_calls, key_of_node
from pipeline.flow.holdings import held_tensors
from pipeline.flow.operators import BATCH_NORMS, DATA_NORMS
from pipeline.flow.plan import CallKey, Discovery, SitePlan
from pipeline.flow.record import Node, Recorder, fixed_in
from pipeline.flow.rows import Rows
from pipeline.selecting import is_selected, row_fraction
from pipeline.sites import Site, Unread

# beyond this many calls of one weight in a forward, its calls are one site
MOST_CALLS = 8
CONSTANT = "multiplies constants and other parameters only: no input of the model meets it"
COMPLEX = "its numbers are complex, of which none is above or below 0: nothing fires, and nothing ranks"
NO_ROWS = "which rows of the batch its presentations belong to cannot be followed"


class Choice(NamedTuple):
    """Which sites are wanted, see `selecting`, and by pattern on which fraction of the rows."""

    include: Sequence[str]
    exclude: Sequence[str]
    rows: Mapping[str, float]


@dataclass(eq=False)
class Reading:
    """One reading of a recorded probe; `trust` holds the calls, by place, that a check has refuted."""

    model: nn.Module
    recorder: Recorder
    choice: Choice
    trust: Mapping[str, Trust]
    sites: list[Site] = field(default_factory=list)
    _slots: dict[Node, list[SitePlan]] = field(default_factory=dict)
    _places: dict[str, str] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _refused: dict[str, str] = field(default_factory=dict)

    def place_of(self, site: str) -> str:
        """The call that a site comes from."""
        return self._places[site]

    def discovery(self) -> Discovery:
        """All sites, and every parameter that is in none."""
        found = find_calls(self.model, self.recorder, self.trust)
        calls = self._open_slots(found)
        groups: dict[CallKey, list[FoundCall]] = {}
        for call in found:
            groups.setdefault(call.key, []).append(call)
        done: set[Node] = set()
        for call in found:
            if call.node not in done:
                together = _together(groups[call.key])
                same = groups[call.key] if together else [call]
                done.update(one.node for one in same)
                self._read(same, collected=together and not _disjoint(same))
        gains = [plan.gain for each in calls.values() for call in each for plan in call]
        return Discovery(
            tuple(self.sites),
            self._unread(),
            calls,
            frozenset(
                key
                for key, same in groups.items()
                if _are_uneven([call.fate for call in same]) or len(same) < len(calls[key])
            ),
            frozenset[int]().union(*gains),
            tuple(self.recorder.leaf_axes),
            writes_inputs=self.recorder.writes_inputs,
        )

    def _open_slots(self, found: Sequence[FoundCall]) -> dict[CallKey, list[list[SitePlan]]]:
        """A place for the plans of every call that will be recognised, in order, whether it is a site or not."""
        keys = {call.node: call.key for call in found}
        calls: dict[CallKey, list[list[SitePlan]]] = {}
        for node in self.recorder.graph.nodes:
            key = keys.get(node) or key_of_node(node)
            if key is not None:
                calls.setdefault(key, []).append(self._slots.setdefault(node, []))
        return calls

    def _read(self, same: Sequence[FoundCall], *, collected: bool) -> None:
        first = same[0]
        trust = self.trust.get(first.place, Trust())
        is_complex = first.node.affine is not None and first.node.affine.weight.is_complex()
        plans = first.make(trust) if first.rows is not None and not is_complex else []
        if not plans:
            reason = COMPLEX if is_complex else trust.reason or NO_ROWS
            self._refused |= dict.fromkeys(first.weights, reason)
        nodes = dict.fromkeys(node for call in same for node in (call.node, *call.also))
        note = f"its {len(same)} calls in the probe's forward are one site" if len(same) > 1 else None
        for plan in plans:
            self._taken |= plan.names
            labels = {"name": plan.site.name, "kind": plan.site.kind, "gate": plan.site.gate}
            site = replace(
                plan.site,
                index=len(self.sites),
                row_fraction=row_fraction(labels, self.choice.rows),
                alias_of=first.tied,
                note="; ".join(filter(None, [plan.site.note, note])) or None,
            )
            if is_selected(labels, self.choice.include, self.choice.exclude):
                if site.name in self._places:
                    raise ModelError(
                        f"two sites are called {site.name}: that is how parts (.0) and later calls (#1) of a weight "
                        "are named, and a module as well; rename the module, or exclude both sites"
                    )
                self._places[site.name] = first.place
                self.sites.append(site)
                chosen = replace(plan, site=site, collected=collected)
                for node in nodes:
                    self._slots[node].append(chosen)

    def _unread(self) -> tuple[Unread, ...]:
        acting: dict[str, Node] = {}
        for node in self.recorder.graph.nodes:
            for fixed in fixed_in(node):
                for name in fixed.value.names:
                    # a table says most where it is looked up
                    if name not in acting or node.op.name in ("embedding", "embedding_bag"):
                        acting[name] = node
        held = held_tensors(self.model)
        unread = []
        for parameter in self.model.parameters():
            name = held[id(parameter)][0]
            if name not in self._taken:
                reason = self._refused.get(name)
                if reason is None:
                    reason = CONSTANT if name in self.recorder.constant_maps else _reason(acting.get(name))
                acts = reason != _reason(None)
                unread.append(Unread(name, reason, parameter.numel(), acts))
        return (*unread, *self._packed())

    def _packed(self) -> list[Unread]:
        """The layers of which no weight is a parameter, for it is packed with others into integers."""
        reason = "its weight is quantised and packed, by {}: only weights that are numbers are read"
        layers = {node.module: node.op.name for node in self.recorder.graph.nodes if _is_packed(node.op.name)}
        return [Unread(module or name, reason.format(name), 0) for module, name in layers.items()]


def _is_packed(name: str) -> bool:
    return name.startswith("quantized::") and any(layer in name for layer in ("linear", "conv", "lstm", "gru"))


def _together(calls: Sequence[FoundCall]) -> bool:
    """Whether the calls of one weight are one site: steps of a recurrence, of different rows, or very many."""
    if len(calls) < 2 or len({call.fate for call in calls}) > 1:
        return False
    return calls[0].loops or len(calls) > MOST_CALLS or _disjoint(calls)


def _disjoint(calls: Sequence[FoundCall]) -> bool:
    """Whether no two calls show the same row."""
    seen: set[int] = set()
    for call in calls:
        rows: Rows | None = call.rows
        if rows is None or rows.index is None or rows.rows == 1:
            return False
        here = set(rows.index.tolist())
        if here & seen:
            return False
        seen |= here
    return True


_REASONS = {
    "embedding": "looked up, not multiplied: its rows are read in the patterns of what it feeds",
    "embedding_bag": "looked up and summed: its rows are read in the patterns of what it feeds",
    **dict.fromkeys(["add", "cat"], "added to or joined with data as it is: no pattern meets an input there"),
    "mul": "scales data as it is: a gain that no site could take in",
    **dict.fromkeys(
        [*BATCH_NORMS, *DATA_NORMS],
        "gain or bias of a norm that no site could take in: what it feeds sees the norm's output",
    ),
}


def _reason(node: Node | None) -> str:
    if node is None:
        return "never acts in the forward of the probe batch"
    return _REASONS.get(node.op.name, f"acts through {node.op.name}, which is no affine map of data to units")


def _are_uneven(fates: Sequence[Hashable]) -> bool:
    """Whether calls of other numbers cannot be told apart by theirs: the first may be another than all behind it.

    The first step of a loop from zeros, say; of two calls nothing says which is the rule.
    """
    return len(set(fates)) > 1 and (len(fates) < 3 or len(set(fates[1:])) > 1)
