"""Guidance: combines the prior's predictions for a prompt and for the negative prompt."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distvsd.networks.base import Condition, Denoiser
from distvsd.vsd.objectives.base import PriorPart

GUIDED: frozenset[PriorPart] = frozenset({"guided"})


@dataclass(frozen=True)
class ClassifierFree:
    """unconditional + scale (conditional - unconditional), arXiv 2207.12598.

    It is applied to the network's outputs, which is the same as applying it to eps: for a fixed x_t, eps is affine in
    the output, whatever the prediction type.
    """

    scale: float

    def outputs(
        self,
        denoiser: Denoiser,
        noisy: Tensor,
        t: Tensor,
        conditional: Condition,
        unconditional: Condition,
        parts: frozenset[PriorPart],
    ) -> dict[PriorPart, Tensor]:
        """The network's own outputs `[N, C, h, w]` float32 for the requested parts, N > 0; one call of the network.

        Where both conditions are needed the call has 2 N rows. With a scale of 1 or 0, "guided" needs only one of them.
        """
        guided = "guided" in parts
        needs_conditional = "conditional" in parts or (guided and self.scale != 0)
        needs_unconditional = "unconditional" in parts or (guided and self.scale != 1)
        found: dict[PriorPart, Tensor] = {}
        if needs_conditional and needs_unconditional:
            rows = noisy.repeat(2, *[1] * (noisy.ndim - 1)), t.repeat(2), unconditional.cat(conditional)
            found["unconditional"], found["conditional"] = denoiser.predict(*rows).chunk(2)
        elif needs_conditional:
            found["conditional"] = denoiser.predict(noisy, t, conditional)
        else:
            found["unconditional"] = denoiser.predict(noisy, t, unconditional)
        if guided:
            found["guided"] = self._combined(found)
        return {part: found[part] for part in parts}

    def _combined(self, outputs: dict[PriorPart, Tensor]) -> Tensor:
        if self.scale == 1:
            return outputs["conditional"]
        if self.scale == 0:
            return outputs["unconditional"]
        unconditional = outputs["unconditional"]
        return unconditional + self.scale * (outputs["conditional"] - unconditional)
