"""What a model's sites look for, in the words of its data: names of their inputs, and what stands out to each unit.

Layer 3. Changes no state and no key: it is read off the model and the data's names when its tables are written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa
import torch

from pipeline.base_columns import BASE
from pipeline.flow.discover import Discovery
from pipeline.loading import Loaded, Probe
from pipeline.models.base import Appearances
from pipeline.names import Names
from pipeline.origins import appearances_of, inputs_of
from pipeline.registry import sources
from pipeline.run_models import Model
from pipeline.sites import InputSpace, Site
from pipeline.store import Store
from pipeline.tables import arrow_table

# things that stand out to a unit most, of either sign
KEPT = 6
# beyond this many inputs the names of one site take more memory than its patterns
NAMED_INPUTS = 10_000


def names_of(probe: Probe, store: Store) -> Names:
    """What the data calls the numbers of its rows."""
    return sources()[probe.spec.source](probe.data, probe.spec, store).names  # type: ignore[no-any-return]


def described(found: Discovery, model: Model, names: Names) -> Discovery:
    """The sites with what their inputs are called: by the family, or else by the units that they are."""
    spaces = inputs_of(model.origin, names)
    return replace(found, sites=tuple(replace(site, inputs=_space(site, spaces)) for site in found.sites))


def _space(site: Site, spaces: Mapping[str, InputSpace]) -> InputSpace:
    """What the data flow shows, and what the family says where that is nothing."""
    seen, said = site.inputs, spaces.get(site.path)
    if said is None or torch.Size(said.shape).numel() != site.fan_in:
        return replace(seen, names=seen.names or _units(site))
    kind = said.kind if seen.kind == "features" else seen.kind
    return replace(seen, kind=kind, names=seen.names or said.names or _units(site))


def _units(site: Site) -> tuple[str, ...]:
    upstream, units = site.inputs.upstream, site.inputs.upstream_unit
    if len(units) != site.fan_in or site.fan_in > NAMED_INPUTS:
        return ()
    met: Counter[tuple[int, int]] = Counter()
    found = []
    repeats = len(set(units)) < len(units)
    for index, unit in units:
        place = f", place {met[index, unit]}" if repeats else ""
        found.append(f"{upstream[index]} {unit}{place}")
        met[index, unit] += 1
    return tuple(found)


def meanings(loaded: Loaded, model: Model, names: Names, *, run: str) -> pa.Table:
    """The table `meanings` of one model: for each unit the things whose appearance gives it most, and least."""
    shown = appearances_of(model.origin, loaded.module, names)
    keys = {"run": run, "model": model.id, "data": model.data}
    parts = [
        arrow_table("meanings", BASE["meanings"], {**keys, "site": site.name, **_standing_out(site, shown[site.path])})
        for site in loaded.discovery.sites
        if site.path in shown and shown[site.path].x_TD.shape[1] == site.fan_in
    ]
    return pa.concat_tables(parts) if parts else arrow_table("meanings", BASE["meanings"], {})


def _standing_out(site: Site, shown: Appearances) -> dict[str, list[object]]:
    z_UT = site.pattern_UD @ shown.x_TD.double().mT
    kept = min(KEPT, z_UT.shape[1])
    rows: dict[str, list[object]] = {name: [] for name in ("unit", "kind", "rank", "input", "value")}
    for kind, is_greatest in (("greatest", True), ("smallest", False)):
        value_UK, thing_UK = z_UT.topk(kept, dim=1, largest=is_greatest)
        for unit, (values, things) in enumerate(zip(value_UK.tolist(), thing_UK.tolist(), strict=True)):
            rows["unit"] += [unit] * kept
            rows["kind"] += [kind] * kept
            rows["rank"] += range(kept)
            rows["input"] += [shown.names[thing] for thing in things]
            rows["value"] += values
    return rows
