"""A tap that writes down a script of the forward beside: what a later batch of the same signature needs no tap for.

Layer 1. Written down is only what follows from the operations and from shapes and strides. Where a row or a place is
found by reading numbers, or the forward draws random ones, or writes to what it was given, there is no script.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.flow.affine import Affine
from pipeline.flow.holdings import held_tensors
from pipeline.flow.lazy import Lazy, Normed, Same, Viewed
from pipeline.flow.operators import LIKES, operator, words
from pipeline.flow.plan import Discovery, SitePlan
from pipeline.flow.prepared import EndingAt, LazyAt, MetAt, Prepared, views_of
from pipeline.flow.present import Ending, Met, Presenter
from pipeline.flow.registers import PLAIN, Fresh, Listed, Of, Pattern, Plain
from pipeline.flow.row_joins import SCATTERS
from pipeline.flow.script import Result, Script, Step
from pipeline.flow.tap import Notes, Observe, Tap
from pipeline.flow.trace import outlasting
from pipeline.flow.values import Call, Origin, Value, tensors_in
from pipeline.sites import Presentations

_ATTRIBUTE = "_census_register"
# what these make of the rows, or of the geometry, depends on numbers among their arguments
READS_NUMBERS = SCATTERS | words(
    "index_select index embedding_bag repeat_interleave _pack_padded_sequence _pad_packed_sequence"
)
# as many registers as a forward's loops may make before following a script costs memory
MOST_STEPS = 20_000


class UnscriptableError(Exception):
    """Something in a forward that no script can say."""


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
    """The operation that is running: what it keeps of what it overwrites, and shows."""

    kept: list[tuple[int, int]] = field(default_factory=list)
    drafts: list[_Draft] = field(default_factory=list)


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
        self._token = object()
        self._inputs = leaves
        self._given = {id(leaf): number for number, leaf in enumerate(leaves)}
        self._own: dict[int, int] = {}
        self._memory = {_memory(held) for held in (*leaves, *(held for _, held in self._held.values()))}
        # weak: a value leads to tensors
        self._values: WeakKeyDictionary[Value, Value] = WeakKeyDictionary()
        self._lazy: WeakKeyDictionary[Lazy, LazyAt] = WeakKeyDictionary()
        self._registers = len(leaves)
        self._running: _Running | None = None
        self._steps: list[Step] = []
        self._is_scriptable = self._graphs is None
        self._before = _around(model)

    def script(self, model: nn.Module) -> Script | None:
        """The script of the forward that has ended; None where it cannot be followed."""
        if not self._is_scriptable or _around(model) != self._before:
            return None
        own = [(number, weakref.ref(self._held[key][1])) for key, number in self._own.items()]
        return Script(_freed(self._steps, len(self._inputs), self._own), self._registers, len(self._inputs), tuple(own))

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
            # of a second forward over the same batch something else would come
            if index < len(args) and any(_memory(one) in self._memory for one in tensors_in(args[index])):
                raise UnscriptableError
        is_fresh = op.name == "lift_fresh"
        positional = tuple(self._pattern(arg, fresh=is_fresh) for arg in args)
        return _Begun(func, positional, {name: self._pattern(arg, fresh=False) for name, arg in kwargs.items()})

    def _ended(self, begun: _Begun, out: Any, running: _Running) -> Step:
        results = tuple(self._result(one) for one in tensors_in(out))
        shows = tuple(self._prepared(draft) for draft in running.drafts)
        numbered = enumerate(begun.positional)
        tensors = tuple((position, one.number) for position, one in numbered if isinstance(one, Of))
        others = [(at, one) for at, one in enumerate(begun.positional) if not isinstance(one, Of)]
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
        )

    def _pattern(self, value: Any, *, fresh: bool) -> Pattern:
        if isinstance(value, torch.Tensor):
            number = self._number(value)
            if number is not None:
                return Of(number)
            if fresh and type(value) is torch.Tensor and value.layout is torch.strided:
                return Fresh(value.shape, value.dtype)
            raise UnscriptableError
        if isinstance(value, list | tuple):
            parts = tuple(self._pattern(part, fresh=False) for part in value)
            if all(isinstance(part, Plain) for part in parts):
                return Plain(value if isinstance(value, tuple) else list(value))
            return Listed(type(value), parts)
        if isinstance(value, PLAIN) and value == value:
            return Plain(value)
        raise UnscriptableError

    def _number(self, tensor: torch.Tensor) -> int | None:
        """The register of a tensor; None where it has none."""
        key = id(tensor)
        if key in self._given:
            return self._given[key]
        if key in self._held:
            if key not in self._own:
                self._own[key] = self._next()
            return self._own[key]
        token, number = vars(tensor).get(_ATTRIBUTE, (None, None))
        return number if token is self._token else None

    def _number_of(self, tensor: torch.Tensor) -> int:
        number = self._number(tensor)
        if number is None:
            raise UnscriptableError
        return number

    def _next(self) -> int:
        self._registers += 1
        return self._registers - 1

    def _numbered(self, tensor: torch.Tensor) -> int:
        number = self._next()
        vars(tensor)[_ATTRIBUTE] = (self._token, number)
        return number

    def _result(self, tensor: torch.Tensor) -> Result:
        if (type(tensor) is not torch.Tensor and self._number(tensor) is None) or tensor.layout is not torch.strided:
            raise UnscriptableError
        number = self._number(tensor)
        left = outlasting(self.value_of(tensor))
        made = self._numbered(tensor) if number is None else number
        return Result(made, tensor.shape, tensor.stride(), tensor.dtype, number is None, left)

    def run(self, call: Call) -> Any:
        """See `Tracker`."""
        reads = call.op.name in READS_NUMBERS and any(value.origin is Origin.DATA for value in call.values)
        if reads and not (call.op.name == "repeat_interleave" and len(call.tensors) == 1):
            self._is_scriptable = False
        return super().run(call)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Tap`."""
        copy = super().keep(tensor)
        number = self._number(tensor)
        if self._running is None or number is None:
            self._is_scriptable = False
        else:
            self._running.kept.append((number, self._numbered(copy)))
        return copy

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
            activation = None if ending.activation is None else self._number_of(ending.activation)
            at = EndingAt(self._number_of(ending.z), ending.rows, activation)
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
            out=self._number_of(met.out),
            x=self._number_of(affine.x),
            weight=self._number_of(affine.weight),
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
            return LazyAt(self._number_of(lazy.tensor))
        if isinstance(lazy, Viewed):
            source = self._lazy_at(lazy.source)
            call, args = lazy.call, [Plain(None), *self._patterns(lazy.call.args[1:])]
            return LazyAt(source.number, call.op, call.func, tuple(args), self._keywords(call), source, lazy.part)
        if isinstance(lazy, Normed):
            call = lazy.call
            return LazyAt(self._next(), call.op, call.func, self._patterns(call.args), self._keywords(call))
        raise UnscriptableError

    def _patterns(self, args: Sequence[Any]) -> tuple[Pattern, ...]:
        return tuple(self._pattern(arg, fresh=False) for arg in args)

    def _keywords(self, call: Call) -> dict[str, Pattern]:
        return {name: self._pattern(arg, fresh=False) for name, arg in call.kwargs.items()}


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


