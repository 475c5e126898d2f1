"""Σx, Σx² and Σ(x − x̄)² of the inputs of every presentation on a GPU, and the lengths that matches are measured by.

Layer 1: torch and Triton; only to be imported where that is installed. Equal to the sums of `flow.patches` to rounding,
and like them functions of each entry alone; a window's are put together from those of its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from pipeline.input_forms import InputSums
from pipeline.kernels.triton_input import norms, pixel_sums, references, vector_sums, window_sums
from pipeline.sites import Presentations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# vectors and their numbers, pixels and their channels that a program has in hand; numbers of an entry that it reads
VECTORS, NUMBERS = 16, 128
PIXELS, CHANNELS = 256, 8
ENTRY = 2048
# presentations that a program counts the lengths of
COUNTED = 4096


def _takes(x: torch.Tensor) -> bool:
    return (x.is_cuda or triton.knobs.runtime.interpret) and x.dtype in DTYPES and x.numel() > 0


def _known(found_5LSG: torch.Tensor) -> InputSums:
    sum_LSG, square_LSG, centred_LSG, pearson_LSG, cosine_LSG = found_5LSG.unbind(0)
    sums = InputSums(sum_LSG, square_LSG, centred_LSG)
    sums.lengths = (sum_LSG, pearson_LSG, cosine_LSG)
    return sums


def of_vectors(x_LSGD: torch.Tensor) -> InputSums | None:
    """The sums of explicit inputs; None where they are not computed here."""
    if not _takes(x_LSGD):
        return None
    entries, positions, groups, inputs = x_LSGD.shape
    found = torch.empty((5, entries, positions, groups), dtype=torch.float64, device=x_LSGD.device)
    vectors = entries * positions * groups
    room = {"BV": VECTORS, "BD": min(NUMBERS, triton.next_power_of_2(inputs)), "enable_fp_fusion": False}
    with torch.cuda.device_of(x_LSGD):
        vector_sums[(triton.cdiv(vectors, VECTORS),)](
            x_LSGD, x_LSGD.stride(), found, vectors, positions, groups, inputs, **room
        )
    return _known(found)


def of_windows(
    x: torch.Tensor,
    *,
    groups: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> InputSums | None:
    """The sums over every window of a convolution of x (L, C, *spatial); None where they are not computed here."""
    if not _takes(x) or len(kernel) > 2:
        return None
    x = x.contiguous()
    lead = 2 - len(kernel)
    sizes = (*(1,) * lead, *x.shape[2:])
    taps, steps, apart = ((*(1,) * lead, *one) for one in (kernel, stride, dilation))
    pads = (*((0, 0),) * lead, *padding)
    out = tuple(
        (size + sum(pad) - distance * (tap - 1) - 1) // step + 1
        for size, pad, distance, tap, step in zip(sizes, pads, apart, taps, steps, strict=True)
    )
    entries, channels, pixels, positions = len(x), x.shape[1] // groups, sizes[0] * sizes[1], out[0] * out[1]

    def room(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float64, device=x.device)

    reference_L, of_pixel = room(entries), room(4, entries, groups, pixels)
    found = room(5, entries, positions, groups)
    with torch.cuda.device_of(x):
        references[(entries,)](x, reference_L, x[0].numel(), BN=ENTRY, enable_fp_fusion=False)
        pixel_sums[(triton.cdiv(pixels, PIXELS), entries * groups)](
            x, reference_L, of_pixel, entries, groups, channels, pixels, BC=CHANNELS, BP=PIXELS, enable_fp_fusion=False
        )
        window_sums[(triton.cdiv(positions, PIXELS), entries * groups)](
            of_pixel, reference_L, found, entries, groups, channels, sizes, out, taps, steps, apart,
            (pads[0][0], pads[1][0]), BP=PIXELS, enable_fp_fusion=False,
        )  # fmt: skip
    return _known(found)


def norms_of(presentations: Presentations) -> torch.Tensor:
    """Of runs of presentations and each group, how many have a finite ‖x‖, and Σ‖x‖ over them: (R, 2, G), float64."""
    square_LSG, mask_LS = presentations.input_sums().square_LSG.contiguous(), presentations.mask_LS
    groups, vectors = square_LSG.shape[2], square_LSG.shape[0] * square_LSG.shape[1]
    runs = triton.cdiv(vectors, COUNTED)
    found = torch.empty((runs, 2, groups), dtype=torch.float64, device=square_LSG.device)
    mask = square_LSG if mask_LS is None else mask_LS.contiguous().view(torch.uint8)
    norms[(runs, groups)](
        square_LSG, mask, found, vectors, groups, HAS_MASK=mask_LS is not None, BV=COUNTED, enable_fp_fusion=False
    )
    return found
