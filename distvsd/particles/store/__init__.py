"""Where the numbers of a rank's particles are between rounds."""

from distvsd.particles.store.base import ParticleStore
from distvsd.particles.store.paged import Paged
from distvsd.particles.store.pages import Paging, at_home_in_memory
from distvsd.particles.store.resident import Resident

__all__ = ["Paged", "Paging", "ParticleStore", "Resident", "at_home_in_memory"]
