"""State objects: what one statistic saw of one chunk in one model, as one safetensors object that is never rewritten.

Layer 1: pure encoding; storage is `store.py`. The bytes are a function of the states alone: tensors under
"<site>|<name>", one metadata entry with the rows of the chunk (safetensors orders tensors itself; a second metadata
entry would be written in hash order).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from safetensors.torch import load, save

from pipeline.errors import StoreError
from pipeline.kernels.base import State

_SEPARATOR = "|"
# of the encoding; another version of what is stored in it is another key
FORMAT = 1
# stretches of rows that could not be read of which a cell says where; the ledger counts all
DAMAGE_KEPT = 100


@dataclass(frozen=True)
class Rows:
    """The ledger of one chunk: read + unreadable + excluded = rows in its row groups."""

    total: int
    read: int
    unreadable: int = 0
    excluded: int = 0

    @property
    def balanced(self) -> bool:
        """Whether every row is accounted for."""
        return self.read + self.unreadable + self.excluded == self.total


class Damaged(NamedTuple):
    """A stretch of rows that could not be read: the number in the file of the first, how many, and why."""

    row: int
    rows: int
    reason: str


@dataclass(frozen=True, eq=False)
class CellState:
    """The decoded content of a state object: a state per site, the chunk's ledger, and sums of the model's scores.

    `damage` says where rows were that could not be read, the first DAMAGE_KEPT stretches of them.
    """

    states: Mapping[str, State]
    rows: Rows
    scores: Mapping[str, float]
    device: str
    damage: tuple[Damaged, ...] = ()


def cell_key(model: str, statistic: str, chunk: str) -> str:
    """Where the state of (model id, statistic key, chunk id) is stored."""
    return f"states/{model}/{statistic}/{chunk}.safetensors"


def encode_cell(cell: CellState) -> bytes:
    """The bytes of a state object; equal states give equal bytes."""
    tensors = {
        f"{site}{_SEPARATOR}{name}": value.detach().cpu().contiguous()
        for site, state in cell.states.items()
        for name, value in state.items()
    }
    record = {
        "format": FORMAT,
        "rows": asdict(cell.rows),
        "scores": dict(cell.scores),
        "device": cell.device,
        "sites": sorted(cell.states),
        "damage": [list(one) for one in cell.damage[:DAMAGE_KEPT]],
    }
    # an object without any tensor is refused by some readers of the format
    tensors.setdefault(_SEPARATOR, torch.zeros(1, dtype=torch.int64))
    return save(tensors, metadata={"cell": json.dumps(record, sort_keys=True)})


def decode_cell(content: bytes, *, key: str = "a state object") -> CellState:
    """Read a state object back, bit for bit; StoreError if it is damaged or of another format."""
    try:
        header_bytes = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + header_bytes])
        record = json.loads(header["__metadata__"]["cell"])
        if record.get("format") != FORMAT:
            raise StoreError(
                f"{key} has format {record.get('format')}, and this version of neuron-census reads {FORMAT}: use the "
                "version that wrote it, or delete it and run again"
            )
        states: dict[str, State] = {site: {} for site in record["sites"]}
        for name, value in load(content).items():
            if name != _SEPARATOR:
                site, part = name.rsplit(_SEPARATOR, 1)
                states[site][part] = value
        damage = tuple(Damaged(*one) for one in record.get("damage", []))
        return CellState(states, Rows(**record["rows"]), record["scores"], record["device"], damage)
    except StoreError:
        raise
    except Exception as error:  # safetensors raises several kinds
        raise StoreError(f"{key} is damaged ({error}); delete it and run again") from error
