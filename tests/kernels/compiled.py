"""Compiles the Triton kernels for GPUs without one, and prints what their PTX has that must not be: a JSON line each.

TRITON_INTERPRET=0 python -m tests.kernels.compiled, or with names of some, for the newest capability alone.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.kernels.triton_fold import fold, fold_bins
from pipeline.kernels.triton_pass import Found, Parts, observe
from pipeline.kernels.triton_tile import GIVEN, RECTIFIED, Lengths, Patterns, Shown

CAPABILITIES = (80, 90)
NUMBERS = ("entries", "positions", "units", "per_group", "groups", "blocks", "runs")
PARTS = Parts("*i32", "*fp64", "*fp64", "*i32", "*i32", "*i32", "*fp64")
FOUND = Found("*fp32", "*i32", "*fp32", "*i32", "*fp64", "*i32", "*fp32")
EVERYTHING = dict.fromkeys(("BINS", "PEARSON", "COSINE", "LEAST", "BEST", "OUTPUT"), True)
# as a dense layer's output lies, read with all that there may be; as a convolution's does, with nothing besides
ALL = {"A_IS": GIVEN.value, "HAS_Y": True, "HAS_MASK": True, "HAS_NUMBER": True, "BL": 16, "BS": 1, "BU": 32}
FEW = {"A_IS": RECTIFIED.value, "HAS_Y": False, "HAS_MASK": False, "HAS_NUMBER": False, "BL": 1, "BS": 128, "BU": 4}


def passes() -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Kernel, types of its arguments and constants, by name."""
    found: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {}
    for dtype, constants in (("fp32", ALL), ("bf16", FEW), ("fp16", FEW)):
        of_value, by_value = f"*{dtype}", ("i32", "i32", "i32")
        found[f"observe {dtype}"] = (
            observe,
            {
                "memory": Shown(of_value, of_value, of_value, "*u8", "*i64"),
                "by": Shown(by_value, by_value, by_value, ("i32", "i32"), ("i32", "i32")),
                "lengths": Lengths("*fp64", "*fp64", "*fp64"),
                "patterns": Patterns("*fp64", "*fp64", "*fp64", "*fp64"),
                "parts": PARTS,
                "found": FOUND,
            },
            EVERYTHING | constants,
        )
    state = {"count_4U": "*i64", "z_7U": "*fp64", "a_7U": "*fp64", "match_F6U": "*fp64"}
    of_runs = {"count_R4U": "*i32", "z_R7U": "*fp64", "a_R7U": "*fp64", "match_RF6U": "*fp64"}
    found["fold"] = (fold, state | of_runs, {"PEARSON": True, "COSINE": True, "BR": 32, "BU": 8})
    windows = {"top_U": "*i64", "count_UB": "*i64", "top_RU": "*i32", "count_RUB": "*i32"}
    found["fold_bins"] = (fold_bins, windows | {"new_top_U": "*i64", "new_count_UB": "*i64"}, {"BR": 32})
    return found


def main() -> None:
    everything = len(sys.argv) == 1
    chosen = {name: one for name, one in passes().items() if everything or name in sys.argv[1:]}
    for name, (kernel, types, constants) in chosen.items():
        signature = types | dict.fromkeys(constants, "constexpr")
        signature |= {number: "i32" for number in NUMBERS if number in kernel.arg_names}
        source = ASTSource(fn=kernel, signature={one: signature[one] for one in kernel.arg_names}, constexprs=constants)
        for capability in CAPABILITIES if everything else CAPABILITIES[-1:]:
            options = {"enable_fp_fusion": False, "num_warps": 4}
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            ptx = made.asm["ptx"]
            counts = {"contracted": ptx.count("fma.rn.f64"), "flushed": ptx.count(".ftz"), "bytes": len(ptx)}
            print(json.dumps({"kernel": name, "capability": capability, "cubin": len(made.asm["cubin"]), **counts}))


if __name__ == "__main__":
    main()
