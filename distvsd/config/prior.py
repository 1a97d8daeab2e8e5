"""The teacher: the frozen text-to-image model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distvsd.config.ranges import Increasing, PathText, Range


@dataclass(frozen=True)
class PriorConfig:
    """The frozen text-to-image diffusion model that teaches."""

    path: Annotated[str, PathText()] = "shapes"
    """A diffusers pipeline folder, or `shapes` for the embedded prior."""
    guidance_scale: Annotated[float, Range(0, 1000)] = 7.5
    """Classifier-free guidance of the prior; 1 turns it off and halves the UNet's work."""
    guidance_range: Annotated[tuple[float, float], Range(0, 1), Increasing()] = (0.0, 1.0)
    """Shares of the timesteps between which there is guidance, both included. Outside of it a sample takes half of the
    prior's work (arXiv 2404.07724). [0, 1] guides at all times."""
    view_dependent: bool = True
    """Whether the prior's prompt names the camera's view: the side, from above or not, or overhead."""
    negative_prompt: str = ""
    """Prompt of the unconditional half of the guidance."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the frozen networks."""
