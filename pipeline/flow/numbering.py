"""Gives the tensors of a recorded forward their registers, and its arguments their patterns.

Layer 1. Holds none of the tensors that the forward makes: their numbers hang on themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from pipeline.flow.registers import PLAIN, Fresh, Listed, Of, Pattern, Plain
from pipeline.flow.values import bits_of

_ATTRIBUTE = "_census_register"


class UnscriptableError(Exception):
    """Something in a forward that no script can say."""


class Numbering:
    """Registers of a batch's `leaves`, the model's tensors (`held`, by id) and what the forward makes.

    count  how many there are
    own    those of the model's tensors that were used, by id
    """

    def __init__(self, leaves: Sequence[torch.Tensor], held: Collection[int]) -> None:
        self.count = len(leaves)
        self.own: dict[int, int] = {}
        self._given = {id(leaf): number for number, leaf in enumerate(leaves)}
        self._held = held
        self._token = object()

    def pattern(self, value: Any, *, fresh: bool = False) -> Pattern:
        """What an argument is; `fresh`: a tensor without a register may have been made of numbers."""
        if isinstance(value, torch.Tensor):
            number = self.known(value)
            if number is not None:
                return Of(number)
            if fresh and type(value) is torch.Tensor and value.layout is torch.strided:
                return Fresh(value.shape, value.dtype, bits_of(value))
            raise UnscriptableError
        if isinstance(value, list | tuple):
            parts = tuple(self.pattern(part) for part in value)
            if all(isinstance(part, Plain) for part in parts):
                return Plain(value if isinstance(value, tuple) else list(value))
            return Listed(type(value), parts)
        if isinstance(value, PLAIN) and value == value:
            return Plain(value)
        raise UnscriptableError

    def known(self, tensor: torch.Tensor) -> int | None:
        """The register of a tensor; None where it has none."""
        key = id(tensor)
        if key in self._given:
            return self._given[key]
        if key in self._held:
            if key not in self.own:
                self.own[key] = self.next()
            return self.own[key]
        token, number = vars(tensor).get(_ATTRIBUTE, (None, None))
        return number if token is self._token else None

    def of(self, tensor: torch.Tensor) -> int:
        """The register of a tensor that must have one."""
        number = self.known(tensor)
        if number is None:
            raise UnscriptableError
        return number

    def next(self) -> int:
        """A register that no tensor has."""
        self.count += 1
        return self.count - 1

    def new(self, tensor: torch.Tensor) -> int:
        """A register for a tensor that has none."""
        number = self.next()
        vars(tensor)[_ATTRIBUTE] = (self._token, number)
        return number

    def patterns(self, args: Sequence[Any]) -> tuple[Pattern, ...]:
        """What positional arguments are."""
        return tuple(self.pattern(arg) for arg in args)

    def keywords(self, kwargs: Mapping[str, Any]) -> dict[str, Pattern]:
        """What keyword arguments are."""
        return {name: self.pattern(arg) for name, arg in kwargs.items()}
