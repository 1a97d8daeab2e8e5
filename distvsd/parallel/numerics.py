"""What `parallel.numerics: exact` asks of torch itself."""

from __future__ import annotations

import os

import torch


def fix_order_of_sums(device: torch.device) -> None:
    """Makes torch add in one order, for this process and all that it computes from now on."""
    if device.type == "cpu":
        # torch may split a sum by the number of threads, and that depends on how many ranks share a machine.
        torch.set_num_threads(1)
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix is multiplied
    # Only warnings: torch counts cumsum among what has no fixed order, though it splits one shape one way.
    torch.use_deterministic_algorithms(True, warn_only=True)
