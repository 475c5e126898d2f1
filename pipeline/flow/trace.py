"""Runs a forward and knows of every tensor in it: made of parameters, of data, or of neither; and which axis has rows.

Layer 1. A tensor that enters from outside and belongs to no module is data, however the caller wrapped it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.batch import Batch
from pipeline.errors import CensusError, ModelError, is_machines_fault
from pipeline.flow.graphs import Graphs
from pipeline.flow.grouped import GROUPED, group_by_group, is_grouped
from pipeline.flow.holdings import held_tensors
from pipeline.flow.lookup_rules import LOOKING, lookup_of
from pipeline.flow.naming import owner_path
from pipeline.flow.operators import COMPOSITE, FRESH, LAYERS, LIKES, REPEATS, operator
from pipeline.flow.positions import follow_places, places_of_leaf, positions_of
from pipeline.flow.row_joins import SCATTERS, Source
from pipeline.flow.row_rules import follow
from pipeline.flow.rows import Rows, of_leaf, whole
from pipeline.flow.values import Call, Origin, Value, argument_tensors, bits_of, tensors_in

_ATTRIBUTE = "_census_value"
_DRAWS = count()
_PLAIN = (torch.Tensor, nn.Parameter)


def has_own_functions(tensor: torch.Tensor) -> bool:
    """Whether a tensor's class does torch's functions its own way; a class of another name alone does not."""
    kind = type(tensor)
    if kind in _PLAIN or is_lazy(tensor):
        return False
    function: Any = kind.__torch_function__
    plain: Any = torch.Tensor.__torch_function__
    is_plain = function is torch._C._disabled_torch_function_impl or function.__func__ is plain.__func__
    return not is_plain or is_wrapper(tensor)


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor's class does torch's operations its own way, with memory of its own kind."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def is_state(tensor: torch.Tensor) -> bool:
    """Whether an earlier forward left this tensor behind, made of data."""
    value: Value | None = vars(tensor).get(_ATTRIBUTE)
    return value is not None and value.origin is Origin.DATA


def mark_state(tensor: torch.Tensor) -> None:
    """Let every later forward take this tensor for what an earlier one left behind."""
    vars(tensor)[_ATTRIBUTE] = Value(object(), Origin.DATA)


def is_known(tensor: torch.Tensor) -> bool:
    """Whether some forward has met or made this tensor."""
    return _ATTRIBUTE in vars(tensor)


def outlasting(value: Value) -> Value:
    """Of what is known of a tensor, that which a later forward asks for."""
    return Value(object(), value.origin, key=value.key, names=value.names, learned=value.learned)


def forget(tensors: Iterable[torch.Tensor]) -> None:
    """Take off tensors what forwards have left on them: saved with them, it could not be loaded."""
    for tensor in tensors:
        for name in [name for name in vars(tensor) if name.startswith("_census_")]:
            del vars(tensor)[name]


def leave(tensor: torch.Tensor, value: Value) -> None:
    """Let a tensor carry what is known of it into later forwards."""
    vars(tensor)[_ATTRIBUTE] = value


class Tracker(TorchDispatchMode):
    """Follows values through a forward; `on_data` decides what happens at an operation on data."""

    def __init__(self, model: nn.Module, batch: Batch, leaf_axes: Sequence[int | None] = ()) -> None:
        super().__init__()
        self.rows = batch.rows
        self.forward = object()
        self._failure: tuple[Exception, Call] | None = None
        self._defect: Exception | None = None
        self.leaf_axes: list[int | None] = []
        self._given: set[int] = set()
        self.finds_positions = positions_of(batch) < 2
        self._fixed: dict[int, Value] = {}
        # kept alive: a tensor that is freed gives its id to another
        self._held = held_tensors(model)
        for path, tensor in self._held.values():
            if has_own_functions(tensor):
                raise ModelError(
                    f"{path} is of class {type(tensor).__name__}, which does torch's functions its own way: what it "
                    "computes cannot be followed; put a plain tensor in its place"
                )
            if isinstance(tensor, nn.Parameter) or not is_state(tensor):
                names = frozenset((path,))
                learned = isinstance(tensor, nn.Parameter)
                self._fixed[id(tensor)] = Value(
                    self.forward, Origin.PARAMETER, key=hash(path), names=names, learned=learned
                )
        for leaf, _ in input_leaves(batch):
            if leaf.is_nested or is_wrapper(leaf):
                kind = "nested tensor" if leaf.is_nested else f"tensor of class {type(leaf).__name__}"
                raise ModelError(
                    f"the batch holds a {kind}, which has no plain memory: it cannot be followed; give padded tensors "
                    "with a mask"
                )
        for number, (leaf, rows) in enumerate(self._leaves(batch, leaf_axes)):
            value = Value(self.forward, Origin.DATA, rows=rows)
            value.places = places_of_leaf(leaf.shape, rows, batch, first=number == 0)
            self.finds_positions |= value.places is not None and leaf is not batch.mask_NS
            self.attach(leaf, value)
            self._given.add(memory_of(leaf))

    def _leaves(self, batch: Batch, preferred: Sequence[int | None]) -> Iterator[tuple[torch.Tensor, Rows | None]]:
        leaves = list(input_leaves(batch))
        self._graphs = graphs = Graphs.among(leaves, self.rows)
        for position, (leaf, row) in enumerate(leaves):
            axis = preferred[position] if position < len(preferred) else None
            rows = None if graphs is None or row is not None else graphs.rows_of(leaf.shape)
            if rows is None:
                rows = of_leaf(leaf.shape, self.rows, axis) if row is None else whole(row, self.rows)
            self.leaf_axes.append(None if rows is None else rows.axis)
            yield leaf, rows

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler (3 s) at the first operation, only to switch it off here; see `quiet`
        return False

    def attach(self, tensor: torch.Tensor, value: Value) -> None:
        """Let a tensor carry a value from here on."""
        vars(tensor)[_ATTRIBUTE] = value

    def value_of(self, tensor: torch.Tensor) -> Value:
        """What is known of a tensor now."""
        fixed = self._fixed.get(id(tensor))
        if fixed is not None:
            return self._fresh(tensor, fixed)
        value: Value | None = vars(tensor).get(_ATTRIBUTE)
        if value is None or value.owner is not self.forward:
            value = self._from_outside(tensor, value)
            self.attach(tensor, value)
        return self._fresh(tensor, value)

    def _know_numbers(self, tensor: torch.Tensor) -> None:
        """A tensor made of numbers in the forward is a constant, unless it has as many as there are rows."""
        unknown = id(tensor) not in self._fixed and _ATTRIBUTE not in vars(tensor)
        if unknown and (tensor.numel() <= 1 or of_leaf(tensor.shape, self.rows) is None):
            key = hash((tuple(tensor.shape), tensor.dtype, bits_of(tensor)))
            self.attach(tensor, Value(self.forward, Origin.CONSTANT, key=key))

    def _from_outside(self, tensor: torch.Tensor, earlier: Value | None) -> Value:
        if type(tensor) not in _PLAIN:
            # another object of the same memory: whatever was known is of the tensor that it was made from
            raise ModelError(
                f"the forward makes tensors of class {type(tensor).__name__}: what they were made of cannot be "
                "followed; let it compute with plain tensors, as x.as_subclass(torch.Tensor) is one"
            )
        if earlier is not None and earlier.origin is not Origin.DATA:
            return Value(self.forward, earlier.origin, key=earlier.key, names=earlier.names, learned=earlier.learned)
        return Value(self.forward, Origin.DATA, rows=of_leaf(tensor.shape, self.rows))

    def _fresh(self, tensor: torch.Tensor, value: Value) -> Value:
        if value.writes == value.storage.writes:
            return value
        # another view of the same memory was written in place
        storage = value.storage
        fresh = Value(
            self.forward,
            storage.origin,
            key=hash((value.key, storage.key, storage.writes)),
            names=value.names,
            rows=whole(0, 1) if self.rows == 1 else storage.rows_at(tensor, value.rows),
            learned=value.learned or storage.learned,
            storage=storage,
        )
        self._fixed.pop(id(tensor), None)
        self.attach(tensor, fresh)
        self.on_rewritten(tensor, value, fresh)
        return fresh

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and give its results their values."""
        try:
            return self._follow(func, args, kwargs)
        except Exception as error:
            if self._failure is None or self._failure[0] is not error:
                self._defect = error
            raise

    def _follow(self, func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Any) -> Any:
        op = operator(func)
        tensors = argument_tensors(args, kwargs)
        if op.name in FRESH:
            self._know_numbers(tensors[0])
        values = [self.value_of(tensor) for tensor in tensors]
        call = Call(op, func, args, kwargs or {}, tensors, values)
        if op.writes and any(memory_of(tensor) in self._given for tensor in written(call)):
            self.on_input_written(call)
        origins = [value.origin for value in values]
        if Origin.DATA in origins and op.name not in LIKES:
            into = [name for name in op.written_keywords if call.kwargs.get(name) is not None]
            if len(into) == 1 and isinstance(call.kwargs[into[0]], torch.Tensor):
                return self._put_out(call, into[0])
            parametrised = Origin.PARAMETER in origins
            if op.name in COMPOSITE and parametrised:
                with self:
                    return func.decompose(*args, **(kwargs or {}))
            if op.name in GROUPED and parametrised and is_grouped(call):
                with self:
                    return group_by_group(call)
            return self.on_data(call)
        out = self.run(call)
        self._derive(call, out)
        return out

    def _put_out(self, call: Call, name: str) -> torch.Tensor:
        """Do an operation that is given where its result goes (out=), as one that makes it; what was there is gone."""
        rest = {**call.kwargs}
        out: torch.Tensor = rest.pop(name)
        before = self.value_of(out)
        with self:
            made: torch.Tensor = call.func._overloadpacket(*call.args, **rest)
        value = self.value_of(made)
        if out.shape != made.shape:
            out.resize_(made.shape)
        out.copy_(made)
        before.storage.write(value, before, out)
        self._fixed.pop(id(out), None)
        self.attach(out, value)
        return out

    def _derive(self, call: Call, out: Any) -> None:
        sources = [] if call.op.name in LIKES else call.values
        names = frozenset[str]().union(*[value.names for value in sources])
        learned = any(value.learned for value in sources)
        origin = max((value.origin for value in sources), key=lambda o: o.value, default=Origin.CONSTANT)
        fed = call.op.name in LAYERS or any(value.fed for value in sources)
        self.on_fixed(call, names)
        # repeated for every row, it is the same whatever their number
        made_of = tuple(dict.fromkeys(value.key for value in sources)) if call.op.name in REPEATS else None
        spelled = (self._spelled(call.args), self._spelled(tuple(call.kwargs.items())))
        # what is drawn at random is never the same
        drawn = next(_DRAWS) if torch.Tag.nondeterministic_seeded in call.func.tags else None
        made_by = hash((call.func._schema.name, made_of or spelled, drawn))
        for part, result in enumerate(tensors_in(out)):
            value = Value(self.forward, origin, key=hash((made_by, part)), names=names, learned=learned)
            value.fed = fed
            self._settle(call, result, value)

    def _spelled(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.value_of(value).key
        if isinstance(value, list | tuple):
            return tuple(self._spelled(part) for part in value)
        return str(value)

    def settle_data(self, call: Call, out: Any) -> list[Value]:
        """Give the results of an operation on data their values, and follow the rows."""
        learned, looked_up, located = False, call.op.name in LOOKING, False
        sources, placed = [], []
        # of every operation, in few steps: whatever is run here is no longer in the caches after a product
        for tensor, shape, value in zip(call.tensors, call.shapes, call.values, strict=True):
            learned, looked_up = learned or value.learned, looked_up or value.lookup is not None
            if value.origin is Origin.DATA:
                sources.append(Source(value.rows, shape, tensor))
                placed.append((value.places, shape, tensor))
                located = located or value.places is not None
        given = call.bound()
        lookup = lookup_of(call) if looked_up else None
        values = []
        for part, result in enumerate((out,) if isinstance(out, torch.Tensor) else tensors_in(out)):
            if not call.op.writes and call.position_of(result) is not None:
                values.append(self.value_of(result))
                continue
            if result.is_nested:
                raise ModelError(
                    f"the forward makes a nested tensor ({call.op.name}): it cannot be followed; let it compute with "
                    "padded tensors and a mask"
                )
            rows = follow(call.op.name, given, sources, result.shape, part)
            if rows is None and call.op.name in SCATTERS and self._graphs is not None:
                # a node that nothing leads to
                rows = self._graphs.rows_of(result.shape)
            value = Value(self.forward, Origin.DATA, rows=rows, learned=learned)
            value.lookup = lookup
            value.places = follow_places(call.op.name, given, placed, result.shape, part) if located else None
            self._settle(call, result, value)
            values.append(value)
        return values

    def _settle(self, call: Call, result: torch.Tensor, value: Value) -> None:
        source = call.tensors[0] if call.tensors else None
        position = call.position_of(result)
        written = position is not None
        if position is not None and call.op.writes:
            value.storage = call.values[position].storage
            if not call.op.is_view:
                value.storage.write(value, call.values[position], result)
        elif source is not None and call.op.is_view and _shares_memory(source, result):
            value.storage = call.values[0].storage
        value.writes = value.storage.writes
        if written:
            self._fixed.pop(id(result), None)
        self.attach(result, value)

    def on_input_written(self, call: Call) -> None:
        """An operation is about to write to what the model was given."""
        raise NotImplementedError

    def on_data(self, call: Call) -> Any:
        """Run an operation of which some argument is data."""
        raise NotImplementedError

    def run(self, call: Call) -> Any:
        """Do what the model asked for; where it fails, remember at what."""
        try:
            return call.run()
        except Exception as error:
            self._failure = (error, call)
            raise

    def blame(self, error: Exception, *, module: str = "") -> Exception:
        """The error of a forward as the model's own, naming where; what is no fault of the model as it is."""
        if isinstance(error, CensusError) or is_machines_fault(error) or error is self._defect:
            return error
        if self._failure is None or self._failure[0] is not error:
            inside = f" in module {module}" if module else ""
            hint = "; gradients cannot be followed, call it without" if "does not require grad" in str(error) else ""
            return ModelError(f"the forward failed{inside}: {type(error).__name__}: {error}{hint}")
        call = self._failure[1]
        held = [(shape.numel(), sorted(value.names)) for shape, value in zip(call.shapes, call.values, strict=True)]
        weights = max([(size, names) for size, names in held if names], default=(0, []))[1]
        shapes = ", ".join(str(tuple(shape)) for shape in call.shapes)
        owner = f"site {owner_path(weights[0])}: " if weights else ""
        return ModelError(f"{owner}{call.op.name} of shapes {shapes} failed: {error}")

    def on_fixed(self, call: Call, names: frozenset[str]) -> None:
        """An operation without data has run."""

    def on_rewritten(self, tensor: torch.Tensor, before: Value, after: Value) -> None:
        """A tensor's memory was changed through another view."""


def written(call: Call) -> list[torch.Tensor]:
    """The tensors that an operation writes to."""
    return [tensor for index in call.op.writes if index < len(call.args) for tensor in tensors_in(call.args[index])]


def memory_of(tensor: torch.Tensor) -> int:
    """Where the numbers of a tensor are; of one that has none, or has them elsewhere, a place of its own."""
    place = tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
    return place or -id(tensor)


def _shares_memory(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.layout is not torch.strided or right.layout is not torch.strided:
        return False
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def input_leaves(batch: Batch) -> Iterator[tuple[torch.Tensor, int | None]]:
    """Every tensor of a batch's arguments, with the row it alone belongs to where a list has one entry per row."""
    for argument in (*batch.inputs, *batch.kwargs.values()):
        yield from _leaves_of(argument, batch.rows, None)
    if batch.mask_NS is not None:
        yield batch.mask_NS, None


def copied(batch: Batch) -> Batch:
    """The batch with tensors of its own among its arguments, but for those within objects."""
    copies: dict[int, torch.Tensor] = {}

    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and id(value) not in copies:
            copies[id(value)] = value.clone()
        return copies.get(id(value), value)

    # one that is given twice stays one
    given = {"inputs": batch.inputs, "kwargs": dict(batch.kwargs), "mask_NS": batch.mask_NS}
    return replace(batch, **pytree.tree_map(of, given))


def _leaves_of(value: Any, rows: int, row: int | None) -> Iterator[tuple[torch.Tensor, int | None]]:
    if isinstance(value, torch.Tensor):
        yield value, row
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves_of(part, rows, row)
    elif isinstance(value, list | tuple):
        per_row = row is None and isinstance(value, list) and len(value) == rows > 1
        for index, part in enumerate(value):
            yield from _leaves_of(part, rows, index if per_row else row)
    elif vars_of(value) is not None:
        yield from _leaves_of(vars_of(value), rows, row)


def vars_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object that is no plain value, module or type."""
    if value is None or isinstance(value, nn.Module | type | str | bytes | int | float | complex):
        return None
    attributes = getattr(value, "__dict__", None)
    return attributes if isinstance(attributes, dict) else None
