"""Gaussian particles: how many gaussians, how they begin, how fast they move and how they grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distvsd.config.ranges import Count, Increasing, Range, Weight

Factor = Annotated[float, Range(0, 1000)]
Opacity = Annotated[float, Range(0, 1, above=True, below=True)]


@dataclass(frozen=True)
class GaussiansConfig:
    """Sets of 3-D gaussians of a fixed size, with growth by relocation (arXiv 2404.09591)."""

    capacity: Annotated[int, Range(1, 2**24)] = 10000
    """Gaussians of a particle; the number never changes. Those below min_opacity are moved where others are."""
    init_radius: Annotated[float, Range(0, 1000, above=True)] = 0.5
    """The first means are drawn evenly from a ball of this radius, world units."""
    init_scale: Annotated[float, Range(0, 100, above=True)] = 1.0
    """First standard deviation of a gaussian in units of the mean spacing of the first means."""
    init_opacity: Opacity = 0.1
    """First opacity of a gaussian."""
    init_color: Weight = 0.0
    """Half-width of the uniform initial colour of a particle, before its sigmoid; 0 is mid grey for all."""
    bound: Annotated[float, Range(0, 1000, above=True)] = 1.0
    """Half the edge of the cube from which means are drawn where another kind of particle is handed over."""
    means_rate: Factor = 0.1
    """Rate of the means, world units, as a factor on particles.learning_rate."""
    scales_rate: Factor = 0.5
    """The same of the logarithms of the standard deviations."""
    rotations_rate: Factor = 0.5
    """The same of the quaternions."""
    opacities_rate: Factor = 5.0
    """The same of the opacities before their sigmoid."""
    colors_rate: Factor = 1.0
    """The same of the colours before their sigmoid."""
    relocate_every: Count = 100
    """Rounds between relocations of those below min_opacity; 0 for never."""
    min_opacity: Opacity = 0.005
    """Opacity below which a gaussian is dead: it is relocated, and copies keep at least this much. Below
    init_opacity."""
    noise: Weight = 0.0
    """Weight of the noise on the means of gaussians about as faint as min_opacity, each round. The paper has 5e5 at a
    rate of 1.6e-4 for the means, which is 80 in all."""
    opacity: Weight = 0.0
    """Weight of the mean opacity of the gaussians (those that no view needs fade and are relocated)."""
    scale: Weight = 0.0
    """Weight of the mean standard deviation of the gaussians, per world unit."""
    sparsity: Weight = 0.0
    """Weight of the rendered opacity's mean over its root mean square (pushes faint matter away, solid matter not)."""
    coverage: Weight = 0.0
    """Weight of the logarithm by which an object's mean opacity is outside coverage_range; 0 for rooms."""
    coverage_range: Annotated[tuple[float, float], Range(0, 1, above=True, below=True), Increasing()] = (0.1, 0.7)
    """Share of a view that an object may cover, [low, high]."""
    random_background_kind: Literal["color", "grey"] = "color"
    """Every view is drawn before a random solid background: any colour, or grey levels."""
