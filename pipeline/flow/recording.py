"""A tap that writes down a script of the forward beside: what a later batch of the same signature needs no tap for.

Layer 1. Written down is only what follows from the operations and from shapes and strides. Where a row or a place is
found by reading numbers, or an operation done again would give something else (it draws random numbers, or writes to
what the forward was given), there is no script.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.flow.affine import Affine
from pipeline.flow.gains import Moments
from pipeline.flow.holdings import held_tensors
from pipeline.flow.lazy import Lazy, Normed, Same, Viewed
from pipeline.flow.numbering import Numbering, UnscriptableError
from pipeline.flow.operators import LIKES, operator, words
from pipeline.flow.pending import Notes
from pipeline.flow.plan import Discovery, SitePlan
from pipeline.flow.prepared import EndingAt, LazyAt, MetAt, Prepared, views_of
from pipeline.flow.present import Ending, Met, Presenter
from pipeline.flow.registers import Of, Pattern, Plain
from pipeline.flow.row_joins import PRODUCTS, SCATTERS
from pipeline.flow.script import Result, Script, Step, freed, without_numbers
from pipeline.flow.tap import Observe, Tap
from pipeline.flow.trace import memory_of, outlasting
from pipeline.flow.values import Call, Origin, Value, tensors_in
from pipeline.sites import Presentations

# what these make of the rows, or of the geometry, depends on numbers among their arguments
READS_NUMBERS = SCATTERS | words(
    "index_select index index_put index_copy embedding_bag repeat_interleave _pack_padded_sequence _pad_packed_sequence"
)
# as many registers as a forward's loops may make before following a script costs memory
MOST_STEPS = 20_000


@dataclass(eq=False)
class _Draft:
    """A presentation as it was made, until the tensors of its operation have registers."""

    call: Met
    ending: Ending | None
    up: Met | None
    shares: bool = False
    presentations: Presentations | None = None


@dataclass(eq=False)
class _Running:
    """The operation that is running: what it keeps of what it overwrites, and shows; the norm that it is."""

    kept: list[tuple[int, int]] = field(default_factory=list)
    drafts: list[_Draft] = field(default_factory=list)
    norm: Normed | None = None


class _Sharing(Presenter):
    """A presenter that tells whether the site before was shown the same inputs."""

    shares = False

    def _shared(self, plan: SitePlan, affine: Affine, inputs: Any) -> Any:
        found = super()._shared(plan, affine, inputs)
        self.shares = found is not inputs
        return found


class Recording(Tap):
    """Presents the sites of a batch as a tap does; `script` is that of the forward, or None."""

    def __init__(
        self, model: nn.Module, discovery: Discovery, batch: Batch, observe: Observe, leaves: Sequence[torch.Tensor]
    ) -> None:
        super().__init__(model, discovery, batch, observe)
        self._batch = batch
        self._presenter = self._sharing = _Sharing(batch)
        self._inputs = leaves
        self._numbering = Numbering(leaves, self._held)
        self._memory = {memory_of(held) for held in (*leaves, *(held for _, held in self._held.values()))}
        # weak: a value leads to tensors
        self._values: WeakKeyDictionary[Value, Value] = WeakKeyDictionary()
        self._lazy: WeakKeyDictionary[Lazy, LazyAt] = WeakKeyDictionary()
        self._moments: WeakKeyDictionary[Normed, tuple[int, int]] = WeakKeyDictionary()
        self._running: _Running | None = None
        self._steps: list[Step] = []
        self._is_scriptable = self._graphs is None
        self._drawn = _drawn()
        # of what patterns are made of
        self._relied: set[int] = set()

    def script(self, model: nn.Module) -> Script | None:
        """The script of the forward that has ended; None where it cannot be followed, or the next one finds others of
        the model's tensors.
        """
        if (
            not self._is_scriptable
            or _drawn() != self._drawn
            or not self._numbering.own.keys() <= held_tensors(model).keys()
        ):
            return None
        own = [(number, weakref.ref(self._held[key][1])) for key, number in self._numbering.own.items()]
        return Script(
            freed(without_numbers(self._steps, self._relied), len(self._inputs), self._numbering.own),
            self._numbering.count,
            len(self._inputs),
            tuple(own),
        )

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and write it down."""
        if self._is_scriptable and (self._running is not None or len(self._steps) == MOST_STEPS):
            self._is_scriptable = False
        if not self._is_scriptable:
            return super().__torch_dispatch__(func, types, args, kwargs)
        self._running = running = _Running()
        made: _Begun | None = None
        try:
            made = self._begun(func, args, kwargs or {})
        except UnscriptableError:
            self._is_scriptable = False
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._running = None
        if made is not None and self._is_scriptable:
            try:
                self._steps.append(self._ended(made, out, running))
            except UnscriptableError:
                self._is_scriptable = False
        return out

    def _begun(self, func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Begun:
        op = operator(func)
        if any(kwargs.get(name) is not None for name in op.written_keywords):
            raise UnscriptableError
        for index in op.writes:
            # done again, beside a forward that departs, it would give something else
            if index < len(args) and any(memory_of(one) in self._memory for one in tensors_in(args[index])):
                raise UnscriptableError
        is_fresh = op.name == "lift_fresh"
        positional = tuple(self._numbering.pattern(arg, fresh=is_fresh) for arg in args)
        return _Begun(func, positional, self._numbering.keywords(kwargs))

    def _ended(self, begun: _Begun, out: Any, running: _Running) -> Step:
        results = tuple(self._result(one) for one in tensors_in(out))
        shows = tuple(self._prepared(draft) for draft in running.drafts)
        numbered = enumerate(begun.positional)
        tensors = tuple((position, one.number) for position, one in numbered if isinstance(one, Of))
        others = [(at, one) for at, one in enumerate(begun.positional) if not isinstance(one, Of)]
        moments = None
        if running.norm is not None:
            moments = self._moments[running.norm] = (self._numbering.next(), self._numbering.next())
        return Step(
            begun.func,
            len(begun.positional),
            tensors,
            tuple(others),
            begun.keywords,
            begun.is_fresh or operator(begun.func).name in LIKES,
            results,
            isinstance(out, torch.Tensor),
            tuple(running.kept),
            shows,
            (),
            moments,
        )

    def _result(self, tensor: torch.Tensor) -> Result:
        if (
            type(tensor) is not torch.Tensor and self._numbering.known(tensor) is None
        ) or tensor.layout is not torch.strided:
            raise UnscriptableError
        number = self._numbering.known(tensor)
        left = outlasting(self.value_of(tensor))
        made = self._numbering.new(tensor) if number is None else number
        return Result(made, tensor.shape, tensor.stride(), tensor.dtype, number is None, left)

    def run(self, call: Call) -> Any:
        """See `Tracker`."""
        reads = (call.op.name in READS_NUMBERS or _may_reorder(call)) and any(
            value.origin is Origin.DATA for value in call.values
        )
        if reads and not (call.op.name == "repeat_interleave" and len(call.tensors) == 1):
            self._is_scriptable = False
        return super().run(call)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Tap`."""
        copy = super().keep(tensor)
        number = self._numbering.known(tensor)
        if self._running is None or number is None:
            self._is_scriptable = False
        else:
            self._running.kept.append((number, self._numbering.new(copy)))
        return copy

    def on_folded(self, call: Call) -> None:
        """See `Tap`."""
        for tensor, value in zip(call.tensors, call.values, strict=True):
            if value.origin is not Origin.DATA and (number := self._numbering.known(tensor)) is not None:
                self._relied.add(number)

    def _note_gain(self, call: Call, result: Value, moments: Moments | None) -> None:
        super()._note_gain(call, result, moments)
        notes: Notes | None = result.notes
        gain = None if notes is None else notes.before_gain
        if self._running is not None and moments is not None and isinstance(gain, Normed):
            self._running.norm = gain

    def _meet(self, call: Call, affine: Affine, out: torch.Tensor, result: Value) -> None:
        if all(affine.weight is not tensor for tensor in call.tensors):
            # it repeats itself: its numbers were compared
            self._is_scriptable = False
        super()._meet(call, affine, out, result)

    def _present(self, call: Met, *, ending: Ending | None = None, up: Met | None = None) -> None:
        if self._running is not None:
            self._running.drafts.append(_Draft(call, ending, up))
        super()._present(call, ending=ending, up=up)

    def _hand_out(self, plan: SitePlan, presentations: Presentations) -> None:
        drafts = [] if self._running is None else self._running.drafts
        if drafts and drafts[-1].presentations is None and drafts[-1].call.plan is plan:
            drafts[-1].presentations, drafts[-1].shares = presentations, self._sharing.shares
        else:
            # a cell of a recurrent layer, or a machine
            self._is_scriptable = False
        super()._hand_out(plan, presentations)

    def _prepared(self, draft: _Draft) -> Prepared:
        plan, ending = draft.call.plan, draft.ending
        if plan.lifts or draft.presentations is None:
            raise UnscriptableError
        notes: Notes | None = draft.call.affine.x_value.notes
        gain = notes.before_gain if plan.gain and notes is not None else None
        call = self._met_at(draft.call)
        at = None
        sources = {call.out: draft.call.out}
        if ending is not None:
            activation = None if ending.activation is None else self._numbering.of(ending.activation)
            at = EndingAt(self._numbering.of(ending.z), ending.rows, activation)
            sources[at.z] = ending.z
            if activation is not None and ending.activation is not None:
                sources[activation] = ending.activation
        views = views_of(draft.presentations, call, at, sources, self._batch)
        up = None if draft.up is None else self._met_at(draft.up)
        return Prepared(call, at, up, None if gain is None else self._lazy_at(gain), draft.shares, views)

    def _met_at(self, met: Met) -> MetAt:
        affine = met.affine
        return MetAt(
            met.plan,
            out=self._numbering.of(met.out),
            x=self._numbering.of(affine.x),
            weight=self._numbering.of(affine.weight),
            x_value=self._bare(affine.x_value),
            weight_value=self._bare(affine.weight_value),
            geometry=affine.geometry,
            rows=met.rows,
            places=met.places,
        )

    def _bare(self, value: Value) -> Value:
        """The same for every site that is shown it, without what it keeps of the forward."""
        if value not in self._values:
            bare = outlasting(value)
            bare.rows, bare.places = value.rows, value.places
            self._values[value] = bare
        return self._values[value]

    def _lazy_at(self, lazy: Lazy) -> LazyAt:
        if lazy not in self._lazy:
            self._lazy[lazy] = self._made_lazy(lazy)
        return self._lazy[lazy]

    def _made_lazy(self, lazy: Lazy) -> LazyAt:
        if isinstance(lazy, Same):
            return LazyAt(self._numbering.of(lazy.tensor))
        if isinstance(lazy, Viewed):
            source = self._lazy_at(lazy.source)
            call, args = lazy.call, [Plain(None), *self._numbering.patterns(lazy.call.args[1:])]
            return LazyAt(
                source.number, call.op, call.func, tuple(args), self._numbering.keywords(call.kwargs), source, lazy.part
            )
        if isinstance(lazy, Normed):
            call = lazy.call
            return LazyAt(
                self._numbering.next(),
                call.op,
                call.func,
                self._numbering.patterns(call.args),
                self._numbering.keywords(call.kwargs),
                moments=self._moments.get(lazy),
            )
        raise UnscriptableError


@dataclass(frozen=True, eq=False)
class _Begun:
    """An operation and its arguments from before it ran."""

    func: torch._ops.OpOverload
    positional: tuple[Pattern, ...]
    keywords: dict[str, Pattern]

    @property
    def is_fresh(self) -> bool:
        """Whether no tensor that was there before is among its arguments."""
        return not any(one.numbers for one in (*self.positional, *self.keywords.values()))


def _may_reorder(call: Call) -> bool:
    """Whether a square matrix made of data, of no rows that are known, is multiplied: it may put rows elsewhere."""
    if call.op.name not in PRODUCTS:
        return False
    unknown = any(value.origin is Origin.DATA and value.rows is None for value in call.values)
    return unknown and any(len(shape) == 2 and shape[0] == shape[1] for shape in call.shapes)


def _drawn() -> list[Any]:
    """The states of torch's generators."""
    states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [state.tolist() for state in (torch.get_rng_state(), *states)]
