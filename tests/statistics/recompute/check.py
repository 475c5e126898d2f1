"""All columns of all tables of units at one site, and that none of `neurons` is forgotten."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from tests.statistics.recompute.composition import check_composition
from tests.statistics.recompute.exemplars import check_exemplars
from tests.statistics.recompute.importance import check_importance
from tests.statistics.recompute.labels import check_labels
from tests.statistics.recompute.match import check_match
from tests.statistics.recompute.raw import Raw, Unit
from tests.statistics.recompute.redundancy import check_redundancy
from tests.statistics.recompute.response import check_response, check_z_bins
from tests.statistics.recompute.template import check_template
from tests.statistics.recompute.weights import check_weights

OF_UNITS = {"neurons", "histograms", "exemplars", "classes", "patterns", "edges"}


def check(raw: Raw, tables: Mapping[str, pa.Table], site: str) -> None:
    """Compare one site's rows of every table with what follows from its raw arrays; every column must be compared."""
    own = {name: table.filter(pc.equal(table["site"], site)) for name, table in tables.items() if name in OF_UNITS}
    # rows as they are, where null and NaN differ; frames for the rest
    neurons, patterns = (own[name].sort_by("unit").to_pylist() for name in ("neurons", "patterns"))
    frames = {name: table.to_pandas() for name, table in own.items() if name not in ("neurons", "patterns")}
    assert [row["unit"] for row in neurons] == list(range(len(raw.w)))
    units = [Unit(raw, unit, row) for unit, row in enumerate(neurons)]
    for one, pattern in zip(units, patterns, strict=True):
        check_response(one)
        check_z_bins(one, frames["histograms"])
        check_match(one, frames["histograms"])
        check_template(one, pattern)
        check_exemplars(one, frames["exemplars"])
        check_labels(one, frames.get("classes"))
        check_weights(one)
        check_importance(one)
        check_composition(one, frames.get("edges"))
    check_redundancy(units)
    for one in units:
        assert not one.left, f"not compared: {sorted(one.left)}"
