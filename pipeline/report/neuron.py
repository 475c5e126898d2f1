"""One neuron on a page: what it looks for as pictures or terms, its numbers beside its controls', its exemplars.

Layer 5: pure; lays out what `show.py` found. Every number stands beside what it is without training and by chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.counted import counted
from pipeline.registry import statistics
from pipeline.report.pattern import pattern_picture
from pipeline.report.printing import cell, fitted
from pipeline.report.row import named_class
from pipeline.report.words import in_words
from pipeline.show import Listing, Neuron, Row

# at most so many exemplars of a kind, and classes
_EXEMPLARS = {"greatest": 5}
_OTHER_EXEMPLARS = 3
_CLASSES = 5
# and so many other models of its name
_NAMESAKES = 3


class _Line(NamedTuple):
    """A number of a neuron: how it is called, its column, and the columns that say what chance gives."""

    label: str
    column: str
    chance: tuple[tuple[str, str], ...] = ()


_OTHERS, _PERMUTED = ("other units", "template_cos_other_mean"), ("w permuted", "template_cos_permuted_mean")
_GROUPS: dict[str, tuple[_Line, ...]] = {
    "pattern": (
        _Line("cos(Cov(a,x), w)", "template_cos", (_OTHERS, _PERMUTED)),
        _Line("  whitened", "template_cos_whitened"),
        _Line("cos(STA, w)", "template_cos_sta"),
    ),
    "match of x and w": (
        _Line("Pearson, mean", "pearson_mean"),
        _Line("  when it fires", "pearson_firing_mean"),
        _Line("  when silent", "pearson_silent_mean"),
        _Line("  AUROC for firing", "pearson_auroc"),
        _Line("  half fire above", "pearson_half"),
    ),
    "response": (
        _Line("fires at", "fire_rate"),
        _Line("  in rows", "row_fire_rate"),
        _Line("z, mean", "z_mean"),
        _Line("  standard deviation", "z_std"),
        _Line("  5 % quantile", "z_q05"),
        _Line("  95 % quantile", "z_q95"),
        _Line("a, mean", "a_mean"),
    ),
    "classes": (
        _Line("best class", "best_class", (("label′", "best_class_null"),)),
        _Line("  precision", "best_class_precision", (("label′", "best_class_precision_null"),)),
        _Line("  recall", "best_class_recall", (("label′", "best_class_recall_null"),)),
        _Line("  IoU", "best_class_iou", (("label′", "best_class_iou_null"),)),
        _Line("selectivity", "class_selectivity", (("label′", "class_selectivity_null"),)),
        _Line("information, nats", "class_information", (("label′", "class_information_null"),)),
    ),
    "made of": (
        _Line("‖w‖", "weight_norm"),
        _Line("b", "bias"),
        _Line("effective fan-in", "effective_fan_in"),
        _Line("nearest other unit", "neighbour_unit"),
        _Line("  cosine", "neighbour_cos"),
        _Line("cosine to untrained", "twin_cos"),
    ),
}


def page(found: Neuron | Listing, *, width: int, colour: bool) -> RenderableType:
    """Lay out a neuron, or what can be named next, in at most `width` characters."""
    if isinstance(found, Listing):
        title = Text("\n").join([Text(found.title, style="bold"), *_elsewhere(found)])
        return Group(title, Text(), fitted(found.columns, found.rows, width=width))
    parts: list[RenderableType] = [_heading(found), Text()]
    if found.pattern:
        parts += [pattern_picture(found.site, found.pattern, width=width, colour=colour), Text()]
    if words := in_words(found.site, found.pattern, found.meanings):
        parts += [words, Text()]
    if numbers := _numbers(found):
        parts.append(numbers)
    if found.exemplars:
        parts += [Text(), Text("exemplars", style="bold"), _exemplars(found.exemplars, width), _how_to_see(found)]
    if found.classes:
        parts += [Text(), Text("classes it fires for", style="bold"), _classes(found, width)]
    return Group(*parts)


def _heading(neuron: Neuron) -> Text:
    model, site, numbers = neuron.model, neuron.site, neuron.numbers
    shape = " × ".join(map(str, site["input_shape"] or ()))
    lines = [
        f"{site['kind']}, gate {site['gate']}, unit {numbers['unit']} of {site['units']}, {site['fan_in']} inputs: "
        f"{site['input_kind']} {shape}",
        f"{model['family'] or 'program'}, {_history(model)}; model {model['model']}",
        f"measured on {numbers['data']}/{numbers['split']} by run {numbers['run']}",
    ]
    dead = [Text("dead: it fired for none of these rows")] if numbers.get("dead") else []
    title = Text(f"{model['name']} / {site['site']} / {numbers['unit']}", style="bold")
    return Text("\n").join([title, *map(Text, lines), *_elsewhere(neuron), *dead])


def _elsewhere(found: Neuron | Listing) -> Iterator[Text]:
    """What else there is of the same name, of the same model and of others."""
    if found.also_measured_on:
        yield Text(f"also measured on {', '.join(found.also_measured_on)} (--split, --data)")
    if others := found.namesakes:
        named = ", ".join(map(_namesake, others[:_NAMESAKES]))
        more = f", … {len(others) - _NAMESAKES} more" if len(others) > _NAMESAKES else ""
        many = "another model" if len({one["model"] for one in others}) == 1 else "other models"
        yield Text(f"{many} of this name: {named}{more}", style="dim")


def _namesake(model: Row) -> str:
    failed = "" if model["status"] == "ok" else ", failed"
    return f"{_short_id(model)} on {model['data']} (run {model['run']}{failed})"


def _short_id(model: Row) -> str:
    return str(model["model"])[:8]


def _history(model: Row) -> str:
    # runs of earlier versions have no such column
    if origin := model.get("loaded_from"):
        return f"loaded from {origin}"
    return f"seed {model['seed']}, {counted(model['step'], 'step')}"


def _numbers(neuron: Neuron) -> RenderableType | None:
    """The numbers that were measured, if any, by group: the unit's, its untrained twin's, and by chance."""
    numbers, twin = neuron.numbers, neuron.twin or {}
    measured = {
        group: [line for line in lines if numbers.get(line.column) is not None] for group, lines in _groups().items()
    }
    if not any(measured.values()):
        return None
    with_errors = any(numbers.get(f"{line.column}_se") is not None for lines in measured.values() for line in lines)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in ("this unit", *(["± se"] if with_errors else []), "untrained"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("by chance", no_wrap=True)
    for group, lines in measured.items():
        if lines:
            table.add_row(Text(group, style="bold"))
        for line in lines:
            error = numbers.get(f"{line.column}_se")
            errors = [f"{error:.2g}" if error is not None else ""] if with_errors else []
            untrained = cell(twin.get(line.column)) if twin else ""
            first, *others = _chance(line, numbers)
            table.add_row(f"  {line.label}", cell(numbers[line.column]), *errors, untrained, first)
            for other in others:
                table.add_row(*[""] * (3 + with_errors), other)
    return table


def _groups() -> dict[str, tuple[_Line, ...]]:
    """The groups, and one by the names of its columns for every statistic that has no line in them."""
    shown = {line.column for lines in _GROUPS.values() for line in lines}
    columns = {
        name: [column.name for column in statistic.COLUMNS if column.table == "neurons"]
        for name, statistic in statistics().items()
    }
    others = {name: tuple(_Line(one, one) for one in named) for name, named in columns.items() if not shown & {*named}}
    return _GROUPS | others


def _chance(line: _Line, numbers: Row) -> list[str]:
    known = [(label, numbers[column]) for label, column in line.chance if numbers.get(column) is not None]
    return [f"{cell(value)} {label}" for label, value in known] or [""]


def _exemplars(rows: Sequence[Row], width: int) -> RenderableType:
    shown = [row for row in rows if row["rank"] < _EXEMPLARS.get(row["kind"], _OTHER_EXEMPLARS)]
    shown.sort(key=lambda row: row["kind"] != "greatest")
    wanted = ("kind", "rank", "uid", "file", "row", "position", "z", "a", "pearson", "cosine", "match", "label")
    columns = [column for column in wanted if any(row.get(column) is not None for row in shown)]
    return fitted(columns, [[_short(column, row.get(column)) for column in columns] for row in shown], width=width)


def _how_to_see(neuron: Neuron) -> Text:
    """The command that prints one of these rows."""
    numbers = neuron.numbers
    model = _short_id(neuron.model) if neuron.namesakes else neuron.model["name"]
    address = f"{model}/{neuron.site['site']}/{numbers['unit']}"
    chosen = f" --data {numbers['data']} --split {numbers['split']}" if neuron.also_measured_on else ""
    return Text(f"a row: neuron-census show {address}{chosen} --row {neuron.exemplars[0]['uid']}", style="dim")


def _short(column: str, value: Any) -> Any:
    return value.rsplit("/", 1)[-1] if column == "file" and isinstance(value, str) else value


def _classes(neuron: Neuron, width: int) -> RenderableType:
    rows = [row for row in neuron.classes if row.get("fired") is not None]
    rates = [(row["fired"] / row["n"] if row["n"] else float("nan"), row) for row in rows]
    best = sorted(rates, key=lambda one: -one[0])[:_CLASSES]
    called = {row["class"]: named_class(neuron.labels, row["class"]) if neuron.labels else row["class"] for row in rows}
    columns = ("class", "rows", "fires in", "share")
    return fitted(columns, [(called[row["class"]], row["n"], row["fired"], rate) for rate, row in best], width=width)
