"""Prompts: the view words, which name the camera's direction in a prompt, and the table of encoded texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distvsd.errors import PriorError
from distvsd.networks.base import Condition

SIDES = ("front view", "three-quarter view", "side view", "three-quarter back view", "back view")
VIEWS = (*SIDES, *(f"{side} from above" for side in SIDES), "overhead view")
# Within a sector the prior averages over cameras: over all azimuths a cube becomes round, over all elevations it tapers
# below. So the sectors are narrow.
SECTOR_DEG = 45.0  # width of a side's sector; the front's is centred on +x
ABOVE_DEG = 15.0  # elevation from which a view is from above
OVERHEAD_DEG = 45.0  # elevation from which a view is overhead


def view_index(elevation_deg: float, azimuth_deg: float) -> int:
    """Index into VIEWS. Angles in degrees; azimuth 0 is the front, and may exceed a full turn."""
    if elevation_deg >= OVERHEAD_DEG:
        return VIEWS.index("overhead view")
    turn = abs((azimuth_deg + 180.0) % 360.0 - 180.0)
    return int(turn / SECTOR_DEG + 0.5) + len(SIDES) * (elevation_deg >= ABOVE_DEG)


def view_suffix(elevation_deg: float, azimuth_deg: float) -> str:
    """The words for a camera at this elevation and azimuth, such as "front view" for a low one on the +x side."""
    return VIEWS[view_index(elevation_deg, azimuth_deg)]


def view_indices(elevation: Tensor, azimuth: Tensor) -> Tensor:
    """`view_index` of many cameras at once: angles `[N]` in radians, result `[N]` int64."""
    height = elevation.rad2deg()
    turn = ((azimuth.rad2deg() + 180.0) % 360.0 - 180.0).abs()
    side = (turn / SECTOR_DEG + 0.5).long() + len(SIDES) * (height >= ABOVE_DEG)
    return torch.where(height >= OVERHEAD_DEG, VIEWS.index("overhead view"), side)


def with_view(prompt: str, view: str) -> str:
    """The prompt with its view named. The empty prompt stays empty: it means "anything", and has no front."""
    return f"{prompt}, {view}" if prompt else prompt


class PromptTable:
    """Every text a run needs, encoded once, on one device, in the prior's dtype.

    Particles that share a prompt share its rows, so memory grows with the number of different texts.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        negative_prompt: str,
        view_dependent: bool,
        encode: Callable[[Sequence[str]], Condition],
    ) -> None:
        """prompts: one per particle id. encode: U different texts to a condition of U rows; called once, here."""
        if not prompts:
            raise PriorError("a prior was loaded with no prompts; give one per particle (the empty prompt is legal)")
        self.prompts = tuple(prompts)
        rows = [
            [prompt, *(with_view(prompt, view) if view_dependent else prompt for view in VIEWS)]
            for prompt in self.prompts
        ]
        self.texts = tuple(dict.fromkeys([text for row in rows for text in row] + [negative_prompt]))
        position = {text: index for index, text in enumerate(self.texts)}
        self._encoded = encode(self.texts)
        device = self._encoded.text.device
        self._bare = torch.tensor([position[row[0]] for row in rows], device=device)
        self._viewed = torch.tensor([[position[text] for text in row[1:]] for row in rows], device=device)
        self._negative = position[negative_prompt]

    def bare(self, ids: Tensor) -> Condition:
        """The prompts of particles `[N]` without view words, as the score network reads them."""
        return self._encoded[self._bare[ids.to(self._bare.device)]]

    def viewed(self, ids: Tensor, views: Tensor) -> Condition:
        """The prompts of particles `[N]` seen from `views` `[N]`, indices into VIEWS.

        The same as `bare` where the table was made without view-dependent prompts.
        """
        device = self._viewed.device
        return self._encoded[self._viewed[ids.to(device), views.to(device)]]

    def negative(self, count: int) -> Condition:
        """The unconditional text of the guidance, `count` times."""
        return self._encoded[torch.full((count,), self._negative, device=self._bare.device)]

    def ids_of(self, prompts: Sequence[str]) -> list[int]:
        """A particle id for each prompt. Raises PriorError for a prompt that was not encoded."""
        unknown = sorted(set(prompts) - set(self.prompts))
        if unknown:
            raise PriorError(
                f"the prompt {unknown[0]!r} was not given when the prior was loaded, and the text encoder is freed by "
                "now; load the prior with every prompt that will be asked for"
            )
        return [self.prompts.index(prompt) for prompt in prompts]
