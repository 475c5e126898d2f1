"""State objects: what one statistic saw of one chunk in one model, as one safetensors object that is never rewritten.

Layer 1: pure encoding; storage is `store.py`. The bytes are a function of the states alone: tensors under
"<site>|<name>", one metadata entry with the rows of the chunk (safetensors orders tensors itself; a second metadata
entry would be written in hash order).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save

from pipeline.errors import SpoiltObject, is_machines_fault
from pipeline.kernels.base import State

# between the name of a site and that of a tensor
SEPARATOR = "|"
# of the encoding; another version of what is stored in it is another key
FORMAT = 2
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

    checkpoint  SHA-256 of the weights that were measured, as stored: the key names their model, and a model whose
                checkpoint was removed may have been made anew with others
    primitives  digest of what the statistic asked of the sites, see `primitives_digest`: the key names the statistic's
                version, which an edit may have forgotten to raise
    damage      where rows were that could not be read, the first DAMAGE_KEPT stretches of them
    """

    states: Mapping[str, State]
    rows: Rows
    scores: Mapping[str, float]
    device: str
    checkpoint: str
    primitives: str = ""
    damage: tuple[Damaged, ...] = ()


def cell_key(model: str, statistic: str, chunk: str) -> str:
    """Where the state of (model id, statistic key, chunk id) is stored."""
    return f"states/{model}/{statistic}/{chunk}.safetensors"


def encode_cell(cell: CellState) -> bytes:
    """The bytes of a state object; equal states give equal bytes."""
    tensors = {
        f"{site}{SEPARATOR}{name}": value.detach().cpu().contiguous()
        for site, state in cell.states.items()
        for name, value in state.items()
    }
    record = {
        "format": FORMAT,
        "rows": asdict(cell.rows),
        "scores": dict(cell.scores),
        "device": cell.device,
        "checkpoint": cell.checkpoint,
        "primitives": cell.primitives,
        "sites": sorted(cell.states),
        "damage": [list(one) for one in cell.damage[:DAMAGE_KEPT]],
    }
    # an object without any tensor is refused by some readers of the format
    tensors.setdefault(SEPARATOR, torch.zeros(1, dtype=torch.int64))
    return save(tensors, metadata={"cell": json.dumps(record, sort_keys=True)})


def decode_cell(content: bytes, *, key: str = "a state object") -> CellState:
    """Read a state object back, bit for bit; SpoiltObject if it is damaged or of another format."""
    try:
        record = _record(content, key)
        states: dict[str, State] = {site: {} for site in record["sites"]}
        for name, value in load(content).items():
            if name != SEPARATOR:
                site, part = name.rsplit(SEPARATOR, 1)
                states[site][part] = value
        damage = tuple(Damaged(*one) for one in record.get("damage", []))
        rows = Rows(**record["rows"])
        primitives = record["primitives"]
        return CellState(states, rows, record["scores"], record["device"], record["checkpoint"], primitives, damage)
    except SpoiltObject:
        raise
    except Exception as error:  # safetensors raises several kinds
        if is_machines_fault(error):
            raise
        raise damaged(key, error) from error


def checkpoint_of(content: bytes, *, key: str = "a state object") -> str:
    """SHA-256 of the weights that a state object says it was measured on; SpoiltObject as for `decode_cell`."""
    try:
        return str(_record(content, key)["checkpoint"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(key, error) from error


def misfit(state: State, empty: State, *others: State) -> str | None:
    """How a state differs in kind from one of no data at the same site, or None: from that one or another form of it.

    An axis that is 0 there grows with the data.
    """
    reasons = [_misfit(state, form) for form in (empty, *others)]
    return reasons[0] if all(reasons) else None


def _misfit(state: State, empty: State) -> str | None:
    if state.keys() != empty.keys():
        return f"has {', '.join(sorted(state))} where {', '.join(sorted(empty))} belong"
    for name, value in sorted(state.items()):
        expected = empty[name]
        grows = value.dim() == expected.dim() and all(
            seen == there or there == 0 for seen, there in zip(value.shape, expected.shape, strict=True)
        )
        # counts of 32 bits take 64 where they have to
        widened = (expected.dtype, value.dtype) == (torch.int32, torch.int64)
        if not grows or (value.dtype != expected.dtype and not widened):
            return f"has {name} as {value.dtype} {tuple(value.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    return None


def _record(content: bytes, key: str) -> dict[str, Any]:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    record: dict[str, Any] = json.loads(header["__metadata__"]["cell"])
    if record.get("format") != FORMAT:
        raise SpoiltObject(
            f"{key} has format {record.get('format')}, and this version of neuron-census reads {FORMAT}: use the "
            "version that wrote it, or delete it and run again"
        )
    return record


def damaged(key: str, error: Exception) -> SpoiltObject:
    """What is to be said of an object that cannot be read."""
    return SpoiltObject(f"{key} is damaged ({error}); delete it and run again")
