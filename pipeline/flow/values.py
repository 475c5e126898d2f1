"""What is known of the tensors of a running forward, and one operation on them.

Layer 1. Values hang on the tensors themselves, so memory stays flat and a freed tensor's value goes with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from pipeline.flow.lookups import Lookup
from pipeline.flow.operators import Operator
from pipeline.flow.row_writes import Piece, place_of, rows_of_pieces
from pipeline.flow.rows import Rows, agreed


class Origin(Enum):
    """What a tensor is made of; data prevails over parameters, parameters over constants."""

    CONSTANT = 0
    PARAMETER = 1
    DATA = 2


class Storage:
    """The memory that a tensor shares with its views: how often it was written in place, and what was written last.

    pieces  what was written since it held no data, or since all of it was written; None where it began with data
    mixed   data of other rows than were there was written over some of the data that it began with
    """

    __slots__ = ("key", "learned", "mixed", "origin", "pieces", "writes")

    def __init__(self) -> None:
        self.writes = 0
        self.origin = Origin.CONSTANT
        self.key = 0
        self.learned = False
        self.mixed = False
        self.pieces: list[Piece] | None = None

    def write(self, value: Value, before: Value, tensor: torch.Tensor) -> None:
        """Remember that a value was written over another, through this tensor."""
        if value.origin is Origin.DATA:
            self._write_rows(value.rows, before, tensor)
        self.writes += 1
        self.origin, self.key, self.learned = value.origin, value.key, value.learned

    def _write_rows(self, rows: Rows | None, before: Value, tensor: torch.Tensor) -> None:
        was_data = before.origin is Origin.DATA
        if was_data and rows is not None and before.rows is not None and agreed([before.rows, rows]) is not None:
            return
        piece = Piece(rows, place_of(tensor))
        if piece.place is None or tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes():
            self.pieces = [piece]
        elif self.pieces is not None:
            self.pieces.append(piece)
        elif was_data or self.mixed:
            self.mixed = True
        else:
            self.pieces = [piece]

    def rows_at(self, tensor: torch.Tensor, before: Rows | None) -> Rows | None:
        """The rows of a tensor of this memory that had others before it was written; None where that does not tell."""
        if self.pieces is not None:
            return rows_of_pieces(self.pieces, place_of(tensor))
        return None if self.mixed else before


class Value:
    """What is known of a tensor at one moment of the forward.

    owner  the forward in which it was made
    key    names how a tensor without data was made (equal in every forward); 0 for data
    names  the parameters and buffers it was made of, where it holds no data
    node   index of the recorded operation that made it, and which output it was; None outside a recording
    notes  what a tracker of its own kind keeps beside it
    learned  a parameter is among what it was made of, data or not
    fed      made by a layer that was fed a constant or a parameter (positions): an activation, no weight
    lookup   the embeddings that it holds, as one-hot vectors and tables
    places   the axes that count the positions of which the batch has labels or a mask, see `positions.py`
    """

    __slots__ = (
        "__weakref__",
        "fed",
        "key",
        "learned",
        "lookup",
        "names",
        "node",
        "notes",
        "origin",
        "owner",
        "places",
        "rows",
        "storage",
        "writes",
    )

    def __init__(
        self,
        owner: object,
        origin: Origin,
        *,
        key: int = 0,
        names: frozenset[str] = frozenset(),
        rows: Rows | None = None,
        learned: bool = False,
        storage: Storage | None = None,
    ) -> None:
        self.owner = owner
        self.origin = origin
        self.key = key
        self.names = names
        self.rows = rows
        self.learned = learned
        self.fed = False
        self.storage = storage or Storage()
        self.writes = self.storage.writes
        self.node: tuple[int, int] | None = None
        self.notes: Any = None
        self.lookup: Lookup | None = None
        self.places: tuple[Rows, ...] | None = None


@dataclass
class Call:
    """One operation of the forward on data, with the values of its tensor arguments in order."""

    op: Operator
    func: torch._ops.OpOverload
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    tensors: list[torch.Tensor]
    values: list[Value]

    def __post_init__(self) -> None:
        self.shapes = [tensor.shape for tensor in self.tensors]

    def run(self) -> Any:
        """Do what the model asked for."""
        return self.func(*self.args, **self.kwargs)

    def position_of(self, tensor: torch.Tensor) -> int | None:
        """Where a tensor is among those of the arguments; None if it is none of them."""
        for position, held in enumerate(self.tensors):
            if held is tensor:
                return position
        return None

    def bound(self) -> dict[str, Any]:
        """The arguments by the names of the operation's schema; defaults are left out."""
        return {**dict(zip(self.op.arguments, self.args, strict=False)), **self.kwargs}


def bits_of(tensor: torch.Tensor) -> bytes:
    """What a small tensor holds, and of a large one some thousand numbers; nothing where it has no memory."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided or tensor.is_meta:
        return b""
    flat = tensor.detach().reshape(-1)
    return (
        flat[:: len(flat) // 4096 + 1]
        .resolve_conj()
        .resolve_neg()
        .cpu()
        .contiguous()
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


def argument_tensors(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> list[torch.Tensor]:
    """Every tensor in an operation's arguments, in order: as `tensors_in`, without its cost where nothing is nested."""
    found: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple | dict):
            found.extend(tensors_in(value))
    return found


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested arguments, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
