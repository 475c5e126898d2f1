"""Which kernel computes what: the fused one where it can, the reference for the rest.

Layer 1. A run names one kernel for all of its workers, because float64 sums differ in their last bits between kernels:
`name` is part of the key of every state, and a machine that has no such kernel must not take part.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

from pipeline.devices import CPU, GPU
from pipeline.errors import JobError
from pipeline.kernels import native, native_build, native_show, native_sums, triton_build
from pipeline.kernels.accumulate import Accumulator, Bounded, Reference
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.by_position import by_position
from pipeline.kernels.classsums import ClassSums
from pipeline.kernels.comoment import CoMoment
from pipeline.kernels.counts import LARGEST
from pipeline.kernels.pooled import Pooled
from pipeline.sites import Presentations, Site

REFERENCE = "reference"
NATIVE = f"native-{native.VERSION}"
TRITON = f"triton-{triton_build.VERSION}"
SLOWER = "statistics run on the reference kernel, several times slower"


def name(device: str = CPU) -> str:
    """The fastest kernel for a kind of device; see `remark` where it is the reference.

    Whether the workers have a GPU is not for the machine to say that plans their work.
    """
    if device not in (CPU, GPU) or _lacking(device):
        return REFERENCE
    return TRITON if device == GPU else NATIVE


def remark(kernel: str, device: str) -> str | None:
    """What a person should know of the kernel that `name` gave for a kind of device."""
    return f"{SLOWER}: {_lacking(device)}" if kernel == REFERENCE else None


def _lacking(device: str) -> str | None:
    """Why there is no fused kernel for a kind of device."""
    if device == GPU:
        return triton_build.lacking()
    if device != CPU:
        return f"there is no fused kernel for {device}"
    library = native_build.kernel()
    return library if isinstance(library, str) else None


@dataclass(frozen=True)
class Fused:
    """A fused kernel: the primitives that it computes together, what it reads, what grows their states."""

    fused: Callable[[Sequence[Primitive]], list[Primitive]]
    takes: Callable[[Presentations], bool]
    grown: Callable[[Site, Sequence[Primitive]], Accumulator]


def accumulator(kernel: str, site: Site, primitives: Sequence[Primitive]) -> Accumulator:
    """What grows the states of these primitives at a site by the kernel of this name; JobError if it is not here."""
    if kernel == REFERENCE:
        return Reference(site, primitives)
    classed = [one for one in primitives if isinstance(one, ClassSums)]
    whole = _fused(kernel, site, primitives)
    return Labelled(whole, partial(_fused, kernel, site, classed)) if classed else whole


def _fused(kernel: str, site: Site, primitives: Sequence[Primitive]) -> Mixed:
    if kernel == TRITON:
        module = triton_build.kernel()
        if isinstance(module, str):
            raise _absent(kernel, module)
        return Mixed(site, primitives, Fused(module.fused, module.takes, module.Triton))
    grown = partial(native.Native, library=_library(kernel))
    return Mixed(site, primitives, Fused(native.fused, native_show.takes, grown))


def in_force(kernel: str) -> AbstractContextManager[None]:
    """Within the block, the sums over inputs are those of the kernel of this name."""
    if kernel == TRITON:
        return native_sums.in_force(None, triton_build.sums())
    return native_sums.in_force(None if kernel == REFERENCE else _library(kernel))


def _library(kernel: str) -> ctypes.CDLL:
    library = native_build.kernel()
    if kernel != NATIVE or isinstance(library, str):
        raise _absent(kernel, library if isinstance(library, str) else f"this version has {NATIVE} and {TRITON}")
    return library


def _absent(kernel: str, why: str) -> JobError:
    return JobError(f"the run was planned with the kernel {kernel!r}, which this machine does not have: {why}")


class Mixed(Accumulator):
    """States grown by a fused kernel as far as it goes; by the reference where it does not.

    It does not for primitives that it lacks, and for batches in another memory or type than it reads.
    """

    def __init__(self, site: Site, primitives: Sequence[Primitive], kernel: Fused) -> None:
        fused = kernel.fused(primitives)
        self._site = site
        self._takes = kernel.takes
        # of nothing too it would read all of z
        self._any = bool(fused)
        self._fused = Bounded(partial(kernel.grown, site, fused))
        self._pooled = [Pooled(site, one) for one in primitives if isinstance(one, CoMoment)]
        rest = [one for one in primitives if one not in fused and not isinstance(one, CoMoment)]
        self._rest = [Reference(site, rest)] if rest else []
        self._untaken: Reference | None = None
        self._remarks: list[str] = []

    def add(self, presentations: Presentations) -> None:
        """See `Accumulator`."""
        for one in (*self._rest, *self._pooled):
            one.add(presentations)
        if not self._any:
            return
        if self._takes(presentations):
            self._fused.add(presentations)
            return
        if self._untaken is None:
            self._untaken = Reference(self._site, list(self._fused.states()))
            z_LSU = presentations.z_LSU
            self._remarks.append(f"{SLOWER}: {z_LSU.dtype} on {z_LSU.device.type} is not for the fused one")
        self._untaken.add(presentations)

    def states(self) -> Mapping[Primitive, State]:
        """See `Accumulator`."""
        fused = self._fused.states()
        if self._untaken is not None:
            untaken = self._untaken.states()
            fused = {one: one.merge(_moved(state, untaken[one]), untaken[one]) for one, state in fused.items()}
        others = (*self._pooled, *self._rest)
        return {**fused, **{primitive: state for one in others for primitive, state in one.states().items()}}

    def remarks(self) -> list[str]:
        """See `Accumulator`."""
        return self._remarks

    @property
    def room(self) -> int:
        """See `Accumulator`."""
        if self._rest or self._pooled or self._untaken is not None:
            return 0
        return self._fused.room if self._any else LARGEST

    @property
    def begun(self) -> tuple[int, ...]:
        """See `Accumulator`."""
        return self._fused.begun

    def count(self, presentations: int) -> None:
        """See `Accumulator`."""
        self._fused.count(presentations)


class Labelled(Accumulator):
    """States of which those by class also take in positions with labels of their own, each as a row.

    whole    grows the states of all primitives, of those by class from the labels of rows
    classed  makes what grows the states by class alone, from positions
    """

    def __init__(self, whole: Accumulator, classed: Callable[[], Accumulator]) -> None:
        self._whole = whole
        self._classed = classed
        self._by_position: Accumulator | None = None

    def add(self, presentations: Presentations) -> None:
        """See `Accumulator`."""
        if presentations.label_LS is None:
            self._whole.add(presentations)
            return
        # by its row's label a position would be counted a second time
        self._whole.add(replace(presentations, label_N=None, label_LS=None))
        if self._by_position is None:
            self._by_position = self._classed()
        self._by_position.add(by_position(presentations))

    def states(self) -> Mapping[Primitive, State]:
        """See `Accumulator`."""
        whole = self._whole.states()
        if self._by_position is None:
            return whole
        found = self._by_position.states()
        return {**whole, **{one: one.merge(_moved(whole[one], state), state) for one, state in found.items()}}

    def remarks(self) -> list[str]:
        """See `Accumulator`."""
        return self._whole.remarks()

    @property
    def room(self) -> int:
        """See `Accumulator`."""
        return self._whole.room if self._by_position is None else 0

    @property
    def begun(self) -> tuple[int, ...]:
        """See `Accumulator`."""
        return self._whole.begun

    def count(self, presentations: int) -> None:
        """See `Accumulator`."""
        self._whole.count(presentations)


def _moved(state: State, like: State) -> State:
    return {name: value.to(like[name].device) for name, value in state.items()}
