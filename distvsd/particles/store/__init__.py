"""Where the numbers of a rank's particles are between rounds."""

from distvsd.particles.store.base import ParticleStore
from distvsd.particles.store.resident import Resident

__all__ = ["ParticleStore", "Resident"]
