"""Runs a model on a batch and hands each site's presentations out while they are hot.

Layer 1. Nothing of the batch is kept: a site is presented inside the operation that completes its z. Sites are
recognised anew in every forward, so image sizes, lengths and the number of calls may vary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.errors import ModelError
from pipeline.flow.affine import Affine, affine_of, is_affine
from pipeline.flow.aggregate import lifted
from pipeline.flow.cells import live_key, presented
from pipeline.flow.collect import Collected
from pipeline.flow.gains import APPLYING, NORMS, Moments, applied, asking_for_moments, gives_moments
from pipeline.flow.lazy import Lazy, Normed, Same, Viewed
from pipeline.flow.lookups import key_of_lookup
from pipeline.flow.pending import Notes, Pending
from pipeline.flow.plan import CallKey, Discovery, SitePlan
from pipeline.flow.present import Ending, Met, Presenter
from pipeline.flow.recurrent import is_recurrent
from pipeline.flow.told import Operand, Told, has_bias, spelled
from pipeline.flow.trace import Tracker
from pipeline.flow.values import Call, Value
from pipeline.flow.watch import Watch
from pipeline.sites import Presentations

Observe = Callable[[Presentations], None]
# of what differs between batches
ONCE = "its pattern was read off the probe alone: measure such batches by themselves, or exclude the site"


def tapped_forward(model: nn.Module, discovery: Discovery, batch: Batch, observe: Observe) -> Any:
    """Run the model on a batch, call `observe` once per site call, return what the model returns.

    Runs in eval and inference mode, without the fused attention path; all are restored. Raises ModelError if a site's
    calls and rows are not as its plan expects.
    """
    return forward_under(Tap(model, discovery, batch, observe), model, batch)


def forward_under(tap: Tap, model: nn.Module, batch: Batch) -> Any:
    """`tapped_forward` by a tap of the caller's."""
    try:
        with quiet(model), tap:
            out = batch.forward(model)
    except Exception as error:
        if (blamed := tap.blame(error)) is error:
            raise
        raise blamed from error
    with torch.inference_mode():
        tap.finish()
    return out


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval and inference mode without the fused attention path, which hides its projections; restored afterwards.

    Classes of tensors do torch's functions as plain tensors do.
    """
    training = [module for module in model.modules() if module.training]
    # a compiled model runs as it was written; who has none does not load the compiler
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    evaluate(model)
    try:
        # a class of tensors makes new objects of all results, of which nothing is known
        with eager, torch._C.DisableTorchFunctionSubclass(), torch.inference_mode():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in training:
            module.training = True


def evaluate(model: nn.Module) -> None:
    """Put a model in eval mode; an exported program has the mode that it was exported in."""
    with suppress(NotImplementedError):
        model.eval()


class Tap(Tracker):
    """Recognises sites in a running forward and presents them."""

    def __init__(self, model: nn.Module, discovery: Discovery, batch: Batch, observe: Observe) -> None:
        super().__init__(model, batch, discovery.leaf_axes)
        self._discovery = discovery
        self._presenter = Presenter(batch)
        self._observe = observe
        self._seen: dict[tuple[str, int], int] = {}
        # in the order of the forward: the first that waits in vain is named
        self._waiting: dict[Pending, None] = {}
        self._watches: list[Watch] = []
        self._gates: dict[SitePlan, Pending] = {}
        self._ups: dict[SitePlan, Pending] = {}
        self._collected: dict[SitePlan, Collected] = {}

    def on_input_written(self, call: Call) -> None:
        """ModelError unless the model is given copies."""
        if not self._discovery.writes_inputs:
            raise ModelError(
                f"the forward writes to its input in place ({call.op.name}), which it did not with the probe batch: "
                "whoever else is shown the batch would see other numbers; let it write to a copy"
            )

    def on_data(self, call: Call) -> Any:
        """Run one operation; present the sites that it completes."""
        affine = affine_of(call) if is_affine(call) else None
        noted = [value for value in call.values if value.notes is not None]
        if noted and call.op.writes:
            self._protect(call)
        out, moments = self._done(call)
        results = self.settle_data(call, out)
        if noted:
            self._carry(call, out, results)
        if self._discovery.gains and call.op.name in APPLYING:
            self._note_gain(call, results[0], moments)
        if affine is not None:
            self._meet(call, affine, out if isinstance(out, torch.Tensor) else out[0], results[0])
        elif is_recurrent(call.op.name):
            self._meet_cells(call, out)
        elif call.op.name == "sum" and call.values[0].lookup:
            self._meet_machine(call, out)
        return out

    def _done(self, call: Call) -> tuple[Any, Moments | None]:
        """Do what the model asked for, and keep what a layer norm normalises by where its gain is folded."""
        if call.op.name not in NORMS or not self._has_gain(call) or not gives_moments(call):
            return self.run(call), None
        out, *moments = self.run(asking_for_moments(call))
        return out, Moments(*moments)

    def _has_gain(self, call: Call) -> bool:
        weight = call.bound().get("weight")
        return weight is not None and self.value_of(weight).key in self._discovery.gains

    def _protect(self, call: Call) -> None:
        # an operation in place would turn a pre-activation that is still awaited into something else
        for index in call.op.writes:
            notes = self.value_of(call.args[index]).notes
            for pending in notes.pending if notes is not None else ():
                root, plan = pending.root or pending, pending.met.plan
                if plan.meets_gate and plan.trail[pending.step :] == (call.op.name,):
                    pending.before = self.keep(call.args[index])
                if plan.before is not None or not plan.trail:
                    root.met = replace(root.met, out=self.keep(root.met.out))

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of what the next operation overwrites."""
        return tensor.clone()

    def _note_gain(self, call: Call, result: Value, moments: Moments | None) -> None:
        found = applied(call, self._discovery.gains)
        if found is not None:
            source, key = found
            earlier: Notes | None = self.value_of(source).notes
            known = None if earlier is None else earlier.before_gain
            keys = earlier.gain if earlier is not None and known is not None else frozenset[int]()
            self._know_gain(call, result, known or Same(source), keys | {key})
        elif call.op.name in NORMS and self._has_gain(call):
            given = call.bound()
            held = [given[name] for name in ("weight", "bias") if given.get(name) is not None]
            self._know_gain(call, result, Normed(call, moments), frozenset(self.value_of(one).key for one in held))

    def _know_gain(self, call: Call, result: Value, before: Lazy, keys: frozenset[int]) -> None:
        result.notes = Notes([], before, keys)
        self.on_folded(call)

    def on_folded(self, call: Call) -> None:
        """What an operation was told is that which a pattern was made of."""

    def _carry(self, call: Call, out: Any, results: list[Value]) -> None:
        for position, argument in enumerate(call.args):
            notes = self._notes_of(argument, call)
            if notes is None:
                continue
            if call.op.is_view and position == 0:
                self._carry_view(call, out, results, notes)
            for pending in notes.pending:
                trail = pending.met.plan.trail
                if pending.step < len(trail) and trail[pending.step] == call.op.name:
                    self._pass(call, position, pending, out, results[0])
        for value in call.values:
            if value.notes is not None and value.notes.watches:
                self._watch(call, value, results)

    def _notes_of(self, argument: Any, call: Call) -> Notes | None:
        position = call.position_of(argument)
        return None if position is None else call.values[position].notes

    def _carry_view(self, call: Call, out: Any, results: list[Value], notes: Notes) -> None:
        whole = isinstance(out, torch.Tensor)
        for part, value in enumerate(results):
            if value.notes is not None:
                continue
            gain = notes.before_gain
            pending = [
                Pending(one.met, one.step, Viewed(call, one.x, None if whole else part), one.root or one)
                for one in notes.pending
            ]
            before = None if gain is None else Viewed(call, gain, None if whole else part)
            value.notes = Notes(pending, before, notes.gain)

    def _pass(self, call: Call, position: int, pending: Pending, out: Any, result: Value) -> None:
        told = pending.met.plan.told[pending.step]
        if told.is_told_by(call):
            self.on_folded(call)
            self._advance(call, position, pending, out, result)
        else:
            root = pending.root or pending
            root.other = root.other or f"met {spelled(call)} in this batch, and {told} in the probe"

    def _watch(self, call: Call, value: Value, results: list[Value]) -> None:
        first = bool(call.args) and call.args[0] is call.tensors[call.values.index(value)]
        for watch in tuple(value.notes.watches):
            awaited = len(watch.due)
            goes_on = watch.meets(call, first=first)
            if len(watch.due) < awaited:
                self.on_folded(call)
            if goes_on and not watch.is_over:
                for result in results:
                    self._note_watch(result, watch)

    def _begin_watch(self, plan: SitePlan, due: Sequence[Told], result: Value) -> None:
        watch = Watch(plan, list(due))
        if not watch.is_over:
            self._watches.append(watch)
            self._note_watch(result, watch)

    def _note_watch(self, result: Value, watch: Watch) -> None:
        if result.notes is None:
            result.notes = Notes([])
        if watch not in result.notes.watches:
            result.notes.watches.append(watch)

    def _advance(self, call: Call, position: int, pending: Pending, out: Any, result: Value) -> None:
        root = pending.root or pending
        plan = pending.met.plan
        if root not in self._waiting:
            return
        x = lifted(call, position, pending.x) if pending.step < plan.lifts else pending.x
        if pending.step + 1 < len(plan.trail):
            following = Pending(pending.met, pending.step + 1, x, root)
            self._await(result, following)
            return
        del self._waiting[root]
        root.forget()
        if plan.meets_gate:
            z = call.args[position] if pending.before is None else pending.before
            self._present(root.met, ending=Ending(z, result.rows, x, activation=out))
        else:
            self._present(root.met, ending=Ending(out if isinstance(out, torch.Tensor) else out[0], result.rows, x))
            self._begin_watch(plan, plan.due, result)

    def _plans(self, key: CallKey) -> Sequence[SitePlan]:
        """The plans of the next call of its kind; calls beyond those of the probe are as the last of them."""
        plans = self._discovery.calls.get(key)
        if plans is None:
            return ()
        index = self._seen.get(key, 0)
        self._seen[key] = index + 1
        if index >= len(plans) and key in self._discovery.uneven:
            self._refuse_calls(key, "more")
        return plans[min(index, len(plans) - 1)]

    def _refuse_calls(self, key: CallKey, than: str) -> None:
        """Where a weight's calls are unlike, which of them one is cannot be told by its number if there are others."""
        calls = self._discovery.calls[key]
        plan = next((plan for plans in calls for plan in plans), None)
        if plan is not None:
            raise ModelError(
                f"site {plan.site.name}: its weight is called {than} times in this batch than in the probe "
                f"({len(calls)}), where not every call had the same gate and norm behind it: which is which cannot be "
                f"told; {ONCE}"
            )

    def _meet_cells(self, call: Call, out: Any) -> None:
        plans = self._plans(live_key(call, lambda weight: self.value_of(weight).key))
        fed = self.value_of(call.args[0])
        for shown in presented(call, out, plans) if plans else ():
            self._guarded(shown.plan, partial(self._presenter.cell, shown, fed.rows, fed.places))

    def _meet_machine(self, call: Call, out: torch.Tensor) -> None:
        lookup = call.values[0].lookup
        assert lookup is not None
        for plan in self._plans(("sum", key_of_lookup(lookup))):
            self._guarded(plan, partial(self._presenter.machine, plan, call, out))

    def _meet(self, call: Call, affine: Affine, out: torch.Tensor, result: Value) -> None:
        key = (call.op.name, affine.weight_value.key)
        if key not in self._discovery.calls:
            self._refuse_unknown(call, affine)
        for plan in self._plans(key):
            branch = plan.branch if plan.branch is not None and plan.branch.key == key else plan
            self._compare_bias(plan, branch.bias, affine)
            self.on_folded(call)
            pending = Pending(Met(plan, affine, out, result.rows, result.places), 0, Same(affine.x))
            if plan.branch is not None and plan.branch.key is not None:
                self._pair(plan, pending, result, is_gate=plan.branch.key != key)
                self._begin_watch(plan, branch.due, result)
            elif plan.trail:
                self._waiting[pending] = None
                self._await(result, pending)
            else:
                self._present(pending.met)
                self._begin_watch(plan, (*plan.due, *(plan.branch.due if plan.branch is not None else ())), result)

    def _compare_bias(self, plan: SitePlan, bias: Operand | None, affine: Affine) -> None:
        if not has_bias(affine, bias):
            reason = "the bias of its call is another one in this batch than in the probe"
            self.fail(plan, ModelError(f"site {plan.site.name}: {reason}; {ONCE}"))

    def _refuse_unknown(self, call: Call, affine: Affine) -> None:
        """A weight of a site, in a call that the probe did not show, would be dropped in silence."""
        known = affine.weight_value.names & self._discovery.weights
        if known and affine.weight_value.learned:
            raise ModelError(
                f"weight {min(known)}: acts through {call.op.name} in a form that the probe batch did not show, so its "
                "presentations would be lost; probe with a batch that shows every form, or exclude its sites"
            )

    def _await(self, result: Value, pending: Pending) -> None:
        if result.notes is None:
            result.notes = Notes([])
        result.notes.add(pending)

    def _pair(self, plan: SitePlan, pending: Pending, result: Value, *, is_gate: bool) -> None:
        own, other = (self._gates, self._ups) if is_gate else (self._ups, self._gates)
        if plan not in other:
            own[plan] = pending
            self._waiting[pending] = None
            self._await(result, pending)
            return
        partner = other.pop(plan)
        del self._waiting[partner]
        partner.forget()
        gate, up = (pending, partner) if is_gate else (partner, pending)
        self._present(gate.met, up=up.met)

    def _present(self, call: Met, *, ending: Ending | None = None, up: Met | None = None) -> None:
        notes: Notes | None = call.affine.x_value.notes
        before_gain = None if notes is None else notes.before_gain
        if call.plan.gain and before_gain is not None and notes is not None and notes.gain != call.plan.gain:
            reason = "its input comes from a norm with another gain or bias in this batch than in the probe"
            self.fail(call.plan, ModelError(f"site {call.plan.site.name}: {reason}; {ONCE}"))
        self._guarded(call.plan, partial(self._presenter.affine, call, ending=ending, before_gain=before_gain, up=up))

    def _guarded(self, plan: SitePlan, made: Callable[[], Presentations]) -> None:
        try:
            self._hand_out(plan, made())
        except Exception as error:  # noqa: BLE001
            self.fail(plan, error)

    def fail(self, plan: SitePlan, error: Exception) -> None:
        """What happens where a site cannot be presented."""
        raise error

    def _hand_out(self, plan: SitePlan, presentations: Presentations) -> None:
        self._presenter.check(presentations)
        if plan.collected:
            self._collected.setdefault(plan, Collected()).add(presentations)
        else:
            self._observe(presentations)

    def finish(self) -> None:
        """Present what was collected; raise ModelError if a site's affine map ran and its z never came."""
        for key, seen in self._seen.items():
            if key in self._discovery.uneven and seen < len(self._discovery.calls[key]):
                self._refuse_calls(key, "fewer")
        for pending in self._waiting:
            plan = pending.met.plan
            awaited = " then ".join(plan.trail) or "its pair"
            self._miss(plan, awaited, pending.other)
        for watch in self._watches:
            if watch.due:
                self._miss(watch.plan, " then ".join(told.name for told in watch.due), watch.other)
            elif watch.new_gate is not None:
                other = f"meets {watch.new_gate} in this batch, and met no such gate in the probe"
                self._miss(watch.plan, "", other)
        for collected in self._collected.values():
            self._observe(collected.joined())

    def _miss(self, plan: SitePlan, awaited: str, other: str | None) -> None:
        if other is None:
            message = f"its output did not reach {awaited} in this batch, as it did in the probe"
        else:
            message = f"its output {other}; {ONCE}"
        self.fail(plan, ModelError(f"site {plan.site.name}: {message}"))
