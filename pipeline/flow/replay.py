"""Runs a forward along a script: each operation is checked to be the one that comes next, and its sites are presented.

Layer 1. Holds a tensor no longer than the script needs it. From an operation on that is another one a tap follows the
same forward to its end: a model is run once on each batch, whatever it counts, draws or keeps by itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.batch import Batch
from pipeline.errors import is_machines_fault
from pipeline.flow.collect import Collected
from pipeline.flow.plan import SitePlan
from pipeline.flow.prepared import Prepared, Stage
from pipeline.flow.registers import Fresh
from pipeline.flow.script import Result, Script, Step
from pipeline.flow.tap import Observe, Tap
from pipeline.flow.trace import leave
from pipeline.flow.values import tensors_in
from pipeline.sites import Presentations


class Replay(TorchDispatchMode):
    """Follows the script through one forward of a batch; `tapped` makes the tap that follows what departs from it."""

    def __init__(
        self,
        script: Script,
        batch: Batch,
        leaves: Sequence[torch.Tensor],
        observe: Observe,
        tapped: Callable[[Observe], Tap],
    ) -> None:
        super().__init__()
        self._steps = script.steps
        self._next = 0
        self._made: list[tuple[int, weakref.ref[torch.Tensor]]] = []
        self._start = lambda: script.start(leaves)
        self._registers = self._start()
        self._stage = Stage(batch)
        self._observe = observe
        self._collected: dict[SitePlan, Collected] = {}
        self._tapped = tapped
        self._tap: Tap | None = None
        self._defect: Exception | None = None
        # for a tap that takes over: how many presentations were observed, what was made, what Python made of numbers
        self._shown = 0
        self._past: list[Sequence[weakref.ref[torch.Tensor]]] = []
        self._lifted: list[torch.Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # see `Tracker`
        return False

    @property
    def has_departed(self) -> bool:
        """Whether the forward was not that of the script."""
        return self._tap is not None

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation; along the script, if it is the next one."""
        if self._tap is not None:
            return self._tap.__torch_dispatch__(func, types, args, kwargs)
        out = self._followed(func, args, kwargs or {})
        return self._depart().__torch_dispatch__(func, types, args, kwargs) if out is None else out[0]

    def _followed(self, func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Any) -> tuple[Any] | None:
        """What the next operation of the script gives; None where this is another one."""
        registers = self._registers
        if self._made:
            for number, reference in self._made:
                registers[number] = reference()
            self._made.clear()
        step = self._steps[self._next] if self._next < len(self._steps) else None
        if step is None or step.func is not func or not step.is_of(args, kwargs, registers):
            return None
        for source, copy in step.kept:
            registers[copy] = registers[source].clone()
        try:
            out = step.run(args, kwargs, registers)
        except Exception as error:
            if is_machines_fault(error):
                raise
            # the tap says at what it failed
            return None
        made = (out,) if step.is_single else tuple(tensors_in(out))
        if len(made) != len(step.results):
            return None
        for result, tensor in zip(step.results, made, strict=True):
            if not self._takes(step, result, tensor):
                return None
        if step.is_fresh:
            self._lifted += [args[at].clone() for at, pattern in step.others if isinstance(pattern, Fresh)]
        self._past.append([weakref.ref(tensor) for tensor in made])
        for show in step.shows:
            self._show(show)
        for number in step.freed:
            registers[number] = None
        self._next += 1
        return (out,)

    def _takes(self, step: Step, result: Result, tensor: torch.Tensor) -> bool:
        if tensor.shape != result.shape or tensor.stride() != result.stride or tensor.dtype != result.dtype:
            return False
        if not result.is_new:
            return result.number is not None and tensor is self._registers[result.number]
        leave(tensor, result.left)
        if result.number is None:
            return True
        if step.is_fresh:
            # torch copies what a factory made if somebody else has it already
            self._made.append((result.number, weakref.ref(tensor)))
        else:
            self._registers[result.number] = tensor
        return True

    def _show(self, show: Prepared) -> None:
        try:
            presentations = show.present(self._registers, self._stage)
            plan = show.call.plan
            if plan.collected:
                self._collected.setdefault(plan, Collected()).add(presentations)
            else:
                self._observe(presentations)
                self._shown += 1
        except Exception as error:
            self._defect = error
            raise

    def _depart(self) -> Tap:
        """A tap that knows of the forward so far what it would know had it followed it.

        The operations up to here are done again, beside the forward, on the batch, which no script writes to; what the
        tap learns of their results holds of those that the forward has.
        """
        tap = self._tap = self._tapped(_Rest(self._observe, self._shown))
        registers, lifted = self._start(), iter(self._lifted)
        with torch.autocast(self._stage.batch.uid_N.device.type, enabled=False):
            for step, past in zip(self._steps, self._past, strict=False):
                args, kwargs = step.given(registers, lifted)
                made = tensors_in(tap.__torch_dispatch__(step.func, (), args, kwargs))
                for result, tensor, reference in zip(step.results, made, past, strict=True):
                    if result.number is not None:
                        registers[result.number] = tensor
                    held = reference()
                    if held is not None and held is not tensor:
                        leave(held, tap.value_of(tensor))
        return tap

    def blame(self, error: Exception) -> Exception:
        """The error of a forward, as a tap blames it."""
        if error is self._defect:
            return error
        return (self._tap or self._tapped(self._observe)).blame(error)

    def finish(self) -> None:
        """Present what was collected, once the forward has ended."""
        if self._tap is None and self._next < len(self._steps):
            self._depart()
        if self._tap is not None:
            self._tap.finish()
            return
        for collected in self._collected.values():
            self._observe(collected.joined())


class _Rest:
    """Observes all but the first presentations, which were observed before."""

    def __init__(self, observe: Observe, seen: int) -> None:
        self._observe = observe
        self._seen = seen

    def __call__(self, presentations: Presentations) -> None:
        """Observe the next one."""
        if self._seen > 0:
            self._seen -= 1
        else:
            self._observe(presentations)
