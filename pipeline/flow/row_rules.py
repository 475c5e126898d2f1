"""How each operation of a forward carries the rows of a batch from its inputs to its outputs.

Layer 1. Where an operation leaves it unclear, the answer is None: a site there is refused, never guessed.
"""

from __future__ import annotations

from pipeline.flow.operators import ELEMENTWISE
from pipeline.flow.row_joins import JOINS, MANY, REDUCTIONS, Sources, joined, reduced
from pipeline.flow.row_views import KEEP_ALL, ONE, PARTS, Arguments, axis_of
from pipeline.flow.rows import Rows, Shape, agreed


def follow(name: str, given: Arguments, sources: Sources, new: Shape, part: int = 0) -> Rows | None:
    """Rows of output `part` of operation `name`, of shape `new`; `given` are its arguments by name."""
    known = [(source.rows, source.shape) for source in sources if source.rows is not None]
    if not known:
        return None
    if name == "copy" and sources[-1].tensor is given.get("src"):
        # what was there before is gone
        sources, known = sources[-1:], known[-1:] if sources[-1].rows is not None else []
        if not known:
            return None
    if all(rows.axis is None for rows, _ in known) and name not in JOINS and name != "stack":
        # whatever is computed from one row alone belongs to it
        return agreed([rows for rows, _ in known])
    if name in JOINS:
        return joined(sources, given.get("dim", given.get("axis", 0)) % len(new), new)
    if name in MANY:
        return MANY[name](given, sources, new, part)
    rows, shape = known[0]
    if name in REDUCTIONS and (given.get("dim") is not None or (len(known) == 1 and len(new) < len(shape))):
        return reduced(rows, given, shape, new)
    if name in ELEMENTWISE or name == "copy":
        return agreed([rows.at(rows.axis + len(new) - len(old)) for rows, old in known if rows.axis is not None])
    if name in KEEP_ALL or rows.axis is None:
        return rows
    if name in ONE:
        return ONE[name](rows, given, shape, new)
    if name in PARTS:
        return PARTS[name](rows, given, shape, new, part)
    return _unruled(name, given, rows, shape, new)


def _unruled(name: str, given: Arguments, rows: Rows, shape: Shape, new: Shape) -> Rows | None:
    # everything else (pools, norms, attention, resampling) keeps its batch axes in place
    axis = axis_of(rows)
    if axis >= len(new) or new[axis] != shape[axis]:
        return None
    return rows if len(new) == len(shape) or axis == 0 else None
