"""Both sides of a slice's products as tiles for a processor's matrix unit (AMX): see cpp/tiled.h.

Layer 1: torch and ctypes. float32 products of float32's accuracy, of three bfloat16 numbers for each of float32; 32
presentations are multiplied at once, which are 32 entries at one position, so that windows need no copies.

Shapes as in `pooled.py`; A places of a padded image, K taps, T steps of 32 presentations, C channels of a group.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch

from pipeline.input_forms import Windows, WindowShape
from pipeline.kernels import native_tiles
from pipeline.kernels.native_tiles import DEEP, PIECES, LeftTiles, RightTiles, TileProducts, TileTaps, step_bytes
from pipeline.kernels.operands import LeftSums, Operands, RightSums
from pipeline.sites import Presentations

# bytes of the tiles of a slice, 64 MiB: of each thread the most that a slice needed is kept, to be written over
TILE_BYTES = 1 << 26
# presentations of a slice, unless 32 entries have more
LARGEST = 1 << 15
# share of the tiles' numbers that must be in use: the unit is 2 to 4 times as fast as the processor without it
LEAST_USE = 0.5
# channels from which windows are tiles of their input; fewer use little of a tile, and are little to copy as windows
LEAST_CHANNELS = DEEP // 2


class Places(NamedTuple):
    """Where things lie: of each pixel, whether a place is padding, of each position, and how much further each tap."""

    place_P: torch.Tensor
    pad_A: torch.Tensor
    place_S: torch.Tensor
    place_K: torch.Tensor


class Form(Enum):
    """How x is laid: as windows of its entries, as explicit inputs of entries and positions, or of presentations."""

    WINDOWS = auto()
    POSITIONS = auto()
    FLAT = auto()


@dataclass(frozen=True, eq=False)
class Plan:
    """How a batch is multiplied by tiles, so many entries at a time."""

    shown: Presentations
    fired: bool
    form: Form
    step: int

    def slices(self) -> Iterator[tuple[int, int]]:
        """Runs of entries."""
        for start in range(0, self.shown.entries, self.step):
            yield start, min(start + self.step, self.shown.entries)

    def operands(self, start: int, stop: int) -> Tiled | None:
        """The operands of entries start … stop; None where nothing is left of them, or z is not finite."""
        shown, groups = self.shown, self.shown.site.groups
        z_LSU, a_LSU = shown.z_LSU[start:stop], shown.a_LSU[start:stop]
        if self.form is Form.WINDOWS:
            assert shown.windows is not None
            windows = shown.windows(start, stop)
            x_LPC, places = windows.x_LCs.flatten(2).transpose(1, 2), places_of(windows)
        else:
            x_LPC = shown.patches(start, stop).flatten(2)
            if self.form is Form.FLAT:
                kept_LS = None if shown.mask_LS is None else shown.mask_LS[start:stop]
                z_LSU, a_LSU, x_LPC = (_flat(one, kept_LS) for one in (z_LSU, a_LSU, x_LPC))
            places = _unpadded(x_LPC.shape[1])
        if a_LSU.shape[0] == 0:
            return None
        memory = _Memory(self._bytes(a_LSU, len(places.pad_A), x_LPC.shape[2] // groups))
        z_is_a = shown.z_LSU is shown.a_LSU and not self.fired
        left = _left(None if z_is_a else z_LSU, a_LSU, groups, memory, fired=self.fired)
        return None if left is None else Tiled(left, _right(x_LPC, groups, memory, places, self.form), places)

    def _bytes(self, a_LSU: torch.Tensor, places: int, inputs: int) -> int:
        site, (entries, positions, units) = self.shown.site, a_LSU.shape
        block = _block_bytes(positions, units // site.groups, places, inputs, fired=self.fired)
        return site.groups * -(-entries // DEEP) * block


def plan(shown: Presentations, *, fired: bool) -> Plan | None:
    """How to multiply a batch by tiles; None where that is not possible, or not worth it."""
    site, values = shown.site, (shown.z_LSU, shown.a_LSU)
    if native_tiles.kernel() is None or any(one.device.type != "cpu" or one.dtype != torch.float32 for one in values):
        return None
    units, entries, positions = site.units // site.groups, shown.entries, shown.positions
    windows = None if shown.windows is None or shown.mask_LS is not None else shown.windows(0, 0)
    channels = 0 if windows is None else windows.x_LCs.shape[1] // site.groups
    if windows is not None and (channels >= LEAST_CHANNELS or channels == site.fan_in):
        form, deep, places, inputs = Form.WINDOWS, entries, len(places_of(windows).pad_A), channels
    elif shown.mask_LS is not None or all(_flattens(one) for one in values):
        form, deep, places, inputs = Form.FLAT, entries * positions, 1, site.fan_in
    else:
        form, deep, places, inputs = Form.POSITIONS, entries, positions, site.fan_in
    if _use(inputs) * _use(units) * _use(deep) < LEAST_USE or not all(_readable(one) for one in values):
        return None
    at_once = 1 if form is Form.FLAT else positions
    blocks = TILE_BYTES // (site.groups * _block_bytes(at_once, units, places, inputs, fired=fired))
    if form is Form.FLAT:
        step = min(DEEP * blocks // positions, max(1, LARGEST // positions))
    else:
        step = DEEP * min(blocks, max(1, LARGEST // (DEEP * positions)))
    return Plan(shown, fired, form, step) if step else None


def _block_bytes(positions: int, units: int, places: int, inputs: int, *, fired: bool) -> int:
    """Bytes of a group's tiles of 32 entries, both sides."""
    return positions * (step_bytes(units) + fired * step_bytes(units, 1)) + places * step_bytes(inputs)


