"""Factorisation machines as sites: a unit per factor, z_f = Σ v_if x_i, a_f = ½(z_f² − Σ v_if² x_i²) over one-hot x.

Layer 1. Found where a sum of lookups over the fields is squared and the sum of their squares taken off (Rendle 2010,
lemma 3.1). The sign of a factor is arbitrary: fixed so that its largest |v| is positive.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.flow.affine import Affine
from pipeline.flow.gates import PASSING
from pipeline.flow.lookups import Lookup, entries_of, is_complete, key_of_lookup, table_of
from pipeline.flow.naming import owner_path
from pipeline.flow.patches import Contraction
from pipeline.flow.plan import CallKey, Scaling, SitePlan
from pipeline.flow.record import Graph, Node
from pipeline.flow.rows import Rows
from pipeline.flow.values import Call, Value
from pipeline.input_forms import InputSums
from pipeline.sites import InputSpace, Presentations, Site

GATE = "fm_square"
# beyond this many values of all fields together a list of them would take more memory than the pattern
NAMED_VALUES = 10_000


@dataclass(frozen=True, eq=False)
class Machine:
    """A recorded factorisation machine: the sum over its fields."""

    node: Node
    lookup: Lookup

    @property
    def key(self) -> CallKey:
        """How the sum is recognised: by the tables in it."""
        return ("sum", key_of_lookup(self.lookup))

    @property
    def names(self) -> frozenset[str]:
        """The tables."""
        return frozenset[str]().union(*[block.names for block in self.lookup])

    @property
    def path(self) -> str:
        """The module that owns all tables, else the owner of the largest."""
        owners = [owner_path(sorted(block.names)[0]) for block in self.lookup]
        shared = owners[0].split(".")
        for owner in owners[1:]:
            agree = zip(shared, owner.split("."), strict=False)
            shared = [left for left, right in itertools.takewhile(lambda pair: pair[0] == pair[1], agree)]
        return ".".join(shared) or owners[max(range(len(owners)), key=lambda i: len(self.lookup[i].table))]


def find_machines(graph: Graph, rows: int) -> list[Machine]:
    """Every factorisation machine of a recorded forward."""
    return [
        Machine(node, lookup)
        for node in graph.nodes
        if node.op.name == "sum" and (lookup := _lookup(node, rows)) is not None and _is_squared_less(graph, node)
    ]


def _lookup(node: Node, rows: int) -> Lookup | None:
    lookup: Lookup | None = node.inputs[0].lookup
    one_width = lookup is not None and len({block.table.shape[-1] for block in lookup}) == 1
    return lookup if lookup is not None and one_width and is_complete(lookup, rows) else None


def _is_squared_less(graph: Graph, node: Node) -> bool:
    """Whether (Σe)² meets Σe² in a difference."""
    vectors = node.inputs[0]
    squares = _squares(graph, node.outputs[0])
    sums = [
        reader.outputs[0]
        for square in _squares(graph, vectors)
        for reader in graph.consumers(square)
        if reader.op.name == "sum" and reader.args[1:] == node.args[1:]
    ]
    return any(
        reader.op.name == "sub" and len(reader.inputs) == 2 and reader.inputs[1] in sums
        for square in squares
        for reader in graph.consumers(square)
    )


def _squares(graph: Graph, value: Value) -> list[Value]:
    found = []
    for reader in graph.consumers(value):
        name = reader.op.name
        by_power = name == "square" or (name == "pow" and reader.args[1] == 2)
        if by_power or (name == "mul" and tuple(reader.inputs) == (value, value)):
            found.append(reader.outputs[0])
        elif name in PASSING:
            found += _squares(graph, reader.outputs[0])
    return found


def machine_of_product(graph: Graph, node: Node) -> Node | None:
    """Where z = x V is squared and x² V² taken off, the node of x² V²; None where it is not so."""
    affine = node.affine
    if affine is None or affine.bias is not None or not isinstance(affine.geometry, Contraction):
        return None
    squared_inputs = _squares(graph, affine.x_value)
    for square in _squares(graph, node.outputs[0]):
        for reader in graph.consumers(square):
            other = graph.producer(reader.inputs[-1]) if reader.op.name == "sub" and len(reader.inputs) == 2 else None
            if other is None or other.affine is None or other.affine.x_value not in squared_inputs:
                continue
            if other.affine.weight_value.names == affine.weight_value.names and _is_square(other.affine, affine):
                return other
    return None


def _is_square(other: Affine, affine: Affine) -> bool:
    same_shape = other.weight.shape == affine.weight.shape
    return same_shape and torch.allclose(other.weight, affine.weight.square())


def product_plan(node: Node, name: str, path: str, call: int) -> SitePlan:
    """The plan of a machine over dense inputs: of z = x V that is squared."""
    affine = node.affine
    assert affine is not None
    raw_UD = affine.geometry.matrix_UD(affine.weight.detach()).double().cpu().contiguous()
    sign_U = sign_of_factors(raw_UD)
    site = Site(
        name=name,
        path=path,
        call=call,
        index=-1,
        kind="fm",
        gate=GATE,
        pattern_UD=raw_UD * sign_U[:, None],
        bias_U=torch.zeros(len(sign_U), dtype=torch.float64),
        raw_UD=raw_UD,
        inputs=InputSpace("features", affine.geometry.pattern_shape(affine.weight)),
    )
    names = affine.weight_value.names
    return SitePlan(site, names, scaling=Scaling(sign_U, torch.zeros_like(sign_U)), squares=True)


def squares_of(site: Site, patches_LSGD: torch.Tensor) -> torch.Tensor:
    """Σ v_if² x_i² of explicit inputs, (L, S, U)."""
    return patches_LSGD[:, :, 0].square() @ site.pattern_UD.square().to(patches_LSGD).mT


def sign_of_factors(pattern_UD: torch.Tensor) -> torch.Tensor:
    """±1 per factor, such that its largest |v| is positive."""
    largest = pattern_UD.gather(1, pattern_UD.abs().argmax(1, keepdim=True))[:, 0]
    return torch.where(largest < 0, -1.0, 1.0).double()


def machine_plan(machine: Machine, name: str, call: int) -> SitePlan:
    """The plan of a machine's site."""
    table_DU = table_of(machine.lookup).detach().double().cpu()
    sign_U = sign_of_factors(table_DU.mT)
    site = Site(
        name=name,
        path=machine.path,
        call=call,
        index=-1,
        kind="fm",
        gate=GATE,
        pattern_UD=(table_DU * sign_U).mT.contiguous(),
        bias_U=torch.zeros(len(sign_U), dtype=torch.float64),
        raw_UD=table_DU.mT.contiguous(),
        inputs=_space(machine.lookup),
    )
    return SitePlan(site, machine.names, scaling=Scaling(sign_U, torch.zeros_like(sign_U)))


