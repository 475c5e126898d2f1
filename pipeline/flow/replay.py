"""Runs a forward along a script: each operation is checked to be the one that comes next, and its sites are presented.

Layer 1. Holds a tensor no longer than the script needs it. An operation that is another one is not run: the forward is
given up there, and what was presented up to it is what a tap would have presented.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.batch import Batch
from pipeline.flow.collect import Collected
from pipeline.flow.plan import SitePlan
from pipeline.flow.prepared import Prepared, Stage
from pipeline.flow.script import Result, Script, Step
from pipeline.flow.trace import leave
from pipeline.flow.values import tensors_in
from pipeline.sites import Presentations, Site


class DepartedError(Exception):
    """The forward is not that of the script."""


class Replay(TorchDispatchMode):
    """Follows the script through one forward of a batch.

    shown   the sites whose presentations were observed, in order
    defect  what an observer raised
    """

    def __init__(
        self,
        script: Script,
        batch: Batch,
        leaves: Sequence[torch.Tensor],
        observe: Callable[[Presentations], None],
    ) -> None:
        super().__init__()
        self.shown: list[Site] = []
        self.defect: Exception | None = None
        self._departed = False
        self._steps = script.steps
        self._next = 0
        self._made: list[tuple[int, weakref.ref[torch.Tensor]]] = []
        self._registers = script.start(leaves)
        self._stage = Stage(batch)
        self._observe = observe
        self._collected: dict[SitePlan, Collected] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # see `Tracker`
        return False

    @property
    def is_complete(self) -> bool:
        """Whether every operation of the script was run, and no other."""
        return not self._departed and self._next == len(self._steps)

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation, if it is the next one."""
        kwargs, registers = kwargs or {}, self._registers
        if self._made:
            for number, made in self._made:
                registers[number] = made()
            self._made.clear()
        step = self._steps[self._next] if self._next < len(self._steps) else None
        if self._departed or step is None or step.func is not func or not step.is_of(args, kwargs, registers):
            raise self._depart()
        for source, copy in step.kept:
            registers[copy] = registers[source].clone()
        out = step.run(args, kwargs, registers)
        if step.is_single:
            self._take(step, step.results[0], out)
        else:
            self._take_all(step, out)
        for show in step.shows:
            self._show(show)
        for number in step.freed:
            registers[number] = None
        self._next += 1
        return out

    def _depart(self) -> DepartedError:
        self._departed = True
        return DepartedError()

    def _take_all(self, step: Step, out: Any) -> None:
        made = list(tensors_in(out))
        if len(made) != len(step.results):
            raise self._depart()
        for result, tensor in zip(step.results, made, strict=True):
            self._take(step, result, tensor)

    def _take(self, step: Step, result: Result, tensor: torch.Tensor) -> None:
        if tensor.shape != result.shape or tensor.stride() != result.stride or tensor.dtype != result.dtype:
            raise self._depart()
        if not result.is_new:
            if result.number is None or tensor is not self._registers[result.number]:
                raise self._depart()
            return
        leave(tensor, result.left)
        if result.number is None:
            return
        if step.is_fresh:
            # torch copies what a factory made if somebody else has it already
            self._made.append((result.number, weakref.ref(tensor)))
        else:
            self._registers[result.number] = tensor

    def _show(self, show: Prepared) -> None:
        try:
            presentations = show.present(self._registers, self._stage)
            plan = show.call.plan
            if plan.collected:
                self._collected.setdefault(plan, Collected()).add(presentations)
            else:
                self._observe(presentations)
                self.shown.append(plan.site)
        except Exception as error:
            self.defect = error
            raise

    def finish(self) -> None:
        """Present what was collected, once the forward is complete."""
        for collected in self._collected.values():
            self._observe(collected.joined())
