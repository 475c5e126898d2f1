"""The contract of a statistic. One file `statistics/NAME.py` with a constant `STATISTIC` adds one; the laws test it.

Layer 2: pure torch, no I/O, no pyarrow; a statistic imports this file, `kernels`, and what is below, never a sibling.

A statistic is a frozen dataclass: its fields are its parameters, settable in a job under `[statistics.NAME]`, and part
of the identity of every state together with `version`, which is raised whenever its states become others (an edit of
how rows follow from them is another run by itself). `at_least` bounds a parameter, and `expected` refuses any value
that cannot be, there and where the statistic is made. It names the *primitives* it needs of a site; their union over
all statistics is computed in one pass, and the state, merge and encoding follow from them. One that cannot be put as
primitives overrides `empty`, `observe` and `merge` itself, and `forms` and `state_bytes` where its states have other
shapes or sizes than that of no data.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, NamedTuple

import torch

from pipeline.columns import Column
from pipeline.contracts import primitives_of
from pipeline.errors import JobError
from pipeline.hashing import digest
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.reference import observe_all
from pipeline.sites import Presentations, Site
from pipeline.texts import text_of

_EDGES = (
    "2^e·(1 + k/4) of z, in the 14 octaves below the largest |z|; 2^e·(1 + k/8) of a match, from 2⁻¹² to 1; what is "
    "smaller is one bin of each sign"
)
# of the table "histograms", beside "unit", of every statistic that writes one
HISTOGRAM = (
    Column("quantity", "string", "What is counted.", "name", "z, pearson, cosine", table="histograms"),
    Column("bin", "int32", "Number of the bin, the same for the same edges; its sign is that of the values.", "index",
           table="histograms"),
    Column("low", "float64", "Lower edge of the bin.", "quantity", formula=_EDGES, table="histograms"),
    Column("high", "float64", "Upper edge of the bin.", "quantity", formula=_EDGES, table="histograms"),
    Column("count", "int64", "Presentations in the bin; bins without any are left out.", "presentations", "> 0",
           formula="#(low ≤ |value| < high by magnitude; a match of ±1 in the outermost)", table="histograms"),
    Column("fired", "int64", "Presentations in the bin at which the unit fires.", "presentations", "[0, count]",
           "null where the gate is no nonlinearity", "#(z > 0 in the bin)", table="histograms"),
)  # fmt: skip


class Nullable(NamedTuple):
    """Values of which some are null (not computed): `valid` is bool of the same length. NaN means undefined."""

    values: torch.Tensor
    valid: torch.Tensor


Values = torch.Tensor | Nullable | list[str] | list[torch.Tensor]
# table → column → values. "neurons" has one value per unit, in order; other tables have a column "unit".
Rows = Mapping[str, Mapping[str, Values]]


@dataclass(frozen=True, eq=False)
class Controls:
    """What stands beside a number: `twin` is the same site of the untrained twin, None where there is none."""

    twin: Site | None = None


# of a parameter that counts something: beyond it nothing is held
LARGEST = 2**40


def at_least(minimum: int, default: int | None) -> Any:
    """A field of a statistic for a whole number, not below `minimum`; None stands for no number where it is allowed."""
    return dataclasses.field(default=default, metadata={"minimum": minimum})


@dataclass(frozen=True)
class Statistic(ABC):
    """Base of every statistic; concrete ones are `@dataclass(frozen=True)` whose fields are the parameters.

    sample_rows   the fixed hash sample of rows that it is computed on: about this many; 0 or none: all rows
    sample_shift  resolved from sample_rows by the plan: rows whose 63-bit hash is below 2^(63 − sample_shift) are kept
    """

    name: ClassVar[str]
    version: ClassVar[int]
    COLUMNS: ClassVar[tuple[Column, ...]]
    # presentations come with `gradient_LSU`, from a backward pass of their own, where the batch has a loss
    needs_gradients: ClassVar[bool] = False
    sample_rows: int | None = at_least(0, None)
    sample_shift: int = at_least(0, 0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and (expected := self.expected(field.name, value)):
                raise JobError(f"statistics.{self.name}.{field.name} = {value!r}: expected {expected}")
        if self.sample_rows == 0:
            # None has no spelling in TOML: what means the same has one identity
            object.__setattr__(self, "sample_rows", None)

    @classmethod
    def expected(cls, parameter: str, value: Any) -> str | None:
        """What a parameter must be, in words, where this value cannot be; None where it can."""
        # a subclass that gives a field another default says nothing of its minimum
        declared = [base.__dict__.get("__dataclass_fields__", {}).get(parameter) for base in cls.__mro__]
        minima = [field.metadata["minimum"] for field in declared if field and "minimum" in field.metadata]
        if not minima or (type(value) is int and minima[0] <= value <= LARGEST):
            return None
        return f"an integer, {minima[0]} or more" + (f", at most {LARGEST}" if type(value) is int and value > 0 else "")

    def unfit(self, classes: int) -> Mapping[str, str]:
        """Parameters that cannot be for data of so many classes (0: without labels), and in words what they must be."""
        return {}

    def applies(self, site: Site) -> bool:
        """Whether the statistic is defined at this site at all; where not, its columns are null."""
        return True

    @abstractmethod
    def primitives(self, site: Site) -> Mapping[str, Primitive]:
        """The primitives needed of a site, by the name under which they stand in the state."""

    @abstractmethod
    def columns(self, site: Site, state: State, controls: Controls) -> Rows:
        """The rows of the tables that one site's merged state gives."""

    def estimates(self, site: Site, state: State, controls: Controls) -> Mapping[str, Values]:
        """The columns of "neurons" with a standard error, as `columns` gives them; costly others may be left out."""
        return self.columns(site, state, controls).get("neurons", {})

    def rows_together(self, site: Site) -> int | None:
        """How many units in a row have their `columns` made together, for a site too wide to be reduced at once.

        Of a number, any of its multiples may be made by themselves, as the `part` of the site that those units are:
        every tensor of the state has a row for each unit or is of all of them, merging and the numbers with a standard
        error are a unit's own (these are made of fewer units at a time), and the rows of every table are in order of
        units, or the number is all. None: units depend on each other's states, and the site is reduced at once.
        """
        return None

    @abstractmethod
    def define(self, site: Site, whole: Presentations, controls: Controls) -> Rows:
        """The same rows by their definition, from all presentations at once in float64: the oracle of the laws."""

    def empty(self, site: Site) -> State:
        """The state of no data."""
        return joined({name: primitive.empty(site) for name, primitive in self.primitives(site).items()})

    def forms(self, site: Site) -> tuple[State, ...]:
        """States of no data in each shape that values may bring a state to, `empty` first; an axis of 0 may grow."""
        if observes_itself(self):
            return (self.empty(site),)
        each = {name: primitive.forms(site) for name, primitive in self.primitives(site).items()}
        return tuple(joined(dict(zip(each, forms, strict=True))) for forms in product(*each.values()))

    def observe(self, presentations: Presentations) -> State:
        """The state of one batch by the reference kernel."""
        needed = self.primitives(presentations.site)
        return joined(dict(zip(needed, observe_all(list(needed.values()), presentations), strict=True)))

    def merge(self, site: Site, left: State, right: State) -> State:
        """The state of both; neither argument is changed."""
        return joined(
            {
                name: primitive.merge(part(left, name), part(right, name))
                for name, primitive in self.primitives(site).items()
            }
        )

    def state_bytes(self, site: Site, classes: int = 0) -> int:
        """Bytes of the state of one site, for data whose labels have this many classes."""
        if observes_itself(self):
            return sum(value.nbytes for value in shapes_of(self, site).values())
        return sum(primitive.state_bytes(site) for primitive in self.primitives(site).values())

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that change the result."""
        return dataclasses.asdict(self)

    @property
    def identity(self) -> str:
        """`name-digest` of name, version and parameters: equal identities mean equal states of equal presentations."""
        return f"{self.name}-{digest([self.name, self.version, self.parameters], length=12)}"


def observes_itself(statistic: Statistic) -> bool:
    """Whether a statistic makes its state of presentations by itself, not from primitives."""
    return type(statistic).observe is not Statistic.observe


def is_own(statistic: Statistic, primitives: Iterable[Primitive]) -> bool:
    """Whether a statistic makes its state in its own file: from presentations, or by primitives of its own."""
    return observes_itself(statistic) or any(type(one).__module__ == type(statistic).__module__ for one in primitives)


def shapes_of(statistic: Statistic, site: Site) -> State:
    """The state of no data, which is not made if it can be had without its numbers."""
    try:
        with torch.device("meta"):
            return statistic.empty(site)
    except (RuntimeError, TypeError):
        # it asks for numbers, or takes them to NumPy, which tensors without any refuse
        return statistic.empty(site)


def primitives_digest(statistic: Statistic, sites: Iterable[Site]) -> str:
    """Name the primitives, with their parameters, that a statistic needs of those of the sites at which it applies.

    ContractError where one is not compared by value, TypeError where a parameter of it is nothing that JSON has.
    """
    needed: dict[str, Any] = {}
    own = observes_itself(statistic)
    for site in sites:
        if statistic.applies(site):
            primitives = primitives_of(statistic, site)
            own |= is_own(statistic, primitives.values())
            needed[site.name] = {
                name: [type(one).__qualname__, dataclasses.asdict(one)]  # type: ignore[call-overload]
                for name, one in primitives.items()
            }
    # what a statistic makes of presentations in its own file changes with any word of it
    return digest([needed, text_of(type(statistic).__module__) if own else ""], length=12)


def joined(parts: Mapping[str, State]) -> State:
    """The state of a statistic from those of its primitives."""
    return {f"{name}.{key}": value for name, state in parts.items() for key, value in state.items()}


def part(state: State, name: str) -> State:
    """The state of the primitive that stands as `name` in a statistic's state."""
    prefix = f"{name}."
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
