"""How sites are chosen by name, kind or gate, and of which share of the rows each is measured on.

Layer 0: knows labels, no sites. A pattern is a glob of the whole name, the kind or the gate; "kind:conv*" is of the
kind alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from pipeline.errors import nearest

LABELS = ("name", "kind", "gate")


def matches(pattern: str, labels: Mapping[str, str]) -> bool:
    """Whether a pattern is of something with these labels: a name, a kind, a gate.

    >>> labels = {"name": "block0.conv", "kind": "conv2d", "gate": "relu"}
    >>> matches("conv*", labels), matches("name:conv*", labels), matches("gate:relu", labels)
    (True, False, True)
    """
    label, colon, rest = pattern.partition(":")
    if colon and label in labels:
        return fnmatchcase(labels[label], rest)
    return any(fnmatchcase(value, pattern) for value in labels.values())


def is_selected(labels: Mapping[str, str], include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Whether something is chosen: by a pattern of `include`, if there is any, and by none of `exclude`."""
    wanted = list(include)
    chosen = not wanted or any(matches(pattern, labels) for pattern in wanted)
    return chosen and not any(matches(pattern, labels) for pattern in exclude)


def row_fraction(labels: Mapping[str, str], fractions: Mapping[str, float]) -> float:
    """The smallest fraction whose pattern matches; 1 where none does."""
    return min([1.0, *(fraction for pattern, fraction in fractions.items() if matches(pattern, labels))])


def refuse_patterns(include: Iterable[str], exclude: Iterable[str], fractions: Mapping[str, float]) -> None:
    """Raise ValueError for a pattern with an unknown label before its colon, or a fraction that is none."""
    for name, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ValueError(f"{name} = {patterns!r}: expected several patterns, [{patterns!r}]")
    for pattern in (*include, *exclude, *fractions):
        label, colon, _ = pattern.partition(":")
        if colon and label not in LABELS:
            raise ValueError(f"{pattern!r}: {label}: is no label of a site; {nearest(label, LABELS)}")
    for pattern, fraction in fractions.items():
        if not 0 < fraction <= 1:
            raise ValueError(f"rows of {pattern!r} = {fraction}: expected a fraction above 0 and at most 1")
