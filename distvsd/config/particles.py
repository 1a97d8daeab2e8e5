"""What is optimised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distvsd.config.gaussians import GaussiansConfig
from distvsd.config.mesh import MeshConfig
from distvsd.config.occupancy import OccupancyConfig
from distvsd.config.ranges import Betas, Count, Increasing, Measured, Positive, Range, Share, Weight
from distvsd.config.schedule import Schedule


@dataclass(frozen=True)
class ImageConfig:
    """Image particles; their size is render.resolution."""

    space: Literal["pixel", "latent"] = "pixel"
    """What is optimised: pixels, or the prior's latents."""
    init_scale: Weight = 0.1
    """Standard deviation of the noise on the initial values (mid grey, or latents of 0 where init_color is 0)."""
    init_color: Weight = 0.0
    """A particle begins as a picture of one colour: mid grey plus a uniform RGB offset of this half-width."""


@dataclass(frozen=True)
class NerfConfig:
    """Radiance fields on a multi-resolution hash grid."""

    levels: Annotated[int, Range(1, 32)] = 16
    """Number of grid levels, geometric from base_resolution to max_resolution."""
    features: Annotated[int, Range(1, 16)] = 2
    """Numbers stored per grid entry."""
    log2_table_size: Annotated[int, Range(4, 28)] = 19
    """Binary logarithm of the most entries a level may have; coarser levels that fit are dense."""
    base_resolution: Annotated[int, Range(2, 4096)] = 16
    """Grid vertices along an edge of the coarsest level."""
    max_resolution: Annotated[int, Range(2, 65536)] = 2048
    """Grid vertices along an edge of the finest level; at least base_resolution."""
    smoothstep: bool = True
    """Smooth interpolation between vertices instead of trilinear."""
    samples_per_ray: Annotated[int, Range(1, 4096)] = 128
    """Points at which a ray reads the field."""
    bound: Annotated[float, Range(0, 1000, above=True)] = 1.0
    """Half the edge of the cube that holds the scene, world units."""
    density_scale: Annotated[float, Range(0, 1000, above=True)] = 1.0
    """Factor on the density after its softplus; above 1, matter is opaque and edges are sharp after fewer rounds."""
    blob_density: Annotated[float, Range(-1000, 1000)] = 10.0
    """Initial density at the centre before its softplus; negative makes a hollow scene."""
    blob_radius: Annotated[float, Range(0, 1000, above=True)] = 0.5
    """Radius at which the initial density before its softplus changes sign, world units."""
    init: Literal["blob", "object_in_scene"] = "blob"
    """blob: an object, or a hollow scene; object_in_scene: a blob inside a hollow scene, the larger of both before the
    softplus."""
    shell_density: Annotated[float, Range(-1000, 0, below=True)] = -10.0
    """Read when init is object_in_scene: as blob_density, of the hollow scene."""
    shell_radius: Annotated[float, Range(0, 1000, above=True)] = 2.5
    """Read when init is object_in_scene: as blob_radius, of the hollow scene; larger than that of the blob."""
    init_scale: Weight = 1e-4
    """Half-width of the uniform initial values of the grid."""
    init_color: Weight = 0.0
    """Half-width of the uniform initial colour of a particle, before its sigmoid; 0 is mid grey for all."""
    density_noise: Weight = 0.0
    """Standard deviation of the noise added to the density before its activation."""
    entropy: Weight = 0.0
    """Weight of a binary entropy that pushes the quantity in entropy_of to 0 or 1."""
    entropy_of: Literal["opacity", "weights"] = "opacity"
    """opacity: of each ray, in nats; weights: of each sample on a ray, in bits, as the paper's code has it."""
    sparsity: Weight = 0.0
    """Weight of the opacity's mean over its root mean square (pushes faint matter away, solid matter not)."""
    coverage: Weight = 0.0
    """Weight of the logarithm by which an object's mean opacity is outside coverage_range; 0 for rooms."""
    coverage_range: Annotated[tuple[float, float], Range(0, 1, above=True, below=True), Increasing()] = (0.1, 0.7)
    """Share of a view that an object may cover, [low, high]."""
    background: Literal["learned", "none"] = "learned"
    """learned: a small network of the viewing direction; none: black, or the random colour."""
    random_background: Share = 0.5
    """Share of the views drawn before a random solid colour."""
    random_background_kind: Literal["color", "grey"] = "color"
    """Random solid backgrounds are any colour, or grey levels."""
    occupancy: OccupancyConfig = OccupancyConfig()
    """Which parts of the cube training renders read; not read for a mesh, which is a surface."""


