"""Guidance: combines the prior's predictions for a prompt and for the negative prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.networks.base import Condition, Denoiser
from distvsd.vsd.objectives.base import PriorPart

GUIDED: frozenset[PriorPart] = frozenset({"guided"})


@dataclass(frozen=True)
class ClassifierFree:
    """unconditional + scale (conditional - unconditional), arXiv 2207.12598.

    It is applied to the network's outputs, which is the same as applying it to eps: for a fixed x_t, eps is affine in
    the output, whatever the prediction type.

    low, high: shares of the range of times, both included, in which it applies; elsewhere the guided prediction is the
    conditional one (arXiv 2404.07724), and a row costs half.
    """

    scale: float
    low: float = 0.0
    high: float = 1.0

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

        Where both conditions are needed the call has 2 N rows, or fewer where guidance does not apply to all times.
        With a scale of 1 or 0, "guided" needs only one of them.
        """
        if parts == GUIDED and self.scale not in (0, 1) and (self.low, self.high) != (0, 1):
            return {"guided": self._where_it_applies(denoiser, noisy, t, conditional, unconditional)}
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

    def _where_it_applies(
        self, denoiser: Denoiser, noisy: Tensor, t: Tensor, conditional: Condition, unconditional: Condition
    ) -> Tensor:
        """The guided outputs of all rows; computes no unconditional ones for particles with no view in the range."""
        first, last = denoiser.process.times(torch.tensor([0.0, 1.0], device=t.device), self.low, self.high)
        applies = (t >= first) & (t <= last)
        views = conditional.views_per_particle
        rows = applies.reshape(-1, views).any(1).repeat_interleave(views).nonzero().squeeze(1)
        both = torch.cat((noisy[rows], noisy)), torch.cat((t[rows], t)), unconditional[rows].cat(conditional)
        without, output = denoiser.predict(*both).split([len(rows), len(t)])
        found: dict[PriorPart, Tensor] = {"unconditional": without, "conditional": output[rows]}
        guided = output.index_copy(0, rows, self._combined(found))
        return torch.where(applies.reshape(-1, *[1] * (noisy.ndim - 1)), guided, output)

    def _combined(self, outputs: Mapping[PriorPart, Tensor]) -> Tensor:
        if self.scale == 1:
            return outputs["conditional"]
        if self.scale == 0:
            return outputs["unconditional"]
        unconditional = outputs["unconditional"]
        return unconditional + self.scale * (outputs["conditional"] - unconditional)
