"""Where in a TOML file a key stands, so that a message can say the line.

Layer 1: imports nothing of the pipeline. The standard parser tells values only, so lines are found by reading headers
and keys once more; what is not found (a key in an inline table) has the line of what holds it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


@dataclass(frozen=True)
class Places:
    """The name of a file, and the line of every key that was found in it ("models[0].training.steps")."""

    file: str
    lines: Mapping[str, int] = field(default_factory=dict)

    def at(self, key: str) -> str:
        """`file:line` of a key, or of the nearest thing that holds it."""
        while key and key not in self.lines:
            # whatever stands in it, there is less of it every time
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        file = self.file or "job"
        return f"{file}:{self.lines[key]}" if key else file


def find_places(file: str, text: str) -> Places:
    """Find the line of every table and key of a TOML text.

    >>> find_places("a.toml", "x = 1\\n[[m]]\\n[[m]]\\ny.z = 2").at("m[1].y.z")
    'a.toml:4'
    """
    lines: dict[str, int] = {}
    arrays: Counter[str] = Counter()
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            section = _plain(header[2])
            if header[1] == "[[":
                arrays[section] += 1
            section = _indexed(section, arrays)
            lines.setdefault(section, number)
        elif key := _KEY.match(line):
            lines.setdefault(f"{section}.{_plain(key[1])}" if section else _plain(key[1]), number)
    return Places(file, lines)


def _plain(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))


def _indexed(section: str, arrays: Mapping[str, int]) -> str:
    """The path of a table with the number of each array of tables on its way."""
    path = plain = ""
    for part in section.split("."):
        plain = f"{plain}.{part}" if plain else part
        path = f"{path}.{part}" if path else part
        if plain in arrays:
            path += f"[{arrays[plain] - 1}]"
    return path
