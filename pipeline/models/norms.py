"""BatchNorm statistics of an untrained model: taken from data without training, since (0, 1) would be a broken control.

Layer 2: pure torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipeline.batch import Batch

Norm = nn.modules.batchnorm._BatchNorm


def running_norms(module: nn.Module) -> list[Norm]:
    """The norms whose statistics are of the data that they have seen."""
    norms = (one for one in module.modules() if isinstance(one, Norm))
    return [norm for norm in norms if norm.track_running_stats]


def reestimated(module: nn.Module, batches: Iterable[Batch], *, rows: int) -> nn.Module:
    """The module in eval mode, its running statistics those of the batches until there were so many rows.

    Every value counts the same, whatever batch it came in (Wu & Johnson 2021, arXiv:2105.07576, weigh by size as well):
    a norm on the data has exactly their mean and variance (of n − 1, as PyTorch's own), one behind other norms those of
    what these gave it as they settled. Without batches the statistics stay as they are.
    """
    module.eval()
    norms = running_norms(module)
    if not norms:
        return module
    seen = 0
    with torch.no_grad(), _pooling(norms):
        for batch in batches:
            batch.forward(module)
            seen += batch.rows
            if seen >= rows:
                break
    return module


@contextmanager
def _pooling(norms: Iterable[Norm]) -> Iterator[None]:
    """Let each norm take every input that it is called with into its statistics before it uses them."""
    handles = [norm.register_forward_pre_hook(_pooled()) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pooled() -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    n, mean_C, m2_C = 0, torch.zeros(()), torch.zeros(())

    def take(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal n, mean_C, m2_C
        assert isinstance(norm, Norm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        value_PC = inputs[0].movedim(1, -1).flatten(0, -2).double()
        here = len(value_PC)
        if not here:
            return
        # Chan, Golub & LeVeque 1979
        own_C = value_PC.mean(0)
        step_C, share = own_C - mean_C, here / (n + here)
        m2_C = m2_C + (value_PC - own_C).square().sum(0) + step_C.square() * n * share
        mean_C, n = mean_C + step_C * share, n + here
        norm.running_mean.copy_(mean_C)
        if n > 1:
            norm.running_var.copy_(m2_C / (n - 1))

    return take