@dataclass(frozen=True)
class HealthConfig:
    """What happens to a particle whose gradients are not finite."""

    max_bad: Positive = 10
    """Rounds in a row without a finite gradient after which a particle goes back to its last good state."""
    max_restores: Count = 2
    """Times a particle goes back before it is quarantined: from then on it is frozen and left out of training."""
    restore_rate: Annotated[float, Range(0, 1, above=True)] = 0.5
    """Factor on a particle's learning rates each time it goes back."""
    good_every: Positive = 50
    """Rounds between good states. A save between two of them holds every particle twice, so choose a divisor of
    checkpoint.every."""


@dataclass(frozen=True)
class ParticlesConfig:
    """What is optimised, how many, and how fast."""

    kind: Literal["nerf", "gaussians", "image", "mesh"] = "nerf"
    """Radiance fields, sets of 3-D gaussians, images (the 2-D experiment), or triangle meshes."""
    count: Annotated[int, Range(1, 2**31 - 1)] = 8
    """Number of particles over all ranks; fewer than ranks is legal."""
    views: Positive = 1
    """Views rendered per particle and round."""
    resident: Count = 0
    """Most particles of all ranks that are on the devices at once; 0 is all. With fewer than count, they take turns:
    each takes part in every n-th round, n = count / resident rounded up, and is in host memory between its turns."""
    host: Count = 0
    """Where particles take turns: most particles of all ranks that are kept in host memory, 0 for all; the others are
    in files. A particle that has a good state is kept twice."""
    page_dir: str = ""
    """An existing folder for those files, such as one on a local disk; empty: pages in run.dir."""
    micro_batch: Measured = "auto"
    """Particles that a rank renders and moves in one go; 0 is all of them. auto: of 1, 2, 4, ... what takes the least
    time and fits, measured in the first rounds and noted in the checkpoint. The memory of a round is that of one such
    group. numerics exact always takes 1; parallel.strategy other than flat holds all groups of a round at once."""
    recompute: bool = False
    """Renders and their encoding are computed again in the backward pass instead of kept. The result has the same bits;
    memory is that of one render call without its graph, and rendering takes twice the time."""
    learning_rate: Annotated[Schedule, Range(0, 10)] = Schedule(((0, 0.01),))
    """Adam's rate for grids and pixels; gaussians have factors on it."""
    network_learning_rate: Annotated[Schedule, Range(0, 10)] = Schedule(((0, 0.001),))
    """Adam's rate for the small networks of a particle."""
    betas: Betas = (0.9, 0.99)
    """Adam's decay rates of the two moments."""
    eps: Annotated[float, Range(0, 1, above=True)] = 1e-15
    """Adam's epsilon."""
    image: ImageConfig = ImageConfig()
    """Read when kind is image."""
    nerf: NerfConfig = NerfConfig()
    """Read when kind is nerf; of a mesh, the field that colours it, its bound and its background."""
    gaussians: GaussiansConfig = GaussiansConfig()
    """Read when kind is gaussians."""
    mesh: MeshConfig = MeshConfig()
    """Read when kind is mesh."""
    health: HealthConfig = HealthConfig()
    """What happens to particles that stop being finite."""

    @property
    def turns(self) -> int:
        """Each particle takes part in every so many-th round."""
        return -(-self.count // self.resident) if self.resident else 1

    @property
    def active(self) -> int:
        """The most particles of all ranks that take part in a round."""
        return -(-self.count // self.turns)

    @property
    def in_memory(self) -> int:
        """Of all ranks, where they take turns, how many are kept in host memory; the others are in files."""
        return min(self.host, self.count) if self.host else self.count