def _space(lookup: Lookup) -> InputSpace:
    blocks = tuple(owner_path(sorted(block.names)[0]) for block in lookup)
    total = sum(len(block.table) for block in lookup)
    if total > NAMED_VALUES:
        return InputSpace("values", (total,), upstream=blocks)
    units = tuple((index, row) for index, block in enumerate(lookup) for row in range(len(block.table)))
    return InputSpace("values", (total,), upstream=blocks, upstream_unit=units)


class Fields:
    """The lazy one-hot x of a machine's rows."""

    def __init__(self, lookup: Lookup, rows: int, dtype: torch.dtype) -> None:
        self._rows = rows
        self._inputs = sum(len(block.table) for block in lookup)
        self._dtype = dtype
        self._row, self._input, value = entries_of(lookup, rows)
        self._value = value.to(dtype)

    def patches(self, start: int, stop: int) -> torch.Tensor:
        """x of rows start … stop, (l, 1, 1, D)."""
        stop = min(stop, self._rows)
        here = (self._row >= start) & (self._row < stop)
        x = torch.zeros((max(stop - start, 0), self._inputs), dtype=self._dtype, device=self._value.device)
        x[self._row[here] - start, self._input[here]] = self._value[here]
        return x[:, None, None]

    def sums(self) -> InputSums:
        """The sums of every row, from its nonzero entries."""
        value = self._value.double()
        zeros = torch.zeros(self._rows, dtype=torch.float64, device=value.device)
        sum_ = zeros.index_add(0, self._row, value)
        count = zeros.index_add(0, self._row, torch.ones_like(value))
        mean = sum_ / self._inputs
        away = (value - mean[self._row]).square()
        centred = zeros.index_add(0, self._row, away) + (self._inputs - count) * mean.square()
        square = zeros.index_add(0, self._row, value.square())
        return InputSums(*[part[:, None, None] for part in (sum_, square, centred)])


def present_machine(plan: SitePlan, call: Call, out: torch.Tensor, **rows: Any) -> Presentations:
    """What a machine's rows are shown; `rows` are uid_N and label_N."""
    vectors = call.tensors[0]
    lookup = call.values[0].lookup
    count = len(rows["uid_N"])
    assert lookup is not None
    dims = call.bound().get("dim")
    axes: list[int] = [dims] if isinstance(dims, int) else list(dims or ())
    keep = bool(call.bound().get("keepdim", False))
    squares = vectors.square().sum(axes, keepdim=keep).reshape(count, 1, plan.site.units)
    z_LSU = out.reshape(count, 1, plan.site.units)
    fields = Fields(lookup, count, out.dtype)
    return Presentations(
        site=plan.site,
        z_LSU=z_LSU if plan.scaling is None else plan.scaling.apply(z_LSU),
        a_LSU=0.5 * (z_LSU.square() - squares),
        patches=fields.patches,
        input_sums=fields.sums,
        **rows,
    )


def carries_rows(rows: Rows | None) -> bool:
    """Whether the rows are the first axis, as they are: an entry each."""
    return rows is not None and (rows.axis == 0 or rows.axis is None) and rows.inner == 1 and rows.index is None
