"""Checks a tensor that was read from a file: its dtype, its shape, the range of its values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.errors import CheckpointError

# No run reaches this count, and counting on from it does not overflow 64 bits.
MOST = 2**53
_NAMED = 3  # misfits named in an error message


@dataclass(frozen=True)
class Wanted:
    """low, high: inclusive limits of the values; NaN is outside of every limit. finite: no NaN, no infinity.

    With neither limits nor `finite`, the values are not checked.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    low: float = -math.inf
    high: float = math.inf
    finite: bool = False

    def misfit(self, found: Tensor | None) -> str | None:
        """A message that says what the tensor is and what it must be; None where it fits."""
        wanted = _named(self.dtype, self.shape)
        if found is None:
            return f"is missing, and must be {wanted}"
        if found.dtype != self.dtype or tuple(found.shape) != self.shape:
            return f"is {_named(found.dtype, found.shape)}, and must be {wanted}"
        limited = self.finite or self.low > -math.inf or self.high < math.inf
        if not limited or not found.numel():
            return None
        least, most = (end.item() for end in torch.aminmax(found))  # both are NaN where any value is
        if self.low <= least and most <= self.high and not (self.finite and math.isinf(max(-least, most))):
            return None
        return f"has values from {least} to {most}, and must have {self._range()}"

    def _range(self) -> str:
        kind = "finite values" if self.finite else "values"
        if self.high < math.inf:
            return f"{kind} from {self.low} to {self.high}"
        return f"{kind} of at least {self.low}" if self.low > -math.inf else kind


def refuse_misfits(where: str, wanted: Mapping[str, Wanted], found: Mapping[str, Tensor], advice: str) -> None:
    """Raises CheckpointError that names the tensors that do not fit; those not in `wanted` are not checked."""
    misfits = [f"{name} {said}" for name, want in wanted.items() if (said := want.misfit(found.get(name)))]
    if misfits:
        more = f"; and {len(misfits) - _NAMED} more" if len(misfits) > _NAMED else ""
        raise CheckpointError(f"{where}: {'; '.join(misfits[:_NAMED])}{more}; {advice}")


def _named(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
