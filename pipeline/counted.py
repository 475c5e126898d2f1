"""How many of something, in words.

Layer 0: pure.
"""

from __future__ import annotations

import re


def counted(count: int, noun: str) -> str:
    """A number of things, of which the singular is given.

    >>> counted(1, "chunk"), counted(0, "class"), counted(2, "entry"), counted(3, "key"), counted(4, "batch")
    ('1 chunk', '0 classes', '2 entries', '3 keys', '4 batches')
    """
    return f"{count} {noun if count == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """More than one of what a regular noun names."""
    if re.search("(s|x|ch|sh)$", noun):
        return f"{noun}es"
    return re.sub("([^aeiou])y$", r"\1ie", noun) + "s"
