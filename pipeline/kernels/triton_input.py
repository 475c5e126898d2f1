# mypy: ignore-errors
"""Sums over the inputs of presentations in float64, in Triton: of vectors, of pixels, and of windows over pixels.

Layer 1: Triton alone; only to be imported where that is installed. Σ(x − x̄)² of a window is taken around 0 or the mean
of its entry, whichever cancels less, as `flow.patches` does.

Shapes: L entries, S positions, G groups, D inputs, C channels of a group; tiles are (v, d) and (c, p).
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.kernels import match

CONSTANT = tl.constexpr(match.CONSTANT)


@triton.jit
def _finite(value):
    return (value == value) & (tl.abs(value) != float("inf"))


@triton.jit
def _store(found, at, count, total, square, centred, inside):
    """The sums, 1/‖x − x̄‖ and 1/‖x‖; NaN where a match is undefined (`kernels.match.lengths_of`)."""
    finite = _finite(square)
    pearson = tl.where(finite & (centred > square * CONSTANT), 1.0 / tl.sqrt(centred), float("nan"))
    cosine = tl.where(finite & (square > 0), 1.0 / tl.sqrt(square), float("nan"))
    tl.store(found + at, total, mask=inside)
    tl.store(found + count + at, square, mask=inside)
    tl.store(found + 2 * count + at, centred, mask=inside)
    tl.store(found + 3 * count + at, pearson, mask=inside)
    tl.store(found + 4 * count + at, cosine, mask=inside)


@triton.jit(do_not_specialize=["vectors", "positions", "groups", "inputs"])
def vector_sums(x, by, found, vectors, positions, groups, inputs, BV: tl.constexpr, BD: tl.constexpr):
    """Those of BV vectors of x (L, S, G, D) with strides `by`; `found` is (5, L, S, G)."""
    vector_v = tl.program_id(0).to(tl.int64) * BV + tl.arange(0, BV)
    inside_v = vector_v < vectors
    g, s, e = vector_v % groups, vector_v // groups % positions, vector_v // groups // positions
    row_v = tl.expand_dims(x + e * by[0] + s * by[1] + g * by[2], 1)
    inside = tl.expand_dims(inside_v, 1)
    total, square, centred = tl.zeros([BV], tl.float64), tl.zeros([BV], tl.float64), tl.zeros([BV], tl.float64)
    for begin in range(0, inputs, BD):
        d = tl.expand_dims((begin + tl.arange(0, BD)).to(tl.int64), 0)
        value = tl.load(row_v + d * by[3], mask=inside & (d < inputs), other=0).to(tl.float64)
        total += tl.sum(value, axis=1)
        square += tl.sum(value * value, axis=1)
    mean = tl.expand_dims(total / inputs, 1)
    for begin in range(0, inputs, BD):
        d = tl.expand_dims((begin + tl.arange(0, BD)).to(tl.int64), 0)
        value = tl.load(row_v + d * by[3], mask=inside & (d < inputs), other=0).to(tl.float64)
        rest = tl.where(d < inputs, value - mean, 0)
        centred += tl.sum(rest * rest, axis=1)
    _store(found, vector_v, vectors.to(tl.int64), total, square, centred, inside_v)


@triton.jit(do_not_specialize=["numbers"])
def references(x, reference_L, numbers, BN: tl.constexpr):
    """The mean of an entry's finite numbers, others counted as 0."""
    e = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BN], tl.float64)
    for begin in range(0, numbers, BN):
        n = begin + tl.arange(0, BN)
        value = tl.load(x + e * numbers + n, mask=n < numbers, other=0).to(tl.float64)
        total += tl.where(_finite(value), value, 0)
    tl.store(reference_L + e, tl.sum(total, axis=0) / numbers)