def _use(n: int) -> float:
    """Share of the numbers of tiles, two side by side, that n of them use."""
    return n / (-(-n // DEEP) * DEEP) if n else 0.0


def _flattens(value_LSU: torch.Tensor) -> bool:
    entries, positions, _ = value_LSU.shape
    return entries == 1 or positions == 1 or value_LSU.stride(0) == positions * value_LSU.stride(1)


def _readable(value_LSU: torch.Tensor) -> bool:
    """Whether units or positions lie side by side."""
    return value_LSU.stride(2) == 1 or (value_LSU.stride(1) == 1 and value_LSU.shape[1] > 1)


def _flat(value_LSV: torch.Tensor, kept_LS: torch.Tensor | None) -> torch.Tensor:
    """Presentations as entries of one position."""
    value_PV = value_LSV.flatten(0, 1) if kept_LS is None else value_LSV[kept_LS]
    return value_PV[:, None]


def places_of(windows: Windows) -> Places:
    """Where the windows of an input lie in its padded image."""
    return _padded(windows.shape, tuple(windows.x_LCs.shape[2:]))


@lru_cache(maxsize=256)
def _unpadded(positions: int) -> Places:
    place = torch.arange(positions)
    return Places(place, torch.zeros(positions, dtype=torch.uint8), place, torch.zeros(1, dtype=torch.int64))


@lru_cache(maxsize=256)
def _padded(shape: WindowShape, sizes: tuple[int, ...]) -> Places:
    # cached beyond the batch, and outside inference mode too
    with torch.inference_mode(False):
        whole = [size + before + after for size, (before, after) in zip(sizes, shape.padding, strict=True)]
        place_s = torch.arange(math.prod(whole)).view(whole)
        out, inside, taps = place_s, place_s, place_s
        for axis, (size, (before, _)) in enumerate(zip(sizes, shape.padding, strict=True)):
            span = shape.dilation[axis] * (shape.kernel[axis] - 1) + 1
            last = whole[axis] - span + 1
            inside = inside.narrow(axis, before, size)
            out = out.narrow(axis, 0, last).index_select(axis, torch.arange(0, last, shape.stride[axis]))
            taps = taps.narrow(axis, 0, span).index_select(axis, torch.arange(0, span, shape.dilation[axis]))
        pad_A = torch.ones(place_s.numel(), dtype=torch.uint8)
        pad_A[inside.flatten()] = 0
        return Places(*(one.flatten().contiguous() for one in (inside, pad_A, out, taps)))


class _Memory:
    """Hands out the tiles' memory of this thread from its begin on: new pages cost more than the numbers in them."""

    _kept: ClassVar[threading.local] = threading.local()

    def __init__(self, size: int) -> None:
        known = vars(self._kept)
        if len(known.get("bytes", b"")) < size:
            # anonymous memory begins a page, so that tiles do not straddle lines
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError, AttributeError):
                # tiles of one product lie far from each other: hundreds of small pages
                memory.madvise(mmap.MADV_HUGEPAGE)
            known["bytes"] = memory
            known["address"] = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._address: int = known["address"]

    def take(self, size: int) -> int:
        """The address of so many bytes, a multiple of 64."""
        address = self._address
        self._address += size
        return address


class _LaidLeft(NamedTuple):
    sums: LeftSums
    rest_G: list[int]
    fired_G: list[int]
    steps: int
    entries: int


def _left(
    z_LSU: torch.Tensor | None, a_LSU: torch.Tensor, groups: int, memory: _Memory, *, fired: bool
) -> _LaidLeft | None:
    entries, positions, units = *a_LSU.shape[:2], a_LSU.shape[2] // groups
    steps = -(-entries // DEEP) * positions
    about_Gu = torch.empty((groups, units), dtype=torch.float32)
    sums_4Gu = torch.empty((4, groups, units), dtype=torch.float64)
    kernel = native_tiles.kernel()
    assert kernel is not None
    rest_G, fired_G = [], []
    for group in range(groups):
        rest_G.append(memory.take(steps * step_bytes(units)))
        fired_G.append(memory.take(steps * step_bytes(units, 1)) if fired else 0)
        at = slice(group * units, (group + 1) * units)
        a, z = a_LSU[..., at], None if z_LSU is None else z_LSU[..., at]
        rest_U, square_U, fired_U, rate_U = (one[group].data_ptr() for one in sums_4Gu)
        done = kernel.left_tiles(
            LeftTiles(
                z=None if z is None else z.data_ptr(), a=a.data_ptr(),
                entries=entries, positions=positions, units=units,
                z_step=native_tiles.steps(a if z is None else z), a_step=native_tiles.steps(a),
                rest=rest_G[group], fired=fired_G[group] or None, about_U=about_Gu[group].data_ptr(),
                rest_U=rest_U, square_U=square_U, fired_U=fired_U, rate_U=rate_U,
            )
        )  # fmt: skip
        if done:
            return None
    rest_Gu, square_Gu, fired_Gu, rate_Gu = sums_4Gu
    n, still_Gu = entries * positions, square_Gu == 0
    if fired:
        sums = LeftSums(n, about_Gu, rest_Gu, square_Gu, fired_Gu, rate_Gu, still_Gu)
    else:
        sums = LeftSums(n, about_Gu, rest_Gu, square_Gu, None, None, still_Gu)
    return _LaidLeft(sums, rest_G, fired_G, steps, entries)


class _LaidRight(NamedTuple):
    sums: RightSums
    rest_G: list[int]
    rest_GKC: torch.Tensor


def _right(x_LPC: torch.Tensor, groups: int, memory: _Memory, places: Places, form: Form) -> _LaidRight:
    entries, pixels, channels = *x_LPC.shape[:2], x_LPC.shape[2] // groups
    if not _readable(x_LPC):
        x_LPC = x_LPC.contiguous()
    count, taps, positions = len(places.pad_A), len(places.place_K), len(places.place_S)
    sum_AC = torch.empty((count, channels), dtype=torch.float64)
    square_A = torch.empty(count, dtype=torch.float64)
    rest_GKC = torch.zeros((groups, taps, channels), dtype=torch.float64)
    square_G = torch.zeros(groups, dtype=torch.float64)
    # windows stay where they are: padding is 0
    about_GC = None if form is Form.WINDOWS else torch.empty((groups, channels), dtype=torch.float32)
    kernel = native_tiles.kernel()
    assert kernel is not None
    rest_G = []
    for group in range(groups):
        rest_G.append(memory.take(-(-entries // DEEP) * count * step_bytes(channels)))
        x = x_LPC[..., group * channels : (group + 1) * channels]
        sum_AC.zero_(), square_A.zero_()
        kernel.right_tiles(
            RightTiles(
                x=x.data_ptr(), entries=entries, pixels=pixels, channels=channels, places=count,
                step=native_tiles.steps(x), place_P=places.place_P.data_ptr(), pad_A=places.pad_A.data_ptr(),
                about_C=None if about_GC is None else about_GC[group].data_ptr(), rest=rest_G[group],
                sum_AC=sum_AC.data_ptr(), square_A=square_A.data_ptr(),
            )
        )  # fmt: skip
        kernel.tile_taps(
            TileTaps(
                place_S=places.place_S.data_ptr(), place_K=places.place_K.data_ptr(), positions=positions, taps=taps,
                channels=channels, sum_AC=sum_AC.data_ptr(), square_A=square_A.data_ptr(),
                sum_KC=rest_GKC[group].data_ptr(), square=square_G[group].data_ptr(),
            )
        )  # fmt: skip
    far_G = torch.zeros_like(square_G)
    if about_GC is None:
        far_G = rest_GKC.square().sum((1, 2)) / (entries * positions)
    sums = RightSums(about_GC, square_G, far_G, taps if form is Form.WINDOWS else None)
    return _LaidRight(sums, rest_G, rest_GKC)


class Tiled(Operands):
    """Tiles of both sides, in memory that the next slice's are written to."""

    def __init__(self, left: _LaidLeft, right: _LaidRight, places: Places) -> None:
        self.left, self.right = left.sums, right.sums
        self._left, self._right, self._places = left, right, places

    def add_to(self, product_GMD: torch.Tensor) -> torch.Tensor:
        """See `Operands`."""
        left, right, places = self._left, self._right, self._places
        rest_GKC = right.rest_GKC
        place_T = _steps(places, -(-left.entries // DEEP))
        kernel = native_tiles.kernel()
        assert kernel is not None
        units = left.sums.about_Gu.shape[1]
        for group, product_MD in enumerate(product_GMD):
            sides = [(PIECES, left.rest_G[group], product_MD)]
            if left.sums.fired_Gu is not None:
                sides.append((1, left.fired_G[group], product_MD[units:]))
            for pieces, address, rows_UD in sides:
                kernel.tile_products(
                    TileProducts(
                        left=address, right=right.rest_G[group], pieces=pieces, steps=left.steps, units=units,
                        channels=rest_GKC.shape[2], taps=rest_GKC.shape[1], place_T=place_T.data_ptr(),
                        place_K=places.place_K.data_ptr(), product_UKC=rows_UD.data_ptr(),
                    )
                )  # fmt: skip
        return rest_GKC.flatten(1)


def _steps(places: Places, blocks: int) -> torch.Tensor:
    """The place of every step's position in the images of its block of entries."""
    return (len(places.pad_A) * torch.arange(blocks)[:, None] + places.place_S).flatten()
