"""Compiles every kernel for a GPU of capability 9.0, without one; prints the memory instructions of each as JSON.

Run by test_compile.py in a process of its own, because Triton's interpreter and its compiler exclude each other.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distvsd.render.kernels import composite, hashgrid, march

TARGET = GPUTarget("cuda", 90, 32)
ENCODING = {"FEATURES": 2, "WIDTH": 2, "LEVELS": 16, "SMOOTH": True, "BLOCK": hashgrid.BLOCK}
UNEVEN = ENCODING | {"FEATURES": 3, "WIDTH": 4, "SMOOTH": False}
COUNTING = dict.fromkeys(("ray_of", "step_of", "starts", "ends"))
LONG = {"layout", "counts", "ray_of", "step_of"}  # int64; the pointers beside them are float32
NUMBERS = {"count", "num_entries", "table_size", "rays", "size", "num_samples"}
FRACTIONS = {"bound", "edge", "per_unit"}


def type_of(kernel: Any, name: str) -> str:
    if name in NUMBERS:
        return "i32"
    if name in FRACTIONS:
        return "fp32"
    if name == "cells":
        return "*u8"
    is_long = name in LONG or (name == "ends" and kernel.__module__.endswith("composite"))
    return "*i64" if is_long else "*fp32"


def instructions(kernel: Any, constants: dict[str, Any], warps: int = 4) -> dict[str, int]:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else type_of(kernel, name) for name in names}
    # What the launcher finds out by itself: torch's memory begins at multiples of 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    made = triton.compile(source, target=TARGET, options={"num_warps": warps})
    assert made.asm["cubin"], f"{kernel.__name__} was not assembled"
    return dict(Counter(re.findall(r"\b((?:ld|st|atom|red)\.global\S*)", made.asm["ptx"])))


print(
    json.dumps(
        {
            "read": instructions(hashgrid._read, ENCODING),
            "read, 3 features": instructions(hashgrid._read, UNEVEN),
            "add": instructions(hashgrid._add, ENCODING),
            "add, 3 features": instructions(hashgrid._add, UNEVEN),
            "add, tables only": instructions(hashgrid._add, ENCODING | {"to_points": None}),
            "add, points only": instructions(hashgrid._add, ENCODING | {"to_entries": None}),
            "march, counting": instructions(march._walk, {"BLOCK": march.BLOCK} | COUNTING),
            "march, writing": instructions(march._walk, {"BLOCK": march.BLOCK}),
            "composite": instructions(composite._walk, {"BLOCK": composite.BLOCK}, warps=1),
            "composite, backward": instructions(composite._walk_back, {"BLOCK": composite.BLOCK}, warps=1),
        }
    )
)