@triton.jit(do_not_specialize=["entries", "groups", "channels", "pixels"])
def pixel_sums(
    x, reference_L, of_pixel, entries, groups, channels, pixels, BC: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    """Over the channels of a group Σx, Σx², Σ(x − r), Σ(x − r)² of BP pixels, r the reference: (4, L, G, pixels)."""
    own = tl.program_id(1).to(tl.int64)
    reference = tl.load(reference_L + own // groups)
    pixel_p = tl.program_id(0) * BP + tl.arange(0, BP)
    inside_p = pixel_p < pixels
    p, nothing = tl.expand_dims(pixel_p, 0), tl.zeros([BP], tl.float64)
    total, square, shifted, shifted_square = nothing, nothing, nothing, nothing
    for begin in range(0, channels, BC):
        c = tl.expand_dims((begin + tl.arange(0, BC)).to(tl.int64), 1)
        inside = (c < channels) & tl.expand_dims(inside_p, 0)
        value = tl.load(x + (own * channels + c) * pixels + p, mask=inside, other=0).to(tl.float64)
        total += tl.sum(value, axis=0)
        square += tl.sum(value * value, axis=0)
        rest = tl.where(inside, value - reference, 0)
        shifted += tl.sum(rest, axis=0)
        shifted_square += tl.sum(rest * rest, axis=0)
    plane = entries.to(tl.int64) * groups * pixels
    at = of_pixel + own * pixels + pixel_p
    tl.store(at, total, mask=inside_p)
    tl.store(at + plane, square, mask=inside_p)
    tl.store(at + 2 * plane, shifted, mask=inside_p)
    tl.store(at + 3 * plane, shifted_square, mask=inside_p)


@triton.jit(do_not_specialize=["entries", "groups", "channels"])
def window_sums(
    of_pixel, reference_L, found, entries, groups, channels, size, out, taps, step, apart, pad, BP: tl.constexpr
):  # fmt: skip
    """Those of BP windows from their pixels'; size, out, taps, step, apart, pad of both axes; `found` (5, L, S, G)."""
    own = tl.program_id(1).to(tl.int64)
    reference = tl.load(reference_L + own // groups)
    padding, padding_square = 0.0 - reference * channels, reference * reference * channels
    position_p = tl.program_id(0) * BP + tl.arange(0, BP)
    positions, pixels = out[0] * out[1], size[0] * size[1]
    inside_p = position_p < positions
    top, left = position_p // out[1] * step[0] - pad[0], position_p % out[1] * step[1] - pad[1]
    plane = entries.to(tl.int64) * groups * pixels
    nothing = tl.zeros([BP], tl.float64)
    total, square, shifted, shifted_square = nothing, nothing, nothing, nothing
    for tap in range(taps[0] * taps[1]):
        row, column = top + tap // taps[1] * apart[0], left + tap % taps[1] * apart[1]
        inside = inside_p & (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
        at = of_pixel + own * pixels + row * size[1] + column
        total += tl.load(at, mask=inside, other=0)
        square += tl.load(at + plane, mask=inside, other=0)
        shifted += tl.where(inside, tl.load(at + 2 * plane, mask=inside, other=0), padding)
        shifted_square += tl.where(inside, tl.load(at + 3 * plane, mask=inside, other=0), padding_square)
    around = shifted_square < square
    rest = tl.where(around, shifted, total)
    centred = tl.where(around, shifted_square, square) - rest * rest / (channels * taps[0] * taps[1])
    centred = tl.where(centred < 0, 0, centred)
    at = (own // groups * positions + position_p) * groups + own % groups
    _store(found, at, entries.to(tl.int64) * positions * groups, total, square, centred, inside_p)


@triton.jit(do_not_specialize=["vectors", "groups"])
def norms(square_VG, mask_V, found, vectors, groups, HAS_MASK: tl.constexpr, BV: tl.constexpr):
    """How many of BV presentations have a finite ‖x‖ in a group, and Σ‖x‖ over them; `found` is (R, 2, G)."""
    run, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = run * BV + tl.arange(0, BV)
    inside = v < vectors
    norm = tl.sqrt(tl.load(square_VG + v * groups + g, mask=inside, other=float("nan")))
    counted = inside & _finite(norm)
    if HAS_MASK:
        counted = counted & (tl.load(mask_V + v, mask=inside, other=0) != 0)
    at = found + run * 2 * groups + g
    tl.store(at, tl.sum(counted.to(tl.float64), axis=0))
    tl.store(at + groups, tl.sum(tl.where(counted, norm, 0), axis=0))
