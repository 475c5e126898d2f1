"""A device that is not there: its tensors lie in the CPU's memory, and no operation may mix them with others.

What a machine without a GPU can test of a computation on one: that everything it needs is moved there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pipeline.flow.replay import Replay
from pipeline.flow.trace import Tracker

# what its tensors say of themselves; real meta tensors are made nowhere in a measurement
ELSEWHERE = torch.device("meta")
CPU = torch.device("cpu")
# operations that take tensors of several devices
# (the last makes the zeros itself that it adds to)
CROSSING = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_sparse_addmm"}


class Memory:
    """Which storages are on the device; held, so that no address is used again."""

    def __init__(self) -> None:
        self._held: dict[int, torch.UntypedStorage] = {}
        self.moved = 0

    def holds(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor).data_ptr() in self._held

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = _storage(tensor)
        if storage.data_ptr():
            self._held[storage.data_ptr()] = storage
        return tensor


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        return (tensor._values() if tensor.layout is torch.sparse_coo else tensor).untyped_storage()


class _Operations(TorchDispatchMode):
    """Sees every operation that is carried out: refuses mixed ones, keeps results where their arguments are."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        if asked == ELSEWHERE:
            kwargs["device"] = CPU
        with torch._C.DisableTorchFunction():
            given = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
            sized = [one for one in given if one.dim() and one.numel()]
            there = [self._memory.holds(one) for one in sized]
            name = func._overloadpacket.__name__
            if any(there) and not all(there) and name not in CROSSING:
                places = [
                    (tuple(one.shape), "elsewhere" if at else "here") for one, at in zip(sized, there, strict=True)
                ]
                raise AssertionError(f"{func} of {places}")
            out = func(*args, **kwargs)
            if asked == ELSEWHERE or (asked is None and any(self._memory.holds(one) for one in given)):
                for one in pytree.tree_leaves(out):
                    if isinstance(one, torch.Tensor):
                        self._memory.take(one)
        return out


class _Calls(TorchFunctionMode):
    """Sees what Python asks tensors: where they are, and to be moved."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return ELSEWHERE if self._memory.holds(args[0]) else func(*args)
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return self._moved(func, args, kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]) == ELSEWHERE:
            made = func(*args, **{**kwargs, "device": CPU})
            return self._memory.take(made)
        return func(*args, **kwargs)

    def _moved(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        value, rest = args[0], list(args[1:])
        target: Any = kwargs.pop("device", CPU if func is torch.Tensor.cpu else None)
        kwargs.pop("non_blocking", None)
        for index, one in enumerate(rest):
            if isinstance(one, torch.device | str):
                target = torch.device(rest.pop(index))
                break
            if isinstance(one, torch.Tensor):
                target, rest[index] = ELSEWHERE if self._memory.holds(one) else CPU, one.dtype
                break
        is_there = self._memory.holds(value)
        rest = [one for one in rest if not isinstance(one, bool)]
        if target is not None and (torch.device(target) == ELSEWHERE) != is_there:
            self._memory.moved += 1
            value = _copied(value) if is_there else self._memory.take(_copied(value))
        return func(value, *rest, **kwargs) if rest or kwargs else value


def _copied(value: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own, of which no operation knows."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        # what has no elements has no address either, and borrows one
        return value.detach().clone() if value.numel() else value.new_empty(1).as_strided(value.shape, value.stride())


@contextmanager
def elsewhere() -> Iterator[Memory]:
    """Within the block there is a device ELSEWHERE."""
    memory = Memory()

    def asking_again(dispatch: Callable[..., Any]) -> Callable[..., Any]:
        def asked(self: TorchDispatchMode, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # what happens inside a call that a mode has seen is not seen by it
            with _Calls(memory):
                return dispatch(self, func, types, args, kwargs)

        return asked

    with pytest.MonkeyPatch.context() as patch, _Operations(memory), _Calls(memory):
        for mode in (Tracker, Replay):
            patch.setattr(mode, "__torch_dispatch__", asking_again(mode.__torch_dispatch__))
        # the package hides the module of this name
        optimizers = import_module("torch.optim.optimizer")
        patch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: [CPU.type, ELSEWHERE.type])
        yield memory
