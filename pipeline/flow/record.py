"""Records the data flow of one probe batch as a graph of operations on data.

Layer 1. Only the probe is recorded; it keeps values and shapes, and of tensors only those that hold no data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.errors import ModelError
from pipeline.flow.affine import Affine, affine_of, is_affine
from pipeline.flow.operators import DROPOUTS, Operator
from pipeline.flow.trace import Tracker, copied, input_leaves, memory_of, written
from pipeline.flow.values import Call, Origin, Value, tensors_in

_REWRITTEN = Operator("rewritten", (), (), ())


@dataclass(frozen=True, eq=False)
class Fixed:
    """A tensor argument without data."""

    value: Value
    tensor: torch.Tensor


@dataclass(frozen=True, eq=False)
class Node:
    """One recorded operation; in `args` and `kwargs` every tensor is a `Value` (data) or a `Fixed`."""

    index: int
    op: Operator
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    module: str
    affine: Affine | None


@dataclass(eq=False)
class Graph:
    """All operations on data of one forward, in order."""

    nodes: list[Node] = field(default_factory=list)
    shapes: dict[Value, torch.Size] = field(default_factory=dict)
    _consumers: dict[Value, list[Node]] = field(default_factory=dict)

    def add(self, node: Node) -> None:
        """Append the next operation."""
        self.nodes.append(node)
        for value in dict.fromkeys(node.inputs):
            self._consumers.setdefault(value, []).append(node)

    def consumers(self, value: Value) -> Sequence[Node]:
        """The operations that read a value, in order."""
        return self._consumers.get(value, ())

    def producer(self, value: Value) -> Node | None:
        """The operation that made a value; None for the model's inputs."""
        return None if value.node is None else self.nodes[value.node[0]]


class Recorder(Tracker):
    """Builds the graph of a forward of a copy of a batch.

    constant_maps  the weights that multiply constants
    writes_inputs  the forward writes to what it is given
    returned  what the model returned
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.batch = copied(batch)
        super().__init__(model, self.batch)
        self.writes_inputs = False
        self.returned: Any = None
        self._uncopied = {memory_of(leaf) for leaf, _ in input_leaves(batch)}
        self.graph = Graph()
        self.constant_maps: set[str] = set()
        self._modules: list[str] = [""]
        self._names = {id(module): name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}

    @property
    def module(self) -> str:
        """The path of the module that is running, or has failed."""
        return self._modules[-1]

    def on_data(self, call: Call) -> Any:
        """Run and record."""
        self._refuse_dropout(call)
        affine = affine_of(call)
        out = self.run(call)
        outputs = self.settle_data(call, out)
        made = [(value, result.shape) for value, result in zip(outputs, tensors_in(out), strict=True)]
        if any(value not in call.values for value, _ in made):
            self.graph.shapes.update(zip(call.values, call.shapes, strict=True))
            args = tuple(_recorded(arg, call) for arg in call.args)
            kwargs = {name: _recorded(arg, call) for name, arg in call.kwargs.items()}
            inputs = tuple(value for value in call.values if value.origin is Origin.DATA)
            self._append(call.op, call.func, args, kwargs, inputs, made, affine)
        return out

    def _refuse_dropout(self, call: Call) -> None:
        """ModelError where values are dropped in eval mode."""
        if _drops(call.op.name, call.args):
            where = f" in module {self.module}" if self.module else ""
            raise ModelError(
                f"the model has dropout left on{where} ({call.op.name}): in eval mode it must drop nothing and draw "
                "nothing; make that conditional on self.training"
            )

    def _append(
        self,
        op: Operator,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: tuple[Value, ...],
        made: Sequence[tuple[Value, torch.Size]],
        affine: Affine | None,
    ) -> None:
        index = len(self.graph.nodes)
        outputs = tuple(value for value, _ in made)
        for part, (value, shape) in enumerate(made):
            if value not in inputs:
                value.node = (index, part)
            self.graph.shapes[value] = shape
        self.graph.add(Node(index, op, func, args, kwargs, inputs, outputs, self._modules[-1], affine))

    def on_input_written(self, call: Call) -> None:
        """ModelError if what is written to could not be copied."""
        self.writes_inputs = True
        if any(memory_of(tensor) in self._uncopied for tensor in written(call)):
            raise ModelError(
                f"the forward writes to its input in place ({call.op.name}), in an object that cannot be copied: "
                "whoever else is shown the batch would see other numbers; let it write to a copy"
            )

    def on_fixed(self, call: Call, names: frozenset[str]) -> None:
        """Remember the weights that multiply something no input of the model takes part in."""
        if is_affine(call):
            self.constant_maps |= names

    def on_rewritten(self, tensor: torch.Tensor, before: Value, after: Value) -> None:
        """Record that the memory of a value was changed through another view."""
        inputs = (before,) if before.origin is Origin.DATA else ()
        self._append(_REWRITTEN, None, (), {}, inputs, [(after, tensor.shape)], None)

    @contextmanager
    def naming(self, model: nn.Module) -> Iterator[None]:
        """Know which module is running, for as long as the context lasts."""

        def enter(module: nn.Module, args: Any) -> None:
            # a copy that the forward made has the hooks too
            self._modules.append(self._names.get(id(module), ""))

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self._modules.pop()

        handles = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _drops(name: str, args: Sequence[Any]) -> bool:
    """Whether an operation was told to draw at random what it leaves out, or a slope."""
    if name in DROPOUTS:
        # of native_dropout None is on
        return bool(args[1] and (args[2] or (args[2] is None and name == "native_dropout")))
    if name == "scaled_dot_product_attention":
        return len(args) > 4 and bool(args[4])
    return name in ("rrelu", "rrelu_") and len(args) > 3 and bool(args[3])


def _recorded(value: Any, call: Call) -> Any:
    if isinstance(value, torch.Tensor):
        known = next(held for held, tensor in zip(call.values, call.tensors, strict=True) if tensor is value)
        return known if known.origin is Origin.DATA else Fixed(known, value)
    if isinstance(value, list | tuple):
        return [_recorded(part, call) for part in value]
    return value


def fixed_in(node: Node) -> list[Fixed]:
    """The operands of an operation that hold no data."""
    flat: list[Fixed] = []
    for arg in (*node.args, *node.kwargs.values()):
        flat += [part for part in (arg if isinstance(arg, list) else [arg]) if isinstance(part, Fixed)]
    return flat


def fixed_names(nodes: Iterable[Node]) -> frozenset[str]:
    """The parameters and buffers that take part in some operations."""
    return frozenset[str]().union(*[fixed.value.names for node in nodes for fixed in fixed_in(node)])


def rerun(node: Node, given: dict[Value, torch.Tensor]) -> list[torch.Tensor] | None:
    """What an operation makes of other tensors of the same shapes; None where it makes nothing of them."""
    for made in (given, {value: tensor.contiguous() for value, tensor in given.items()}):
        # a view of a tensor that repeats its elements may need a copy
        with suppress(RuntimeError):
            out = node.func(*replay(node.args, made), **replay(node.kwargs, made))
            return [out] if isinstance(out, torch.Tensor) else list(out)
    return None


def replay(value: Any, given: dict[Value, torch.Tensor]) -> Any:
    """Recorded arguments with tensors in place of values; those of `given` where they stand there."""
    if isinstance(value, Value):
        return given[value]
    if isinstance(value, Fixed):
        return given.get(value.value, value.tensor)
    if isinstance(value, list | tuple):
        return [replay(part, given) for part in value]
    if isinstance(value, dict):
        return {name: replay(part, given) for name, part in value.items()}
    return value
