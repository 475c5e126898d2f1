"""Arguments of an operation with numbers in place of tensors.

Layer 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.flow.trace import is_known
from pipeline.flow.values import bits_of

# the tensors of a running forward, and what is made of them, by number; None where there is none (any more)
Registers = Sequence[Any]
PLAIN = (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class Pattern(ABC):
    """What an argument must be."""

    @abstractmethod
    def fits(self, value: Any, registers: Registers) -> bool:
        """Whether a value is that."""

    @abstractmethod
    def filled(self, registers: Registers) -> Any:
        """The value itself."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """The registers in it."""
        return ()


@dataclass(frozen=True, slots=True)
class Of(Pattern):
    """The tensor of a register."""

    number: int

    def fits(self, value: Any, registers: Registers) -> bool:
        """By identity."""
        return value is not None and value is registers[self.number]

    def filled(self, registers: Registers) -> Any:
        """See `Pattern`."""
        return registers[self.number]

    @property
    def numbers(self) -> tuple[int, ...]:
        """See `Pattern`."""
        return (self.number,)


@dataclass(frozen=True, slots=True)
class Fresh(Pattern):
    """A tensor that Python made of numbers; of those of `held`, where a pattern is made of them."""

    shape: torch.Size
    dtype: torch.dtype
    held: bytes | None = None

    def fits(self, value: Any, registers: Registers) -> bool:
        """Whether it is of that shape and type, with those numbers, and none that was there before."""
        if type(value) is not torch.Tensor or value.shape != self.shape or value.dtype != self.dtype:
            return False
        if self.held is not None and bits_of(value) != self.held:
            return False
        return not is_known(value) and all(value is not held for held in registers)

    def filled(self, registers: Registers) -> Any:
        """There is none."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Plain(Pattern):
    """A value that is no tensor, or a list of such."""

    value: Any

    def fits(self, value: Any, registers: Registers) -> bool:
        """By type and value."""
        return type(value) is type(self.value) and bool(value == self.value)

    def filled(self, registers: Registers) -> Any:
        """See `Pattern`."""
        return self.value


@dataclass(frozen=True, slots=True)
class Listed(Pattern):
    """A list or tuple with tensors in it."""

    kind: type
    parts: tuple[Pattern, ...]

    def fits(self, value: Any, registers: Registers) -> bool:
        """Part by part."""
        if not isinstance(value, list | tuple) or type(value) is not self.kind or len(value) != len(self.parts):
            return False
        return all(part.fits(value[at], registers) for at, part in enumerate(self.parts))

    def filled(self, registers: Registers) -> Any:
        """See `Pattern`."""
        return self.kind(part.filled(registers) for part in self.parts)

    @property
    def numbers(self) -> tuple[int, ...]:
        """See `Pattern`."""
        return tuple(number for part in self.parts for number in part.numbers)
