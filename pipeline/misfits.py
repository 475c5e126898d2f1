"""What is said of mistakes in a job file: one line for each, with its place, its value and what was expected.

Layer 1. Knows pydantic's errors and no section of a job: which of them a key belongs to is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import nearest
from pipeline.places import Places

# the section of a job at a key
SectionAt = Callable[[list[int | str]], type[BaseModel]]


def dotted(parts: Iterable[int | str]) -> str:
    """The parts of a key as one, as messages write it.

    >>> dotted(("models", 0, "training", "steps"))
    'models[0].training.steps'
    """
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def problems(places: Places, raw: Any, errors: ValidationError, section_at: SectionAt) -> list[str]:
    """One line for each key that is wrong; a value that fits no branch of a union is one, with all that would fit."""
    lines: list[str] = []
    expected: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for error in found(errors):
        parts = real_parts(raw, error["loc"])
        if error["type"] in ("extra_forbidden", "missing", "value_error"):
            lines.append(_structural(places, parts, error, section_at))
        else:
            said = in_words(error["msg"]) + _meaning(parts, error, section_at)
            expected.setdefault(dotted(parts), []).append(said)
            values[dotted(parts)] = error["input"]
    return lines + [misfit_at(places, key, values[key], " or ".join(wanted)) for key, wanted in expected.items()]


def found(errors: ValidationError) -> list[ErrorDetails]:
    """What is wrong, without arrays that are too short only because an element that is wrong is not counted."""
    every = errors.errors()
    inside = {error["loc"][:depth] for error in every for depth in range(len(error["loc"]))}
    return [error for error in every if error["type"] != "too_short" or error["loc"] not in inside]


def misfit_at(places: Places, key: str, value: Any, expected: str) -> str:
    """The line for a value at a key that is not as `expected`."""
    section, _, last = key.rpartition(".")
    return f"{places.at(key)}: {section_of(section)}{last} = {shown(value)}: expected {expected}"


def section_of(path: str) -> str:
    """A section as it stands in the file, in front of what is said of it."""
    return f"[{path}] " if path else ""


_TOML_WORDS = {
    "a valid string": "a string",
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid tuple": "an array",
    "a valid dictionary": "a table",
}


def in_words(message: str) -> str:
    """What pydantic expected, in the words of a job file."""
    wanted = re.sub("^(Input should be|(String|Tuple|Dictionary) should have) ", "", message)
    wanted = re.sub(r"^(at least|at most) (\d+) items? after validation, not \d+$", r"\1 \2", wanted)
    wanted = re.sub("^(a valid dictionary) or instance of .*", r"\1", wanted)
    return _TOML_WORDS.get(wanted, wanted)


def _meaning(parts: list[int | str], error: ErrorDetails, section_at: SectionAt) -> str:
    """What the field of a section means, where an array or a table was expected: that word alone says too little."""
    field = section_at(parts[:-1]).model_fields.get(str(parts[-1])) if parts else None
    told = field is not None and field.description and error["type"] in ("tuple_type", "dict_type")
    return f" ({field.description})" if field is not None and told else ""


def _structural(places: Places, parts: list[int | str], error: ErrorDetails, section_at: SectionAt) -> str:
    """What to say of an unknown key, a missing one, or a rule that several keys break together."""
    key = dotted(parts)
    if error["type"] == "extra_forbidden":
        *parents, last = parts
        known = nearest(str(last), section_at(parents).model_fields)
        return f"{places.at(key)}: {section_of(dotted(parents))}{last} = {shown(error['input'])}: unknown key; {known}"
    if error["type"] == "missing":
        missing = str(error["loc"][-1])
        meaning = section_at(parts).model_fields[missing].description or "…"
        return f"{places.at(key)}: {section_of(key)}{missing} is missing: expected {missing} = … ({meaning})"
    return f"{places.at(key)}: {section_of(key)}{error['msg'].removeprefix('Value error, ')}"


def real_parts(raw: Any, location: Iterable[int | str]) -> list[int | str]:
    """As much of an error's location as exists in the file: pydantic appends the branch of a union."""
    parts: list[int | str] = []
    for part in location:
        inside = part in raw if isinstance(raw, dict) else isinstance(raw, tuple) and isinstance(part, int)
        if not inside:
            break
        raw = raw[part]
        parts.append(part)
    return parts


def shown(value: Any) -> str:
    """A value as it would stand in the file, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
