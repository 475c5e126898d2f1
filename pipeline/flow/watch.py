"""What must come behind a presentation: the folds and gates that it was computed by, and no gate where none was seen.

Layer 1. A watch holds no tensor, so that it may go along with values wherever they lead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.flow.gates import PASSING
from pipeline.flow.operators import (
    BATCH_NORMS,
    DATA_NORMS,
    JOINS,
    LINEAR_ELEMENTWISE,
    NONLINEAR,
    POOLS,
    Operator,
    words,
)
from pipeline.flow.path import Path
from pipeline.flow.plan import SitePlan
from pipeline.flow.record import Graph, Node
from pipeline.flow.told import Told, spelled
from pipeline.flow.values import Call, Origin, Value

_GATING = NONLINEAR | words("maximum minimum where")
_MAPS = LINEAR_ELEMENTWISE | BATCH_NORMS | DATA_NORMS


@dataclass(eq=False)
class Watch:
    """What is awaited behind one presentation.

    other     an operation that was told otherwise than one that is awaited
    new_gate  a nonlinearity that met it and none like it in the probe
    """

    plan: SitePlan
    due: list[Told] = field(default_factory=list)
    other: str | None = None
    new_gate: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing is awaited, and a nonlinearity none of its business."""
        return not self.due and self.plan.readers is None

    def meets(self, call: Call, *, first: bool) -> bool:
        """Take note of an operation on a watched value, its `first` argument or not; whether it goes on there."""
        if _passes(call.op, first=first):
            return True
        if self.due:
            return self._awaited(call)
        if self.is_over or sum(value.origin is Origin.DATA for value in call.values) != 1:
            return False
        if call.op.name in _GATING - (self.plan.readers or frozenset()):
            self.new_gate = call.op.name
        return call.op.name in _MAPS

    def _awaited(self, call: Call) -> bool:
        for told in self.due:
            if told.name == call.op.name:
                if told.is_told_by(call):
                    self.due.remove(told)
                    return True
                self.other = self.other or f"met {spelled(call)} in this batch, and {told} in the probe"
        return False


def _passes(op: Operator, *, first: bool) -> bool:
    return op.name in JOINS or (first and (op.is_view or op.name in PASSING or op.name in POOLS))


def due_of(end: Path, *, passed: Sequence[Node] = ()) -> tuple[Told, ...]:
    """What a path has folded, and its gate, but for the operations that a trail has passed."""
    nodes = (*end.behind, *(end.gate.nodes if end.gate is not None else ()))
    return tuple(Told.of(node) for node in nodes if node not in passed and not _passes(node.op, first=True))


def readers_of(graph: Graph, value: Value) -> frozenset[str]:
    """The nonlinearities that read a value, through whatever a watch goes through."""
    found, seen, waiting = set[str](), {value}, [value]
    while waiting:
        held = waiting.pop()
        for node in graph.consumers(held):
            first = node.args[:1] == (held,)
            if _passes(node.op, first=first) or (node.op.name in _MAPS and len(node.inputs) == 1):
                waiting += [out for out in node.outputs if out not in seen]
                seen.update(node.outputs)
            elif len(node.inputs) == 1 and node.op.name in _GATING:
                found.add(node.op.name)
    return frozenset(found)
