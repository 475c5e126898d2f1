"""What an operation behind a site is told beside data: its numbers, and operands that hold none.

Layer 1. A pattern is folded once, from the probe: in every later batch the operations behind its site must be told the
same. Compared are keys, which name how an operand was made; numbers only where a key is another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.flow.affine import Affine
from pipeline.flow.operators import BATCH_NORMS, DATA_NORMS, ELEMENTWISE
from pipeline.flow.record import Fixed, Node, fixed_in
from pipeline.flow.values import Call, Origin, Value

_NORMS = BATCH_NORMS | DATA_NORMS


@dataclass(frozen=True, eq=False)
class Operand:
    """An operand without data as the probe had it, and the keys of those found to hold the same numbers."""

    tensor: torch.Tensor
    value: Value
    _alike: set[int] = field(default_factory=set)

    def is_like(self, tensor: torch.Tensor, value: Value) -> bool:
        """Whether another batch's is the same, up to how often it is repeated."""
        if value.key == self.value.key or value.key in self._alike:
            return True
        if value.origin is Origin.DATA or not _equal(self.tensor, tensor):
            return False
        self._alike.add(value.key)
        return True


@dataclass(frozen=True, eq=False)
class Told:
    """An operation of the probe, with what it was told beside data."""

    name: str
    numbers: tuple[Any, ...] = ()
    operands: tuple[Operand, ...] = ()

    @classmethod
    def of(cls, node: Node) -> Told:
        """That of a recorded operation; of a sum over neighbours, which folds nothing, the name alone."""
        name = node.op.name
        if name not in ELEMENTWISE | _NORMS:
            return cls(name)
        return cls(name, _numbers(name, node.args, node.kwargs), tuple(map(operand_of, fixed_in(node))))

    def is_told_by(self, call: Call) -> bool:
        """Whether a running operation of this name is told the same."""
        if self.name not in ELEMENTWISE and self.name not in _NORMS:
            return True
        if self.numbers != _numbers(self.name, call.args, call.kwargs):
            return False
        held = _without_data(call)
        pairs = zip(self.operands, held, strict=False)
        return len(held) == len(self.operands) and all(one.is_like(*other) for one, other in pairs)

    def __str__(self) -> str:
        """As a message calls it."""
        return _spelled(self.name, self.numbers, [(one.tensor, one.value) for one in self.operands])


def bias_of(affine: Affine) -> Operand | None:
    """The bias of an affine call as later ones are compared with."""
    return None if affine.bias is None or affine.bias_value is None else Operand(affine.bias, affine.bias_value)


def has_bias(affine: Affine, bias: Operand | None) -> bool:
    """Whether a running affine call has that bias."""
    if bias is None or affine.bias is None or affine.bias_value is None:
        return bias is None and affine.bias is None
    return bias.is_like(affine.bias, affine.bias_value)


def operand_of(fixed: Fixed) -> Operand:
    """A recorded operand as what later ones are compared with."""
    return Operand(fixed.tensor, fixed.value)


def spelled(call: Call) -> str:
    """A running operation as a message calls it."""
    return _spelled(call.op.name, _numbers(call.op.name, call.args, call.kwargs), _without_data(call))


def _without_data(call: Call) -> list[tuple[torch.Tensor, Value]]:
    pairs = zip(call.tensors, call.values, strict=True)
    return [(tensor, value) for tensor, value in pairs if value.origin is not Origin.DATA]


def _numbers(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The plain arguments that decide what is computed: sizes among those of a norm follow from its input."""
    kinds = (int, float, complex, str) if name in ELEMENTWISE else (bool, float)
    listed = [one for one in args if isinstance(one, kinds)]
    # NaN is no other number than NaN
    return tuple(repr(one) if one != one else one for one in (*listed, *_named(kwargs, kinds)))


def _named(kwargs: Mapping[str, Any], kinds: tuple[type, ...]) -> Iterable[Any]:
    for name in sorted(kwargs) if kwargs else ():
        if isinstance(kwargs[name], kinds):
            yield kwargs[name]


def _spelled(name: str, numbers: Sequence[Any], operands: Sequence[tuple[torch.Tensor, Value]]) -> str:
    told = [str(number) for number in numbers]
    for tensor, value in operands:
        shape = f" of {' × '.join(map(str, tensor.shape))}" if tensor.numel() != 1 else ""
        only = f" = {tensor.item():.6g}" if tensor.numel() == 1 and not tensor.is_complex() else shape
        told.append((", ".join(sorted(value.names)) or "a constant") + only)
    return f"{name}({', '.join(told)})" if told else name


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensors hold the same numbers, where one is repeated along an axis perhaps more often than the other."""
    if one.dim() != other.dim() or one.dtype != other.dtype or one.device != other.device:
        return False
    for axis, (size, wanted) in enumerate(zip(one.shape, other.shape, strict=True)):
        if size != wanted:
            if 0 in (size, wanted):
                return False
            one, other = _once(one, axis), _once(other, axis)
            if one.shape[axis] != other.shape[axis]:
                return False
    return torch.equal(one, other)


def _once(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    first = tensor.narrow(axis, 0, 1)
    return first if bool((tensor == first).all()) else tensor
