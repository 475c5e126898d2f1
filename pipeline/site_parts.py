"""A site whose states are too large to be merged at once, reduced some units at a time to the same rows.

Layer 3. Beside the rows, what is held is bounded by the states of a few units and by what a statistic makes together;
a statistic that cannot be cut has the site whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from pipeline.contracts import asking_of
from pipeline.declared import refuse_unfit_rows
from pipeline.jackknife import standard_errors
from pipeline.kernels.base import State
from pipeline.merging import Cells, Reading
from pipeline.sites import Site
from pipeline.statistics.base import Controls, Nullable, Statistic, Values
from pipeline.tables import arrow_table
from pipeline.unit_tables import unit_columns

# of the states of one chunk that are judged at once: the jackknife holds some thirty times as much
JUDGED_BYTES = 8 << 20
# of the merged states whose rows are made at once
MADE_BYTES = 32 << 20
# parts begin at a multiple of so many units, for the same bits: the last few of a row of numbers are computed one by
# one, and a library's power or logarithm of one number may be another function than that of several
ABREAST = 16


class _Units(NamedTuple):
    first: int
    stop: int

    def of(self, site: Site) -> Site:
        """The part of the site, or the site itself where these are all of its units."""
        return site if self.stop - self.first == site.units else site.part(self.first, self.stop)

    def runs(self, step: int) -> list[_Units]:
        """These units by so many at a time."""
        return [_Units(first, min(first + step, self.stop)) for first in range(self.first, self.stop, step)]


def tables_in_parts(
    site: Site, reading: Reading, cells: Sequence[Cells], *, keys: Mapping[str, str], controls: Controls, classes: int
) -> Iterator[tuple[str, pa.Table]]:
    """The rows of one site by table, as `arrow_tables` has them, some at a time."""
    columns = unit_columns([one.statistic for one in cells])
    keys = {**keys, "site": site.name}
    neurons: dict[str, Any] = {"unit": torch.arange(site.units)}
    for one in cells:
        if not one.statistic.applies(site):
            reading.merged(one, [])
            continue
        for table, values in _rows(site, reading, replace(one, opened={}), controls, classes):
            if table == "neurons":
                neurons |= values
            else:
                yield table, arrow_table(table, columns[table], {**keys, **values})
    yield "neurons", arrow_table("neurons", columns["neurons"], {**keys, **neurons})


def _rows(
    site: Site, reading: Reading, cells: Cells, controls: Controls, classes: int
) -> Iterator[tuple[str, dict[str, Values]]]:
    """What a statistic says of the units, by table and in order; in `neurons` of all of them, with standard errors."""
    statistic = cells.statistic
    made, judged = _steps(statistic, site, classes)
    neurons: defaultdict[str, list[Values]] = defaultdict(list)
    for units in _Units(0, site.units).runs(made):
        states: list[State] = []
        for few in units.runs(judged):
            part = few.of(site)
            found = reading.merged(cells, [part])
            states.append(found.states[site.name])
            beside = _beside(controls, few)
            errors = standard_errors(statistic, part, found.blocks_of(site), states[-1], beside)
            del found
            for name, error_U in errors.items():
                neurons[name].append(error_U)
        with asking_of(statistic, "columns()", site):
            given = statistic.columns(units.of(site), _gathered(states, judged), _beside(controls, units))
        refuse_unfit_rows(statistic, units.of(site), given)
        tables = dict(given)
        for name, values in tables.pop("neurons", {}).items():
            neurons[name].append(values)
        for table, columns in tables.items():
            numbered = {"unit": columns["unit"] + units.first} if units.first else {}  # type: ignore[operator]
            yield table, {**columns, **numbered}
    yield "neurons", {name: _joined(parts) for name, parts in neurons.items()}


def _steps(statistic: Statistic, site: Site, classes: int) -> tuple[int, int]:
    """How many units have their rows made at once, and how many their standard errors."""
    together = statistic.rows_together(site) if site.groups == 1 else None
    if together is None:
        return site.units, site.units
    of_unit = max(1, statistic.state_bytes(site, classes) // site.units)
    together = together if together > 1 else ABREAST
    return (
        max(1, MADE_BYTES // of_unit // together) * together,
        max(1, JUDGED_BYTES // of_unit // ABREAST) * ABREAST,
    )


def _beside(controls: Controls, units: _Units) -> Controls:
    return Controls(twin=units.of(controls.twin) if controls.twin else None)


def _gathered(states: Sequence[State], first: int) -> State:
    """The state of the units of several, of which the first has so many."""
    if len(states) == 1:
        return states[0]
    return {
        name: torch.cat([state[name] for state in states]) if value.shape[:1] == (first,) else value
        for name, value in states[0].items()
    }


def _joined(parts: Sequence[Values]) -> Values:
    """The values of the units of several."""
    if isinstance(parts[0], Nullable):
        return Nullable(*(torch.cat(values) for values in zip(*parts, strict=True)))
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)  # type: ignore[arg-type]
    return [value for part in parts for value in part]  # type: ignore[return-value]
