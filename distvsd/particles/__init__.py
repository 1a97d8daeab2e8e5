"""What is optimised: kinds of particles, and the ensemble of them that a rank owns."""

from distvsd.particles.base import Keys, Parameters, Particle, Rendered
from distvsd.particles.ensemble import Ensemble, Update, Views
from distvsd.particles.image import ImageParticle
from distvsd.particles.nerf import NerfParticle

__all__ = [
    "Ensemble",
    "ImageParticle",
    "Keys",
    "NerfParticle",
    "Parameters",
    "Particle",
    "Rendered",
    "Update",
    "Views",
]
