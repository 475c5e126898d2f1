"""Finds every site of a model on a probe batch: follows the data, folds, names, and checks each against the model.

Layer 1. Nothing is found by module class or by name; names only name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from pipeline.batch import Batch
from pipeline.errors import DataError, ModelError
from pipeline.flow.apart import Rowwise, cut, same
from pipeline.flow.check import Checking
from pipeline.flow.found import Trust
from pipeline.flow.holdings import plain_tensors
from pipeline.flow.plan import Discovery
from pipeline.flow.reading import Choice, Reading
from pipeline.flow.record import Recorder
from pipeline.flow.state import draw, unchanged, undrawn
from pipeline.flow.tap import evaluate, quiet, tapped_forward
from pipeline.flow.trace import copied, has_own_functions, input_leaves, mark_state

__all__ = ["Discovery", "discover", "refuse_no_choice"]


def discover(
    model: nn.Module,
    batch: Batch,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rows: Mapping[str, float] = MappingProxyType({}),
    may_draw: bool = True,
) -> Discovery:
    """Find the sites of a model by following a probe batch; puts the model in eval mode.

    `include` and `exclude` are glob patterns on a site's name, kind or gate (see `selecting`); without `include` all
    are included. `rows` gives the fraction of the rows on which the sites of a pattern are measured. Random generators
    are left as they were; unless the model `may_draw`, what it returns must be the same whatever comes from them.
    Every site's w·x + b is compared with the model's own pre-activation: what cannot be reproduced is no site but
    `unread`, with the reason. Raises ModelError where the model cannot run on the batch, changes its buffers in eval
    mode, returns other numbers for the same batch a second time, or is TorchScript.
    """
    _refuse_scripts(model)
    _refuse_unmade(model)
    evaluate(model)
    keeps_state = _find_state(model, batch)
    held = plain_tensors(model).keys()
    with unchanged(model) as before:
        with undrawn():
            recorder = _record(model, batch)
        if not keeps_state and (left := before.changed()) is not None:
            keeps_state = _depends_on_state(model, batch, recorder.returned, held, left)
    trust: dict[str, Trust] = {}
    while True:
        with undrawn():
            reading = Reading(model, recorder, Choice(include, exclude, rows), trust)
            found = reading.discovery()
        with unchanged(model):
            if not may_draw:
                draw()
            checked = _checked(model, found, copied(batch) if found.writes_inputs else batch)
        _refuse_others(recorder.returned, checked.returned)
        _refuse_own_functions(model, batch, recorder.returned)
        if not checked.failed:
            apart = not keeps_state and _runs_apart(model, found, batch, checked.row)
            return replace(_with_errors(found, checked), apart=apart)
        for name, reason in checked.failed.items():
            trust[reading.place_of(name)] = trust.get(reading.place_of(name), Trust()).less(reason)


def refuse_no_choice(found: Discovery, include: Sequence[str], exclude: Sequence[str]) -> None:
    """ModelError where patterns that leave some sites out have left none."""
    if not found.sites and (exclude or any(pattern != "*" for pattern in include)):
        raise ModelError(f"no site of the model is chosen by include={list(include)}, exclude={list(exclude)}")


def _refuse_scripts(model: nn.Module) -> None:
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ModelError(
            "a TorchScript program cannot be read (and loading one runs code from the file): give the nn.Module with "
            "its weights as safetensors or a state_dict, or a torch.export program's .module()"
        )


def _refuse_unmade(model: nn.Module) -> None:
    lazy = [name for name, held in chain(model.named_parameters(), model.named_buffers()) if is_lazy(held)]
    if lazy:
        raise ModelError(f"parameter {lazy[0]} has no shape yet: run the lazy model once, or load its weights, before")


def _find_state(model: nn.Module, batch: Batch) -> bool:
    """Mark the tensors that a forward replaces on its modules, if there are any: later forwards find data there."""
    held = plain_tensors(model)
    if not held:
        return False
    with unchanged(model):
        _record(model, batch)
        after = plain_tensors(model)
    replaced = [tensor for place, tensor in held.items() if after.get(place) is not tensor]
    for tensor in replaced:
        mark_state(tensor)
    return bool(replaced)


def _depends_on_state(model: nn.Module, batch: Batch, returned: Any, held: Set[tuple[str, str]], left: str) -> bool:
    """Whether tensors that a forward left on its modules, beside those `held`, change what the next one returns.

    ModelError where anything else that it `left` does.
    """
    has_new = bool(plain_tensors(model).keys() - held)
    with undrawn():
        again = _record(model, batch)
    if _are_same(returned, again.returned):
        return False
    if not has_new:
        raise ModelError(
            f"the same batch gives other numbers in a second forward: the first one changes {left} on the model, and "
            "what is measured must follow from the batch"
        )
    return True


def _runs_apart(model: nn.Module, found: Discovery, batch: Batch, seen: Rowwise) -> bool:
    """Whether the model makes the same of a row by itself as it made of it in the batch."""
    alone = cut(batch, seen.keep_N, found.leaf_axes) if batch.rows > 1 else None
    if alone is None:
        return False
    shown = Rowwise(torch.ones(1, dtype=torch.bool))
    try:
        with unchanged(model):
            shown.note_output(tapped_forward(model, found, alone, shown.note))
    except (DataError, ModelError):
        # of a graph with as many edges as nodes what was cut out is none
        return False
    return seen.equals(shown)


def _record(model: nn.Module, batch: Batch) -> Recorder:
    recorder = Recorder(model, batch)
    try:
        with quiet(model), recorder.naming(model), recorder:
            recorder.returned = recorder.batch.forward(model)
    except Exception as error:
        if (blamed := recorder.blame(error, module=recorder.module)) is error:
            raise
        raise blamed from error
    return recorder


def _checked(model: nn.Module, found: Discovery, batch: Batch) -> Checking:
    checking = Checking(model, found, batch)
    try:
        with quiet(model), checking:
            checking.returned = batch.forward(model)
            checking.row.note_output(checking.returned)
    except Exception as error:
        if (blamed := checking.blame(error)) is error:
            raise
        raise blamed from error
    with torch.inference_mode():
        checking.finish()
    return checking


def _refuse_others(first: Any, second: Any) -> None:
    """ModelError if two forwards of a batch returned other numbers."""
    if not _are_same(first, second):
        raise ModelError(
            "the same batch gives other numbers in a second forward: the model has dropout left on, or counts or keeps "
            "something where it cannot be put back (a global variable, a closure); what is measured must follow from "
            "the batch"
        )


def _refuse_own_functions(model: nn.Module, batch: Batch, returned: Any) -> None:
    """ModelError if a class of tensors in a batch makes the model return others than plain tensors do."""
    own = next((leaf for leaf, _ in input_leaves(batch) if has_own_functions(leaf)), None)
    if own is None:
        return
    kind = type(own).__name__
    with unchanged(model), torch.inference_mode():
        found = batch.forward(model)
    with torch._C.DisableTorchFunctionSubclass():
        alike = _are_same(returned, found)
    if not alike:
        raise ModelError(
            f"the batch holds tensors of class {kind}, by whose own functions the model returns other numbers than by "
            "torch's: they cannot be followed; give plain tensors, as x.as_subclass(torch.Tensor) is one"
        )


def _are_same(first: Any, second: Any) -> bool:
    returned = [[one for one in pytree.tree_leaves(out) if _is_of_numbers(one)] for out in (first, second)]
    return len(returned[0]) == len(returned[1]) and all(same(*pair) for pair in zip(*returned, strict=True))


def _is_of_numbers(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout is torch.strided


_OTHERS = "its positions are not those of the batch's labels"
_UNCLEAR = "which axis of the input counts those that have one is unclear, a Batch with `position_axes` says it"


def _with_errors(found: Discovery, checked: Checking) -> Discovery:
    renewed = {}
    for site in found.sites:
        notes = [site.note] if site.note else []
        if site.name in checked.unmasked:
            notes.append("no position is masked: its positions are not those of the batch's mask")
        if site.name in checked.unlabelled:
            notes.append(f"no position's label is counted: {_OTHERS if checked.finds_positions else _UNCLEAR}")
        error = checked.errors.get(site.name)
        renewed[site.name] = replace(site, error=error, note="; ".join(notes) or None)
    plans = {plan: replace(plan, site=renewed[plan.site.name]) for plan in found.plans()}
    calls = {key: [[plans[plan] for plan in call] for call in each] for key, each in found.calls.items()}
    return replace(found, sites=tuple(renewed.values()), calls=calls, unshown=frozenset(renewed.keys() - checked.shown))
