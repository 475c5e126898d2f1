"""One row on a page: its words, its numbers by name, or a picture of it; and its class.

Layer 5: pure; lays out what `row.py` found.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.counted import counted, plural
from pipeline.report.picture import ASCII_LEGEND, COLOUR_LEGEND, picture
from pipeline.report.printing import cell, fitted
from pipeline.row import Shown

# numbers, words and neighbours that are written at most, and channels that are drawn
_NUMBERS, _WORDS, _NEIGHBOURS, _CHANNELS = 40, 200, 10, 3


def row_page(shown: Shown, *, width: int, colour: bool) -> RenderableType:
    """Lay out a row in at most `width` characters."""
    heading = Text(f"row {shown.uid} of {shown.data}/{shown.split}\n", style="bold")
    heading.append("\n".join([shown.where, *_label(shown)]), style="not bold")
    parts: list[RenderableType] = [heading]
    for value in shown.batch.inputs:
        parts.append(Text())
        if shown.is_whole and len(value) != shown.batch.rows:
            parts.append(_neighbours(shown, value))
        elif not value.dtype.is_floating_point:
            parts.append(
                _words(shown, value[shown.place])
                if shown.names.tokens or _is_masked(shown)
                else _categories(shown, value[shown.place])
            )
        else:
            parts += _numbers(shown, value[shown.place].float().numpy(), width, colour)
    return Group(*parts)


def _label(shown: Shown) -> Iterator[str]:
    batch = shown.batch
    if batch.label_N is not None:
        yield f"class {named_class(shown.labels, int(batch.label_N[shown.place]))}"
    if batch.label_NS is not None:
        found = [named_class(shown.labels, int(label)) for label in _real(shown, batch.label_NS[shown.place])]
        yield f"classes of its positions: {_listed(found, _WORDS)}"


def named_class(labels: Sequence[str], label: int) -> str:
    """A class by its number, and by what the data calls it where it does."""
    if label < 0:
        return "unknown"
    return f"{label} ({labels[label]})" if labels else str(label)


def _is_masked(shown: Shown) -> bool:
    return shown.batch.mask_NS is not None and not shown.is_whole


def _real(shown: Shown, value_S: torch.Tensor) -> torch.Tensor:
    """The positions that are no padding, along the last axis."""
    mask_NS = shown.batch.mask_NS
    if mask_NS is None or shown.is_whole or value_S.shape[-1] != mask_NS.shape[1]:
        return value_S
    return value_S[..., mask_NS[shown.place]]


def _listed(words: Sequence[str], most: int, between: str = " ") -> str:
    more = f" … {len(words) - most} more" if len(words) > most else ""
    return between.join(words[:most]) + more


def _words(shown: Shown, token_T: torch.Tensor) -> Text:
    tokens = [shown.names.token(int(token)) for token in _real(shown, token_T)]
    heading = f"{len(tokens)} of at most {len(token_T)} tokens\n"
    if tokens and all(token[:1] in "'\"" for token in tokens):
        # bytes, as Python writes them
        content = "".join(ast.literal_eval(token) for token in tokens).encode("latin-1")
        return Text(f"{heading}{content.decode(errors='backslashreplace')}")
    return Text(f"{heading}{_listed(tokens, _WORDS)}")


def _categories(shown: Shown, value_K: torch.Tensor) -> Text:
    return Text("\n".join(shown.names.value(field, int(number)) for field, number in enumerate(value_K)))


def _neighbours(shown: Shown, edge_2E: torch.Tensor) -> Text:
    source_E, target_E = edge_2E
    lines = []
    for said, ends in (
        ("edges to it from", source_E[target_E == shown.place]),
        ("edges from it to", target_E[source_E == shown.place]),
    ):
        uids = [str(int(uid)) for uid in shown.batch.uid_N[ends]]
        lines.append(f"{said} {_listed(uids, _NEIGHBOURS) or 'no node'}")
    return Text("\n".join(lines))


def _numbers(shown: Shown, value: np.ndarray, width: int, colour: bool) -> Iterator[RenderableType]:
    values = np.asarray(_real(shown, torch.from_numpy(value)))
    finite = values[np.isfinite(values)]
    bounds = (
        f"from {cell(float(finite.min()))} to {cell(float(finite.max()))}" if finite.size else "none of them finite"
    )
    shape = " × ".join(map(str, values.shape))
    yield Text(f"{shape} {'number' if values.size == 1 else plural('number')} as the models are given them, {bounds}")
    if values.ndim == 1:
        yield _by_name(shown, values, width)
        return
    channels = values.reshape(-1, *values.shape[-2:])
    for number, channel in enumerate(channels[:_CHANNELS]):
        if len(channels) > 1:
            yield Text(f"channel {number}")
        yield Text("\n").join(picture(channel, colour=colour, width=width))
    if len(channels) > _CHANNELS:
        yield Text(f"… {counted(len(channels) - _CHANNELS, 'more channel')}", style="dim")
    yield Text(COLOUR_LEGEND if colour else ASCII_LEGEND, style="dim")


def _by_name(shown: Shown, value_D: np.ndarray, width: int) -> RenderableType:
    named = [(shown.names.feature(number), float(value)) for number, value in enumerate(value_D[:_NUMBERS])]
    table = fitted(("column", "value"), named, width=width)
    more = len(value_D) - len(named)
    return Group(table, Text(f"… {more} more", style="dim")) if more else table
