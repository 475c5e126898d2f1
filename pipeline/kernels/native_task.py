"""The native kernel's task as its C++ declares it (cpp/kernel.cpp), and the arrays that its addresses stand for.

Layer 1: ctypes and NumPy. A `Task` does not own what it points to: `Bound` keeps it alive.
"""

from __future__ import annotations

import ctypes

from pipeline.kernels.ranked import STRATA

KINDS = ("greatest", "smallest", "match", "random", "octave")
FORMS = ("pearson", "cosine")
# last places of what is kept: one for each kind before the octaves, then for each octave
BOUNDS = len(KINDS) - 1 + STRATA
# what the columns of the counts are called, in this order
COUNTED = ("n", "nonfinite", "zero", "fired", "rows", "rows_fired")
MOMENTS = ("min", "max", "absolute", "mean", "m2", "m3", "m4")
MATCH_MOMENTS = ("n", "mean", "m2")
# what `a_is` says of a
SAME, RECTIFIED, GIVEN = range(3)
TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}

# units that the kernel takes side by side: there is room for a multiple of them
LANES = 8

_I, _P = ctypes.c_int64, ctypes.c_void_p


class Keeping(ctypes.Structure):
    """How many rows of each kind are kept."""

    _fields_ = [("seed", _I), ("first", _I * 5), ("k", _I * 5), ("uid", _P), ("number", _P), ("positions", _I)]


class Task(ctypes.Structure):
    """One batch, what is wanted of it, and the numbers that grow."""

    _fields_ = [
        ("memory", _P * 3), ("type", _I * 3), ("stride", (_I * 3) * 3),
        ("first_N", _P), ("run_R", _P), ("entry_P", _P), ("index_P", _P),
        ("runs", _I), ("presentations", _I), ("units", _I), ("lanes", _I), ("groups", _I),
        ("sum_GP", _P), ("length_GP", _P * 2),
        ("bias_U", _P), ("mean_U", _P), ("scale_U", _P * 2), ("finite_y", _I),
        ("a_is", _I), ("moments", _I), ("bins", _I), ("forms", _I * 2), ("best_match", _I), ("keeps", _I),
        ("ways", _I), ("classes", _I), ("rows", _I),
        ("keeping", Keeping), ("label_JN", _P),
        ("count_6U", _P), ("z_7U", _P), ("a_7U", _P), ("top_U", _P), ("undefined_FU", _P),
        ("bin_UB", _P), ("match_FU2B", _P), ("match_F23U", _P),
        ("class_n_TJCL", _P), ("class_fired_TJCL", _P), ("class_mean_TJCL", _P), ("class_m2_TJCL", _P),
        ("last_TC", _P), ("places", _I), ("key_UK", _P), ("uid_UK", _P), ("position_UK", _P), ("value_UK3", _P),
    ]  # fmt: skip


class WindowAxis(ctypes.Structure):
    """One axis of a convolution's window."""

    _fields_ = [(name, _I) for name in ("size", "kernel", "stride", "dilation", "before", "after", "out")]


class Windows(ctypes.Structure):
    """A convolution's input, its window, and where the sums over each window go."""

    _fields_ = [
        ("x", _P), ("type", _I), ("entries", _I), ("channels", _I), ("groups", _I), ("stride_entry", _I),
        ("axis", WindowAxis * 3), ("sum_LGS", _P), ("square_LGS", _P), ("centred_LGS", _P),
    ]  # fmt: skip
