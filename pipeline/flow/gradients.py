"""How the loss of each row changes with each unit's activation: a forward that keeps what a backward pass needs.

Layer 1. Sites are recognised by the tap, in a forward whose operations arrive whole as under inference mode, but run
with gradients. A site's activation is then found by its numbers: the first tensor of the forward, from the site's call
on, that holds the same numbers as the gate's output, or of which that output is a part (one of fused projections); the
gradient there is the activation's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.utils import _pytree as pytree

from pipeline.batch import Batch
from pipeline.errors import is_machines_fault
from pipeline.flow.layout import arrange
from pipeline.flow.plan import Discovery
from pipeline.flow.rows import Rows
from pipeline.flow.tap import Observe, Tap, quiet
from pipeline.flow.trace import copied
from pipeline.sites import Presentations

# of the largest activation: a folded BatchNorm rounds otherwise than the model's own
SAME = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def classifies(output: Any, batch: Batch, classes: int) -> bool:
    """Whether the output is one logit per class for each row of a batch with labels."""
    rows = None if batch.label_N is None else len(batch.label_N)
    return isinstance(output, torch.Tensor) and output.ndim == 2 and output.shape == (rows, classes)


def cross_entropy(output: Any, batch: Batch, classes: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The log-loss in nats of each row (N), and which are labelled; None unless the output is one logit per class."""
    label_N = batch.label_N
    if label_N is None or not classifies(output, batch, classes):
        return None
    known_N = (label_N >= 0) & (label_N < classes)
    return functional.cross_entropy(output, label_N.where(known_N, 0), reduction="none"), known_N


def observe_gradients(model: nn.Module, discovery: Discovery, batch: Batch, observe: Observe, *, classes: int) -> None:
    """Present each site's a with ∂(sum of the rows' log-losses)/∂a, for the labelled rows; nothing where none is.

    A site whose activation stands nowhere in the forward in its own layout (a pool comes before the gate) is left out,
    and all are where the model has no derivative. Holds the activations of the whole batch: give small batches.
    """
    batch = _without_inference(copied(batch) if discovery.writes_inputs else batch)
    tap = _GradientTap(model, discovery, batch)
    try:
        with _differentiable(model), quiet(model), torch.inference_mode(False), torch.enable_grad():
            with _whole_operations(), tap:
                output = batch.forward(model)
            lost = cross_entropy(output, batch, classes)
            if lost is None or not bool(lost[1].any()):
                return
            gradients = _gradients(lost[0][lost[1]].sum(), tap.found)
    except (RuntimeError, NotImplementedError) as error:
        if is_machines_fault(error):
            raise
        # an operation without a derivative, or a tensor that was made in inference mode
        return
    for found, gradient in zip(tap.found, gradients, strict=True):
        at = found.place.of(gradient)
        observe(replace(found.presentations, gradient_LSU=at).select_rows(lost[1]))


def _gradients(loss: torch.Tensor, found: Sequence[_Found]) -> list[torch.Tensor]:
    """The gradient at each found activation; zeros where the loss does not depend on it."""
    if not found:
        return []
    made = torch.autograd.grad(loss, [one.edge for one in found], allow_unused=True)
    return [loss.new_zeros(one.shape) if g is None else g for g, one in zip(made, found, strict=True)]


@contextmanager
def _whole_operations() -> Iterator[None]:
    """Let composite operations reach a dispatch mode whole, as inference mode does, yet with gradients.

    Inference mode itself would lose the gradients of views: it wraps what the mode returns into views of its own.
    """
    key = torch._C.DispatchKey
    keys = torch._C.DispatchKeySet(key.AutogradFunctionality) | torch._C.DispatchKeySet(key.AutogradOther)
    with torch._C._ExcludeDispatchKeyGuard(keys | torch._C.DispatchKeySet(key.ADInplaceOrView)):
        yield


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Let every parameter require gradients, so that every activation has one; restored afterwards."""
    frozen = [one for one in model.parameters() if not one.requires_grad and one.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _without_inference(batch: Batch) -> Batch:
    """The batch with copies of tensors that were made in inference mode: those cannot be saved for a backward pass."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value

    with torch.inference_mode(False):
        parts = {name: getattr(batch, name) for name in ("inputs", "kwargs", "label_N", "label_NS", "mask_NS")}
        return replace(batch, **pytree.tree_map(copied, parts))


