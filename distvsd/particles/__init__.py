"""What is optimised: kinds of particles, and the ensemble of them that a rank owns."""

from distvsd.particles.base import (
    Adapted,
    Adaptive,
    Colored,
    Cost,
    Handed,
    HandedRows,
    Keys,
    Parameters,
    Particle,
    Rendered,
    Splatted,
)
from distvsd.particles.ensemble import Ensemble, Update, Views
from distvsd.particles.gaussians import GaussianParticle
from distvsd.particles.image import ImageParticle
from distvsd.particles.mesh import MeshParticle
from distvsd.particles.nerf import NerfParticle
from distvsd.particles.store import Paged, Paging, ParticleStore, Resident

__all__ = [
    "Adapted",
    "Adaptive",
    "Colored",
    "Cost",
    "Ensemble",
    "GaussianParticle",
    "Handed",
    "HandedRows",
    "ImageParticle",
    "Keys",
    "MeshParticle",
    "NerfParticle",
    "Paged",
    "Paging",
    "Parameters",
    "Particle",
    "ParticleStore",
    "Rendered",
    "Resident",
    "Splatted",
    "Update",
    "Views",
]
