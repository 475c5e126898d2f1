"""What people call the numbers of a data set's rows, so that a pattern over them can be read.

Layer 0: pure.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """Names as the data gives them; what has none goes by its number.

    features  of the columns of numbers, of the numbers of an array, of a node's features, of a series' channels
    fields    of the columns of categories
    values    of each of these, the values by their number
    tokens    of every token by its number
    """

    features: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    values: tuple[tuple[str, ...], ...] = ()
    tokens: tuple[str, ...] = ()

    def feature(self, number: int, otherwise: str = "feature") -> str:
        """The name of a number of a row.

        >>> Names(features=("age", "height")).feature(1), Names().feature(1, "channel")
        ('height', 'channel 1')
        """
        return _named(self.features, number, otherwise)

    def field(self, number: int) -> str:
        """The name of a column of categories."""
        return _named(self.fields, number, "category")

    def value(self, field: int, number: int) -> str:
        """A category as its column and value.

        >>> Names(fields=("colour",), values=(("unknown", "red"),)).value(0, 1), Names().value(2, 5)
        ('colour = red', 'category 2 = 5')
        """
        known = self.values[field] if field < len(self.values) else ()
        return f"{self.field(field)} = {known[number] if number < len(known) else number}"

    def token(self, number: int) -> str:
        """A token as it is written."""
        return _named(self.tokens, number, "token")


def _named(known: tuple[str, ...], number: int, otherwise: str) -> str:
    return known[number] if number < len(known) else f"{otherwise} {number}"


UNNAMED = Names()