def _freed(steps: Sequence[Step], leaves: int, own: Mapping[int, int]) -> tuple[Step, ...]:
    """The steps, each with the registers that it is the last to need, and without those that nothing needs."""
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        patterns = (*(one for _, one in step.others), *step.keywords.values())
        needed = {number for _, number in step.tensors} | {number for one in patterns for number in one.numbers}
        needed |= {source for source, _ in step.kept}.union(*[show.numbers for show in step.shows])
        needed |= {one.number for one in step.results if not one.is_new and one.number is not None}
        last.update(dict.fromkeys(needed, index))
    freed: dict[int, list[int]] = {}
    for number, index in last.items():
        if number >= leaves and number not in own.values():
            freed.setdefault(index, []).append(number)
    return tuple(
        replace(
            step,
            results=tuple(one if one.number in last else one._replace(number=None) for one in step.results),
            freed=tuple(freed.get(index, ())),
        )
        for index, step in enumerate(steps)
    )


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _around(model: nn.Module) -> Any:
    """What a forward must leave as it is for a second one over the same batch to make the same."""
    held = {
        key: (path, None if one.is_inference() else one._version) for key, (path, one) in held_tensors(model).items()
    }
    plain = {
        (path, name): value if isinstance(value, PLAIN) else (id(value), len(value))
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name != "training" and isinstance(value, (*PLAIN, list, dict, set))
    }
    return held, plain, random.getstate(), _drawn()


def _drawn() -> list[list[int]]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return [state.tolist() for state in states]