@dataclass(frozen=True, eq=False)
class _Found:
    """A site's activation in the running forward: where it stands, and how it is arranged."""

    presentations: Presentations
    edge: GradientEdge
    shape: torch.Size
    place: _Place


@dataclass(frozen=True)
class _Place:
    """The channels `first` … of an axis of a tensor, as many as a site has units, and how entries are told apart."""

    rows: Rows
    axis: int
    first: int
    units: int
    split: bool

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What stands there, (L, S, U)."""
        part = tensor.narrow(self.axis, self.first, self.units)
        return arrange(part, self.rows, [self.axis], split=self.split).tensor


class _Sought:
    """Sites that have been shown and whose activations have not been met yet, with the memory that these began in."""

    def __init__(self) -> None:
        self.memory: dict[Presentations, int] = {}

    def add(self, presentations: Presentations) -> None:
        """Look for a site's activation from here on."""
        # a copy, for an operation in place may overwrite what the activation of an identity gate is a view of
        z_LSU, a_LSU = presentations.z_LSU.detach().clone(), presentations.a_LSU.detach().clone()
        sought = replace(presentations, z_LSU=z_LSU, a_LSU=a_LSU)
        self.memory[sought] = presentations.a_LSU.untyped_storage().data_ptr()


class _GradientTap(Tap):
    """Recognises sites, then their activations by their numbers."""

    def __init__(self, model: nn.Module, discovery: Discovery, batch: Batch) -> None:
        # no method of its own is handed on: a circle through it would hold the batch until the collector comes
        self._sought = _Sought()
        super().__init__(model, discovery, batch, self._sought.add)
        self.found: list[_Found] = []

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation with gradients."""
        with torch.inference_mode(False), torch.enable_grad():
            sought = self._sought.memory
            earlier = set(sought)
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if sought and isinstance(out, torch.Tensor) and out.requires_grad:
                # what completes z is no activation yet, though it has its numbers where every z > 0
                memory = out.untyped_storage().data_ptr()
                self._recognise(out, {one: begun == memory for one, begun in sought.items()}, earlier)
            return out

    def _recognise(self, out: torch.Tensor, is_own: Mapping[Presentations, bool], earlier: set[Presentations]) -> None:
        rows = self.value_of(out).rows
        if rows is None:
            return
        for presentations, own in is_own.items():
            found = _found_in(out, rows, presentations, own=own) if own or presentations in earlier else None
            if found is not None:
                del self._sought.memory[presentations]
                self.found.append(found)


def _found_in(out: torch.Tensor, rows: Rows, presentations: Presentations, *, own: bool) -> _Found | None:
    """Where an activation stands in a tensor: in the whole of it, or in a part if that is its `own` memory."""
    a_LSU = presentations.a_LSU
    if out.dtype != a_LSU.dtype or not (own or out.numel() == a_LSU.numel()):
        return None
    for place in _places(out, rows, a_LSU):
        held = place.of(out.detach())
        if held.shape == a_LSU.shape and _same(held, a_LSU):
            return _Found(presentations, get_gradient_edge(out), out.shape, place)
    return None


def _places(out: torch.Tensor, rows: Rows, a_LSU: torch.Tensor) -> Iterator[_Place]:
    """Where an activation could stand in a tensor that is a whole number of times its size."""
    units = a_LSU.shape[2]
    for axis, size in enumerate(out.shape):
        if axis != rows.axis and size % units == 0 and out.numel() * units == a_LSU.numel() * size:
            for first in range(0, size, units):
                yield from (_Place(rows, axis, first, units, split) for split in (True, False))


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal numbers up to rounding: of the first entry, which tells most others apart, then all of them."""
    if not _close(left[:1], right[:1]):
        return False
    return torch.equal(left, right) or _close(left, right)


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    tolerance = SAME.get(right.dtype, 1e-4) * float(right.abs().nan_to_num().amax()) if right.numel() else 0.0
    return torch.allclose(left, right, rtol=0, atol=tolerance, equal_nan=True)
