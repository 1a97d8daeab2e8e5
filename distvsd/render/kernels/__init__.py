"""Fused kernels in Triton, batched over particles; the plain torch code of `distvsd.render` is what each must equal.

Every file but this one imports Triton when it is loaded, so it is imported where a kernel is used and not before. The
tests run the kernels on the CPU in Triton's interpreter; none of them was run on a GPU yet.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

INTERPRETER = "TRITON_INTERPRET"  # an environment variable that Triton reads once, when it is imported


def what_is_missing(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, and what to do about it; None where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed; install it with `pip install distvsd[cuda]`"
    if device.type != "cuda" and os.environ.get(INTERPRETER) != "1":
        return (
            f"Triton's kernels run on CUDA, not on {device}; to try them on the CPU, thousands of times slower, start "
            f"the program with {INTERPRETER}=1 in the environment"
        )
    return None
