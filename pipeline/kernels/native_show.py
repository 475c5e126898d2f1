"""What one batch shows, as the native kernel reads it: the tensors' memory by strides, and where rows begin.

Layer 1: torch and ctypes. z, a and y are never copied, unless z is normalised from values that are not finite.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from pipeline.kernels.base import State
from pipeline.kernels.match import CONSTANT
from pipeline.kernels.native_task import TYPES, Task
from pipeline.sites import Presentations

# presentations of a run of rows, 4 KiB of float32: z, a, a match and the bins fit the first cache together
RUN = 1024
# by which a tensor's type is written in a task
_TYPES = {getattr(torch, name): number for name, number in TYPES.items()}


def takes(presentations: Presentations) -> bool:
    """Whether the native kernel reads such presentations: in the CPU's memory, float32 or narrower."""
    z_LSU = presentations.z_LSU
    return z_LSU.device.type == "cpu" and z_LSU.dtype in _TYPES


@dataclass(frozen=True, eq=False)
class Norms:
    """Per group, presentations whose ‖x‖ is finite, and the sum of it."""

    n_G: torch.Tensor
    sum_G: torch.Tensor

    @classmethod
    def empty(cls, groups: int) -> Norms:
        """Nothing seen."""
        return cls(torch.zeros(groups, dtype=torch.int64), torch.zeros(groups, dtype=torch.float64))

    def add(self, square_GP: torch.Tensor, library: ctypes.CDLL) -> None:
        """Take the Σx² of a batch in."""
        library.norms(square_GP.data_ptr(), *square_GP.shape, self.n_G.data_ptr(), self.sum_G.data_ptr())

    def state(self) -> State:
        """As the state of `InputNorm`."""
        return {"n": self.n_G.clone(), "mean": self.sum_G / self.n_G.clamp(min=1)}


def point(structure: ctypes.Structure, **tensors: torch.Tensor | None) -> None:
    """Let fields point to tensors, which must be kept alive as long as they are read."""
    for name, tensor in tensors.items():
        setattr(structure, name, None if tensor is None else tensor.data_ptr())


