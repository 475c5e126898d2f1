"""What others would write: forward hooks with moments in plain torch, and the products that a template needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm2d)


class Moments:
    """Mean, second to fourth moment, extremes and firing rate of each channel, merged in float64."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.sums: dict[str, torch.Tensor] = {}
        self.n = 0.0

    def add(self, z: torch.Tensor) -> None:
        """Reduce along all axes but the channels', without a transposed copy."""
        over = [axis for axis in range(z.dim()) if axis != self.axis % z.dim()]
        n = float(z.numel() // z.shape[self.axis])
        mean = z.mean(over, keepdim=True)
        rest = z - mean
        square = rest * rest
        new = {
            "mean": mean.flatten().double(),
            "m2": square.sum(over).double(),
            "m3": (square * rest).sum(over).double(),
            "m4": (square * square).sum(over).double(),
            "fired": (z > 0).sum(over).double(),
            "min": z.amin(over).double(),
            "max": z.amax(over).double(),
        }
        self.sums = self._merged(new, n) if self.sums else new
        self.n += n

    def _merged(self, new: dict[str, torch.Tensor], n: float) -> dict[str, torch.Tensor]:
        # Pébay 2008, equations 2.1 and 3.1
        old, before, total = self.sums, self.n, self.n + n
        step = new["mean"] - old["mean"]
        share, square = step / total, step.square()
        both = before * n
        return {
            "mean": old["mean"] + share * n,
            "m2": old["m2"] + new["m2"] + both * step * share,
            "m3": old["m3"]
            + new["m3"]
            + both * (before - n) * step * share.square()
            + 3 * share * (before * new["m2"] - n * old["m2"]),
            "m4": old["m4"]
            + new["m4"]
            + both * (before**2 - both + n**2) * square * share.square() / total
            + 6 * share.square() * (before**2 * new["m2"] + n**2 * old["m2"])
            + 4 * share * (before * new["m3"] - n * old["m3"]),
            "fired": old["fired"] + new["fired"],
            "min": torch.minimum(old["min"], new["min"]),
            "max": torch.maximum(old["max"], new["max"]),
        }


@contextmanager
def hooked(model: nn.Module) -> Iterator[dict[str, Moments]]:
    """Within the block, every forward adds to the moments of each layer's output."""
    found: dict[str, Moments] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) and not _normed(model, name):
            found[name] = Moments(-1 if isinstance(module, nn.Linear) else 1)

            def hook(_: nn.Module, __: Any, out: torch.Tensor, name: str = name) -> None:
                found[name].add(out)

            handles.append(module.register_forward_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _normed(model: nn.Module, name: str) -> bool:
    """Whether a convolution's output goes straight to a BatchNorm: its pre-activation is that one's output."""
    return isinstance(model.get_submodule(name), nn.Conv2d) and any(
        isinstance(module, nn.BatchNorm2d) for module in model.modules()
    )


class Products:
    """The products of a template at every layer, on explicit inputs made beforehand.

    Σ a xᵀ, and Σ [z > 0] xᵀ of the layers whose paths are in `firing`: of others a template has no second.
    """

    def __init__(self, model: nn.Module, batch: Any, firing: Collection[str]) -> None:
        self._pairs: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        handles = [
            module.register_forward_hook(partial(self._keep, 1 + (name in firing)))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
        ]
        with torch.inference_mode():
            batch.forward(model)
        for handle in handles:
            handle.remove()

    def _keep(self, times: int, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        x = args[0]
        if isinstance(module, nn.Linear):
            self._pairs.append((out.flatten(0, -2), x.flatten(0, -2), times))
            return
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        assert not isinstance(module.padding, str)
        lead = (1,) * (2 - len(module.kernel_size))
        image = x if x.dim() == 4 else x[:, :, None]
        padding = module.padding if not lead else (0, *module.padding)
        patches = functional.unfold(
            image,
            (*lead, *module.kernel_size),
            (*lead, *module.dilation),
            padding,
            (*lead, *module.stride),
        )
        out_PU, patches_PD = (value.flatten(2).movedim(1, 2).flatten(0, 1) for value in (out, patches))
        self._pairs.append((out_PU, patches_PD, times))

    def run(self) -> None:
        """The products of every layer."""
        with torch.inference_mode():
            for a_PU, x_PD, times in self._pairs:
                for _ in range(times):
                    a_PU.T @ x_PD
