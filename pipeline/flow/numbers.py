"""Maps z · scale + shift by plain numbers: a sign, a temperature, an offset.

Layer 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pipeline.flow.operators import words
from pipeline.flow.record import Fixed, Node
from pipeline.flow.values import Origin, Value

SCALAR_MAPS = words("add sub rsub mul div neg")


class ScalarMap(NamedTuple):
    """z · scale + shift."""

    scale: float
    shift: float


def scalar_map(node: Node) -> ScalarMap | None:
    """The map that an operation on one tensor and one number is; None if it is none."""
    name, args = node.op.name, node.args
    if name not in SCALAR_MAPS or "rounding_mode" in node.kwargs:
        return None
    if name == "neg":
        return ScalarMap(-1.0, 0.0)
    first = isinstance(args[0], Value)
    number = _number(args[1] if first else args[0])
    if number is None or (first and isinstance(args[1], Value)):
        return None
    alpha = _number(node.kwargs.get("alpha", args[2] if len(args) > 2 else 1))
    return None if alpha is None else _map(name, number, alpha, first=first)


def _map(name: str, number: float, alpha: float, *, first: bool) -> ScalarMap | None:
    if name == "mul":
        return ScalarMap(number, 0.0) if number else None
    if name == "div":
        return ScalarMap(1 / number, 0.0) if first and number else None
    if name == "rsub":  # number − alpha · z
        return ScalarMap(-alpha, number)
    sign = -1.0 if name == "sub" else 1.0
    # z ± alpha · number, or number ± alpha · z
    return ScalarMap(1.0, sign * alpha * number) if first else ScalarMap(sign * alpha, number)


def _number(value: Any) -> float | None:
    if isinstance(value, Fixed):
        constant = value.value.origin is Origin.CONSTANT and value.tensor.numel() == 1
        return float(value.tensor) if constant and not value.tensor.is_complex() else None
    return float(value) if isinstance(value, int | float) else None
