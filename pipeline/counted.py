"""How many of something, in words.

Layer 0: pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def counted(count: int, noun: str) -> str:
    """A number of things, of which the singular is given.

    >>> counted(1, "chunk"), counted(0, "class"), counted(2, "entry"), counted(3, "key"), counted(4, "batch")
    ('1 chunk', '0 classes', '2 entries', '3 keys', '4 batches')
    """
    return f"{count} {noun if count == 1 else plural(noun)}"


def few(names: Sequence[str], noun: str) -> str:
    """Names of what a singular says, the first three of more than four.

    >>> few(["a", "b"], "model"), few(["a", "b", "c", "d", "e", "f"], "model")
    ('a, b', 'a, b, c and 3 models more')
    """
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {counted(len(names) - 3, noun)} more"


def plural(noun: str) -> str:
    """More than one of what a regular noun names."""
    if re.search("(s|x|ch|sh)$", noun):
        return f"{noun}es"
    return re.sub("([^aeiou])y$", r"\1ie", noun) + "s"
