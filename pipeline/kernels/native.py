"""The fused kernel for CPUs: all that a site's statistics need of z, a and the match, in one pass while z is hot.

Layer 1: torch and ctypes; the pass itself is C++ (cpp/). It grows the states of a site in place, so that nothing is
made or merged per batch but what the batch changes. Units are independent of each other: the result is the same for any
number of threads. Given the same presentations it equals the reference kernel: counts, extremes and choices exactly,
float64 sums to rounding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from pipeline.kernels.accumulate import Accumulator
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.bins import Bins
from pipeline.kernels.classsums import ClassSums
from pipeline.kernels.firing import Firing
from pipeline.kernels.match import patterns_of
from pipeline.kernels.matchbins import InputNorm, MatchBins
from pipeline.kernels.moments import Moments
from pipeline.kernels.native_show import Layout, Norms, show, show_next
from pipeline.kernels.native_state import DRAWN, ByClass, Kept, Sums, in_lanes
from pipeline.kernels.native_task import FORMS, GIVEN, LANES, RECTIFIED, SAME, Task
from pipeline.kernels.ranked import Ranked
from pipeline.sites import Presentations, Site

# raised whenever the same presentations would give other bits
VERSION = 5
# values of z below which a batch is not worth a second thread
WORTH_A_THREAD = 1 << 15
# units that a thread takes at least
TILE = 4 * LANES


def fused(primitives: Sequence[Primitive]) -> list[Primitive]:
    """Those of the primitives that this kernel computes together."""
    chosen: list[Primitive] = []
    ranked: dict[str, Ranked] = {}
    for primitive in primitives:
        match primitive:
            case Ranked(kind=kind):
                # one of each kind, and all draw by the same hash
                same = kind not in DRAWN or all(ranked[one].seed == primitive.seed for one in DRAWN if one in ranked)
                if kind not in ranked and same:
                    ranked[kind] = primitive
                    chosen.append(primitive)
            case Moments("z", 4) | Moments("a", 4) | Firing() | Bins() | MatchBins() | InputNorm() | ClassSums():
                chosen.append(primitive)
    return chosen


class Native(Accumulator):
    """States grown by the fused kernel; `primitives` are such as `fused` gives."""

    def __init__(self, site: Site, primitives: Sequence[Primitive], library: ctypes.CDLL) -> None:
        self._site = site
        self._library = library
        self._primitives = tuple(primitives)
        self._classed = [one for one in primitives if isinstance(one, ClassSums)]
        self._drawing = _drawing(tuple(self._classed))
        forms = {one.form for one in primitives if isinstance(one, MatchBins)}
        more = (0, in_lanes(site.units) - site.units)
        self._patterns = [torch.nn.functional.pad(one, more) for one in patterns_of(site)]
        matches = any(isinstance(one, MatchBins | InputNorm | Ranked) for one in primitives)
        self._norms = Norms.empty(site.groups) if matches else None
        self._sums = Sums.empty(site.units, forms=bool(forms))
        self._kept = Kept.empty(site.units, primitives)
        self._by_class = ByClass.empty(site.units, ways=len(self._classed), classes=0)
        self._task = task = Task(units=site.units, lanes=in_lanes(site.units), groups=site.groups)
        bias_U, mean_U, task.scale_U[0], task.scale_U[1] = (one.data_ptr() for one in self._patterns)
        task.bias_U, task.mean_U = bias_U, mean_U
        task.moments = any(isinstance(one, Moments) for one in primitives)
        task.bins = Bins() in primitives
        task.forms[:] = [form in forms for form in FORMS]
        self._sums.bind(task)
        self._kept.bind(task)
        # of the batch before
        self._layout: Layout | None = None

    def add(self, presentations: Presentations) -> None:
        """See `Accumulator`."""
        site, task = self._site, self._task
        if presentations.a_LSU is presentations.z_LSU:
            task.a_is = SAME
        else:
            task.a_is = RECTIFIED if site.gate == "relu" and site.up_UD is None else GIVEN
        a = task.a_is == GIVEN
        if self._layout is not None and self._layout.is_of(presentations, a=a):
            held = show_next(task, presentations, self._library, a=a, norms=self._norms)
        else:
            self._layout, held = show(task, presentations, self._library, a=a, norms=self._norms)
        label_JN = self._label(presentations)
        self._run(presentations.z_LSU.numel())
        del held, label_JN

    def _label(self, presentations: Presentations) -> torch.Tensor | None:
        """Let the task sum by the classes of the batch; where it has none, by no class."""
        label_N, classes, task = presentations.label_N, presentations.classes, self._task
        task.ways = 0
        if label_N is None or classes == 0 or not self._classed:
            return None
        if classes > self._by_class.classes:
            self._by_class = self._by_class.widened(classes)
            self._by_class.bind(task)
        label_JN = presentations.remembered(
            (self._drawing, classes), lambda: self._drawn(label_N, presentations.uid_N, classes)
        )
        task.ways, task.label_JN = len(label_JN), label_JN.data_ptr()
        return label_JN

    def _drawn(self, label_N: torch.Tensor, uid_N: torch.Tensor, classes: int) -> torch.Tensor:
        # another label would be an address behind the sums
        unknown_N = (label_N < 0) | (label_N >= classes)
        drawn = [label_N if one.null_seed is None else one.null_label(uid_N, classes) for one in self._classed]
        return torch.stack([label.long().masked_fill(unknown_N, -1) for label in drawn])

    def _run(self, values: int) -> None:
        observe, task, units = self._library.observe, ctypes.byref(self._task), self._site.units
        threads = torch.get_num_threads() if values >= WORTH_A_THREAD else 1
        step = -(-units // (TILE * threads)) * TILE
        shares = [(begin, min(begin + step, units)) for begin in range(0, units, step)]
        if len(shares) == 1:
            results = [observe(task, *shares[0])]
        else:
            pool = _pool(len(shares))
            results = [done.result() for done in [pool.submit(observe, task, *share) for share in shares]]
        if any(results):
            raise MemoryError(f"site {self._site.name}: no memory for the native kernel")

    def states(self) -> Mapping[Primitive, State]:
        """See `Accumulator`."""
        return {primitive: self._state(primitive) for primitive in self._primitives}

    def _state(self, primitive: Primitive) -> State:
        if isinstance(primitive, InputNorm) and self._norms is not None:
            return self._norms.state()
        if isinstance(primitive, ClassSums):
            return self._by_class.state(self._classed.index(primitive), primitive, self._site)
        if isinstance(primitive, Ranked):
            return self._kept.state(primitive, self._site)
        return self._sums.state(primitive, self._site)


@cache
def _drawing(classed: tuple[ClassSums, ...]) -> object:
    """Stands for ways to label rows: the hash of each is longer in coming than what a batch remembers by it."""
    return object()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="native-kernel")