class Lying(NamedTuple):
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Lying:
        """That of a tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype)


@dataclass(frozen=True, eq=False)
class Layout:
    """How a batch lies that has all presentations in order: what a task says of it holds for another that lies so.

    kept  what the task points to that is the same for both
    """

    z: Lying
    a: Lying | None
    position_LS: torch.Tensor | None
    kept: tuple[torch.Tensor, ...]

    def is_of(self, presentations: Presentations, *, a: bool) -> bool:
        """Whether other presentations lie so; their a only where it is read."""
        if presentations.mask_LS is not None or presentations.row_L is not None or presentations.affine_LSU is not None:
            return False
        if presentations.position_LS is not self.position_LS or Lying.of(presentations.z_LSU) != self.z:
            return False
        return (Lying.of(presentations.a_LSU) if a else None) == self.a


def show_next(
    task: Task, presentations: Presentations, library: ctypes.CDLL, *, a: bool, norms: Norms | None
) -> Sequence[torch.Tensor]:
    """Let a task that was shown a batch point to another of the same layout; returns what must be kept alive."""
    memory, uid_N = task.memory, presentations.uid_N
    memory[0] = presentations.z_LSU.data_ptr()
    if a:
        memory[1] = presentations.a_LSU.data_ptr()
    task.keeping.uid = uid_N.data_ptr()
    return () if norms is None else _show_inputs(task, presentations, library, norms, None, None)


def show(
    task: Task, presentations: Presentations, library: ctypes.CDLL, *, a: bool, norms: Norms | None
) -> tuple[Layout | None, Sequence[torch.Tensor]]:
    """Let the task point to the batch; a only where it must be read, sums over x only where `norms` are to grow.

    Returns its layout, if the next batch may be as this is, and what must be kept alive.
    """
    first_N, run_R, entry_P, index_P = _rows_of(presentations, library)
    point(task, first_N=first_N, run_R=run_R, entry_P=entry_P, index_P=index_P)
    task.runs, task.presentations, task.rows = len(run_R) - 1, int(first_N[-1]), presentations.rows
    affine_LSU = presentations.affine_LSU
    task.finite_y = affine_LSU is None or bool(affine_LSU.sum().isfinite())
    if affine_LSU is not None and not task.finite_y:
        affine_LSU = affine_LSU.masked_fill(~affine_LSU.isfinite(), torch.nan)
    held = [first_N, run_R, presentations.uid_N]
    for at, tensor in enumerate((presentations.z_LSU, presentations.a_LSU if a else None, affine_LSU)):
        task.memory[at] = None
        if tensor is not None:
            task.memory[at], task.type[at] = tensor.data_ptr(), _TYPES[tensor.dtype]
            # where an axis has one element its stride means nothing
            task.stride[at][:] = [by if size > 1 else 0 for size, by in zip(tensor.shape, tensor.stride(), strict=True)]
            held.append(tensor)
    if norms is not None:
        held += _show_inputs(task, presentations, library, norms, entry_P, index_P)
    number_P = index_P
    if presentations.position_LS is not None:
        position_LS = presentations.position_LS
        number_P = (position_LS if entry_P is None else position_LS[entry_P, index_P]).contiguous()
    point(task.keeping, uid=presentations.uid_N, number=number_P)
    task.keeping.positions = presentations.positions
    held += [one for one in (entry_P, index_P, number_P) if one is not None]
    if entry_P is not None or affine_LSU is not None:
        return None, held
    kept = (first_N, run_R) if number_P is None else (first_N, run_R, number_P)
    lying = Lying.of(presentations.a_LSU) if a else None
    return Layout(Lying.of(presentations.z_LSU), lying, presentations.position_LS, kept), held


def _show_inputs(
    task: Task,
    presentations: Presentations,
    library: ctypes.CDLL,
    norms: Norms,
    entry_P: torch.Tensor | None,
    index_P: torch.Tensor | None,
) -> Sequence[torch.Tensor]:
    """Let the task point to the sums over x, and take them into the norms."""
    inputs = _inputs_of(presentations, library, entry_P, index_P)
    sum_GP, square_GP, pearson_GP, cosine_GP = inputs
    norms.add(square_GP, library)
    task.sum_GP, lengths = sum_GP.data_ptr(), task.length_GP
    lengths[0], lengths[1] = pearson_GP.data_ptr(), cosine_GP.data_ptr()
    return inputs


def _inputs_of(
    presentations: Presentations,
    library: ctypes.CDLL,
    entry_P: torch.Tensor | None,
    index_P: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Σx, Σx², 1/‖x − x̄‖ and 1/‖x‖ of every presentation as (G, P), NaN where a match is undefined.

    Computed once for the same x. Square roots are torch's: the processor's own differ from them in a last bit.
    """
    sums = presentations.input_sums()
    if entry_P is None and sums.by_group is not None:
        return sums.by_group
    if entry_P is None and sums.laid_3P is not None:
        sum_GP, square_GP, spread_GP = sums.laid_3P.split(1)
        cosine_GP, pearson_GP = sums.laid_3P[1:].sqrt().split(1)
    else:
        of_sites = (sums.sum_LSG, sums.square_LSG, sums.centred_LSG)
        sum_GP, square_GP, spread_GP = (_by_group(one_LSG, entry_P, index_P) for one_LSG in of_sites)
        cosine_GP, pearson_GP = square_GP.sqrt(), spread_GP.sqrt()
    arrays = (square_GP, spread_GP, pearson_GP, cosine_GP)
    library.invert(*[one.data_ptr() for one in arrays], square_GP.numel(), CONSTANT)
    found = (sum_GP, square_GP, pearson_GP, cosine_GP)
    if entry_P is None:
        sums.by_group = found
    return found


def _by_group(value_LSG: torch.Tensor, entry_P: torch.Tensor | None, index_P: torch.Tensor | None) -> torch.Tensor:
    """Numbers of each presentation as (G, P); nothing is copied if they lie like that."""
    if entry_P is not None:
        return value_LSG[entry_P, index_P].T.contiguous()
    return value_LSG.permute(2, 0, 1).reshape(value_LSG.shape[2], -1).contiguous()


def _rows_of(
    presentations: Presentations, library: ctypes.CDLL
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The first presentation of each row, the first row of each run, and where each presentation is."""
    rows, positions = presentations.rows, presentations.positions
    mask_LS, row_L = presentations.mask_LS, presentations.row_L
    if mask_LS is None and row_L is None:
        return *_regular(rows, positions), None, None
    shape = (presentations.entries, positions)
    order_L = torch.arange(shape[0]) if row_L is None else row_L.argsort(stable=True)
    kept_LS = torch.ones(shape, dtype=torch.bool) if mask_LS is None else mask_LS[order_L]
    at_P, index_P = kept_LS.nonzero(as_tuple=True)
    entry_P = order_L[at_P]
    row_P = entry_P if row_L is None else row_L[entry_P]
    first_N = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(row_P, minlength=rows), 0, out=first_N[1:])
    run_R = torch.empty(rows + 1, dtype=torch.int64)
    runs = library.cut(first_N.data_ptr(), rows, RUN, run_R.data_ptr())
    return first_N, run_R[: runs + 1], entry_P.contiguous(), index_P.contiguous()


@lru_cache(maxsize=64)
def _regular(rows: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    step = max(1, RUN // max(positions, 1))
    begins = [*range(0, rows, step), rows]
    return torch.arange(rows + 1) * positions, torch.tensor(begins)
