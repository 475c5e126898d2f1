"""The operations of a forward as a fixed list: what each is done to, what it makes, and what is shown behind it.

Layer 1. A script holds no tensor. The tensors of a forward have numbers, their *registers*: first those of the batch,
then the model's own and whatever operations make, each at its first use.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from pipeline.flow.gains import asking
from pipeline.flow.prepared import Prepared
from pipeline.flow.registers import Fresh, Pattern, Registers
from pipeline.flow.values import Value


class Result(NamedTuple):
    """A tensor that an operation makes, or hands on where `is_new` is False; `number` is None where nothing needs it.

    left  what is known of it in a later forward, if something outlives this one
    """

    number: int | None
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    is_new: bool
    left: Value


@dataclass(frozen=True, eq=False)
class Step:
    """One operation.

    tensors, others  its positional arguments: those that are tensors with their registers, and the rest
    is_fresh   it makes something of nothing that was there before, but perhaps its shape
    results    of it; one tensor where `is_single`
    kept       of what it overwrites: the register, and that of its copy
    shows      the presentations that it completes
    freed      the registers that nothing needs behind it
    moments    of a layer norm, where something needs them: the registers of each vector's mean and 1/std
    """

    func: torch._ops.OpOverload
    arguments: int
    tensors: tuple[tuple[int, int], ...]
    others: tuple[tuple[int, Pattern], ...]
    keywords: Mapping[str, Pattern]
    is_fresh: bool
    results: tuple[Result, ...]
    is_single: bool
    kept: tuple[tuple[int, int], ...]
    shows: tuple[Prepared, ...]
    freed: tuple[int, ...]
    moments: tuple[int, int] | None = None

    def is_of(self, args: Sequence[Any], kwargs: Mapping[str, Any], registers: Registers) -> bool:
        """Whether an operation with these arguments is this one, up to its function."""
        if len(args) != self.arguments or len(kwargs) != len(self.keywords):
            return False
        for position, number in self.tensors:
            if args[position] is not registers[number]:
                return False
        for position, pattern in self.others:
            if not pattern.fits(args[position], registers):
                return False
        return all(name in kwargs and one.fits(kwargs[name], registers) for name, one in self.keywords.items())

    def given(self, registers: Registers, lifted: Iterator[torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Its arguments, of these registers; tensors that Python makes of numbers are the next of `lifted`."""
        args: list[Any] = [None] * self.arguments
        for position, number in self.tensors:
            args[position] = registers[number]
        for position, pattern in self.others:
            args[position] = next(lifted) if isinstance(pattern, Fresh) else pattern.filled(registers)
        return args, {name: pattern.filled(registers) for name, pattern in self.keywords.items()}

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any], registers: list[Any]) -> Any:
        """Do what the model asked for."""
        if self.moments is None:
            return self.func(*args, **kwargs)
        out, *moments = torch.ops.aten.native_layer_norm.default(*asking(args))
        registers[self.moments[0]], registers[self.moments[1]] = moments
        return out


@dataclass(frozen=True, eq=False)
class Script:
    """All operations of a forward of a batch with a certain signature.

    leaves  how many registers are of the batch; `own` the model's tensors by their registers
    """

    steps: tuple[Step, ...]
    registers: int
    leaves: int
    own: tuple[tuple[int, weakref.ref[torch.Tensor]], ...]

    @property
    def is_alive(self) -> bool:
        """Whether the model's tensors are still there."""
        return all(held() is not None for _, held in self.own)

    def start(self, leaves: Sequence[torch.Tensor]) -> list[Any]:
        """The registers before the first operation."""
        registers: list[Any] = [*leaves, *[None] * (self.registers - len(leaves))]
        for number, held in self.own:
            registers[number] = held()
        return registers


def without_numbers(steps: Sequence[Step], relied: set[int]) -> tuple[Step, ...]:
    """The steps that make tensors of any numbers, but for those that the registers `relied` on are made of."""
    kept, needed = list[Step](), set(relied)
    for step in reversed(steps):
        others = step.others
        if any(one.number in needed for one in step.results):
            needed |= {number for _, number in step.tensors}
            needed |= {number for _, one in step.others for number in one.numbers}
        else:
            others = tuple((at, replace(one, held=None) if isinstance(one, Fresh) else one) for at, one in step.others)
        kept.append(step if others == step.others else replace(step, others=others))
    return tuple(kept[::-1])


def freed(steps: Sequence[Step], leaves: int, own: Mapping[int, int]) -> tuple[Step, ...]:
    """The steps, each with the registers that it is the last to need, and without those that nothing needs."""
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        patterns = (*(one for _, one in step.others), *step.keywords.values())
        needed = {number for _, number in step.tensors} | {number for one in patterns for number in one.numbers}
        needed |= {source for source, _ in step.kept}.union(*[show.numbers for show in step.shows])
        needed |= {one.number for one in step.results if not one.is_new and one.number is not None}
        last.update(dict.fromkeys(needed, index))
    freed: dict[int, list[int]] = {}
    for number, index in last.items():
        if number >= leaves and number not in own.values():
            freed.setdefault(index, []).append(number)
    return tuple(
        replace(
            step,
            results=tuple(one if one.number in last else one._replace(number=None) for one in step.results),
            freed=tuple(freed.get(index, ())),
            moments=step.moments if step.moments is not None and step.moments[0] in last else None,
        )
        for index, step in enumerate(steps)
    )
