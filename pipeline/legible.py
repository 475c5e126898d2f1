"""What of a job file is still good where something in it is wrong: so that the rest can be looked up as well.

Layer 1. Knows of a job only that its `name` can be any, that each of its `data` can be left empty, and that an entry of
its `models` cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pydantic_core import ErrorDetails

from pipeline.misfits import real_parts

Parts = Sequence[int | str]
ANYTHING = "?"


class Legible(NamedTuple):
    """What a file says without what is wrong; `lost` are entries of models of which too little is left."""

    raw: Any
    lost: frozenset[int]


def without_errors(raw: Any, errors: Iterable[ErrorDetails]) -> Legible:
    """Leave out what pydantic finds wrong: a value with its key, of an array the whole, a section that cannot be.

    What is left may still be wrong, as a section without a key that it needs.
    """
    lost: set[int] = set()
    left = raw
    for error in errors:
        parts = real_parts(raw, error["loc"])
        if parts[:1] == ["models"] and (error["type"] in ("missing", "value_error") or len(parts) == 2):
            lost.update(parts[1:2])  # type: ignore[arg-type]
        elif error["type"] != "missing":
            left = without(left, parts)
        elif error["loc"] == ("name",):
            left = {**left, "name": ANYTHING}
    for index in lost:
        left = _with_entry(left, index, {"family": ANYTHING, "data": ANYTHING})
    return Legible(left, frozenset(lost))


def without(raw: Any, parts: Parts) -> Any:
    """Leave out the key at a place, or that of the array which the place is in; a data set is left empty instead.

    >>> without({"models": ({"data": "a", "seeds": (1, 0.5)},)}, ["models", 0, "seeds", 1])
    {'models': ({'data': 'a'},)}
    """
    if len(parts) == 2 and parts[0] == "data":
        return {**raw, "data": {**raw["data"], parts[1]: {}}}
    named = [place for place, part in enumerate(parts) if isinstance(part, str)]
    return _without(raw, parts[: named[-1] + 1]) if named else raw


def _without(raw: Any, parts: Parts) -> Any:
    first, *rest = parts
    if isinstance(first, int):
        return tuple(_without(one, rest) if at == first else one for at, one in enumerate(raw))
    if rest:
        return {**raw, first: _without(raw[first], rest)}
    return {key: value for key, value in raw.items() if key != first}


def _with_entry(raw: Any, index: int, entry: dict[str, Any]) -> Any:
    return {**raw, "models": tuple(entry if at == index else one for at, one in enumerate(raw["models"]))}
