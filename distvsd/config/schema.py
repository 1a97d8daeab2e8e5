"""What a run is made of: one frozen dataclass a section, with type, range, default and meaning beside each field.

The loader, the reference of all fields and the round trip to YAML are driven by these annotations alone: a new field
is one line here with its docstring below it. Nothing in this package imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distvsd.config.ranges import Angles, Betas, Count, Increasing, PathText, Positive, Range, Rate, Share, Weight
from distvsd.config.schedule import Schedule


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and what makes its random numbers."""

    dir: Annotated[str, PathText()] = "runs/default"
    """The run directory itself, made if missing; relative to where the command is started."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Key of every random stream of the run."""


@dataclass(frozen=True)
class PriorConfig:
    """The frozen text-to-image diffusion model that teaches."""

    path: Annotated[str, PathText()] = "shapes"
    """A diffusers pipeline folder, or `shapes` for the embedded prior."""
    guidance_scale: Annotated[float, Range(0, 1000)] = 7.5
    """Classifier-free guidance of the prior; 1 is none and halves the UNet's work."""
    view_dependent: bool = True
    """Whether the prior's prompt names the view the camera has: its side, whether from above, overhead."""
    negative_prompt: str = ""
    """Prompt of the unconditional half of the guidance."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the frozen networks."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The gradient the particles follow."""

    kind: Literal["vsd", "sds", "esd"] = "vsd"
    """vsd: variational score distillation; sds: added noise instead of the score network; esd: entropic."""
    esd_lambda: Share = 0.5
    """ESD only: share of the score that does not see the camera; 0 is VSD."""
    t_min: Annotated[Schedule, Range(0, 1)] = Schedule(((0, 0.02),))
    """Lower end of the particles' diffusion time, as a share of all timesteps."""
    t_max: Annotated[Schedule, Range(0, 1)] = Schedule(((0, 0.98),))
    """Upper end of the particles' diffusion time, as a share of all timesteps; never below t_min."""


@dataclass(frozen=True)
class ImageConfig:
    """Image particles; their size is render.resolution."""

    space: Literal["pixel", "latent"] = "pixel"
    """What is optimised: pixels, or the prior's latents."""
    init_scale: Weight = 0.1
    """Standard deviation of the noise on the initial values (mid grey, or latents of 0 where init_color is 0)."""
    init_color: Weight = 0.0
    """Half-width of the uniform RGB by which the plain picture that a particle begins as differs from mid grey."""


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
    """Initial density at the centre before density_scale; negative makes a hollow scene."""
    blob_radius: Annotated[float, Range(0, 1000, above=True)] = 0.5
    """Radius at which the initial density changes sign, world units."""
    init_scale: Weight = 1e-4
    """Half-width of the uniform initial values of the grid."""
    init_color: Weight = 0.0
    """Half-width of the uniform initial colour of a particle, before its sigmoid; 0 is mid grey for all."""
    density_noise: Weight = 0.0
    """Standard deviation of the noise added to the density before its activation."""
    entropy: Weight = 0.0
    """Weight of a binary entropy that pushes what entropy_of names to 0 or 1."""
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


@dataclass(frozen=True)
class HealthConfig:
    """What happens to a particle whose gradients are not finite."""

    max_bad: Positive = 10
    """Rounds in a row without a finite gradient after which a particle goes back to its last good state."""
    max_restores: Count = 2
    """Times a particle goes back before it is quarantined: it stays as it is and takes no part any more."""
    restore_rate: Annotated[float, Range(0, 1, above=True)] = 0.5
    """Factor on a particle's learning rates each time it goes back."""


@dataclass(frozen=True)
class ParticlesConfig:
    """What is optimised, how many, and how fast."""

    kind: Literal["nerf", "image"] = "nerf"
    """Radiance fields, or images (the 2-D experiment)."""
    count: Annotated[int, Range(1, 2**31 - 1)] = 8
    """Number of particles over all ranks; fewer than ranks is legal."""
    views: Positive = 1
    """Views rendered per particle and round."""
    micro_batch: Count = 0
    """Particles per render call on a rank; 0 is all of them. What the backward pass needs of every call is kept until
    the end of the round, unless `recompute` is set."""
    recompute: bool = False
    """Renders and their encoding are computed again in the backward pass instead of kept: the same bits, with the
    memory of one render call and not of all, and the time of rendering twice."""
    learning_rate: Annotated[Schedule, Range(0, 10)] = Schedule(((0, 0.01),))
    """Adam's rate for grids and pixels."""
    network_learning_rate: Annotated[Schedule, Range(0, 10)] = Schedule(((0, 0.001),))
    """Adam's rate for the small networks of a particle."""
    betas: Betas = (0.9, 0.99)
    """Adam's decay rates of the two moments."""
    eps: Annotated[float, Range(0, 1, above=True)] = 1e-15
    """Adam's epsilon."""
    image: ImageConfig = ImageConfig()
    """Read when kind is image."""
    nerf: NerfConfig = NerfConfig()
    """Read when kind is nerf."""
    health: HealthConfig = HealthConfig()
    """What happens to particles that stop being finite."""


@dataclass(frozen=True)
class CamerasConfig:
    """Where cameras are drawn from, uniformly; they look at the origin."""

    elevation: Annotated[tuple[float, float], Range(-90, 90, above=True, below=True), Increasing()] = (-10.0, 45.0)
    """Degrees above the horizon, [low, high]."""
    azimuth: Angles = (-180.0, 180.0)
    """Degrees around the vertical axis, [low, high]; 0 is the front."""
    distance: Annotated[tuple[float, float], Range(0, 1000, above=True), Increasing()] = (1.0, 1.5)
    """Distance from the origin, world units, [low, high]."""
    fovy: Annotated[tuple[float, float], Range(0, 180, above=True, below=True), Increasing()] = (40.0, 70.0)
    """Vertical field of view, degrees, [low, high]."""


@dataclass(frozen=True)
class RenderConfig:
    """How particles are drawn."""

    resolution: Annotated[Schedule, Range(8, 4096, multiple_of=8, integer=True)] = Schedule(((0, 64.0),))
    """Edge of the rendered image, pixels; a linear schedule is rounded down to a multiple of 8."""
    encode_resolution: Literal["native", "render"] = "native"
    """native: renders are resized to the edge that the prior was trained at before they are encoded; render: they are
    encoded as they are. Particles that are latents are not encoded."""
    small_latents: bool = False
    """Allows latents with less than a quarter of the edge that the prior was trained at; it draws nothing there."""
    backend: Literal["auto", "torch", "nerfacc"] = "auto"
    """auto takes the fastest installed one that supports parallel.numerics."""

    def resolution_at(self, round: int) -> int:
        """Pixels along an edge in this round, always a multiple of 8."""
        return int(self.resolution.at(round)) // 8 * 8

    def corners(self, rounds: int) -> list[int]:
        """Pixels along an edge where the schedule has a point and in the last round: its extremes are among them."""
        starts = [start for start, _ in self.resolution.points if start < rounds]
        return [self.resolution_at(round) for round in (*starts, rounds - 1)]


@dataclass(frozen=True)
class ScoreConfig:
    """The shared score network: a LoRA adapter of the prior's UNet with a camera condition."""

    rank: Annotated[int, Range(1, 1024)] = 4
    """Rank of the adapter."""
    init: Literal["normal", "kaiming"] = "normal"
    """How the adapter's first factor begins. normal: standard deviation 1 / rank, as in the paper's code; kaiming:
    uniform with standard deviation 1 / sqrt(3 inputs), peft's own, which learns more slowly at first."""
    steps_per_round: Positive = 1
    """Optimiser steps of the adapter per round (K)."""
    batch_size: Count = 0
    """Renders of a round that each of its steps trains on, dealt so that steps take different ones; 0 is all, in every
    step. K steps on a K-th each cost what one step on all does, and the score follows the particles sooner."""
    learning_rate: Rate = 1e-4
    """AdamW's rate after the warm-up."""
    warmup: Count = 500
    """Steps over which the rate grows linearly from 0."""
    weight_decay: Annotated[float, Range(0, 1)] = 1e-2
    """AdamW's weight decay."""
    betas: Betas = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: Annotated[float, Range(0, 1, above=True)] = 1e-8
    """AdamW's epsilon."""
    camera_drop: Share = 0.1
    """Probability with which the camera condition is zeroed in training."""
    replay_rounds: Count = 8
    """Rounds of renders kept for replay."""
    replay_share: Annotated[float, Range(0, 0.99)] = 0.0
    """Share of each score batch drawn from the replay; above 0 needs replay_rounds."""
    micro_batch: Count = 0
    """Samples a call of either UNet, for the particles' gradient and in the score's training; 0 is all of a rank's at
    once, fewer need less memory. Needs parallel.strategy flat; numerics exact takes one particle a call in any case."""
    learning_rate_scaling: Literal["none", "sqrt", "linear"] = "none"
    """How the rate grows with the samples of a step over one."""
    max_grad_norm: Weight = 0.0
    """Gradients are clipped to this norm; 0 is off."""
    max_skipped: Positive = 20
    """Optimiser steps in a row left out because a gradient was not finite, after which the run ends."""

    def rows_a_step(self, renders: int) -> int:
        """Samples that one step trains on, replayed ones with them, of a round of `renders`."""
        fresh = min(self.batch_size, renders) or renders
        return fresh + round(fresh * self.replay_share / (1 - self.replay_share))


@dataclass(frozen=True)
class ScheduleConfig:
    """How long the run is."""

    rounds: Positive = 1000
    """Rounds; in each one every particle moves once."""


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks work together."""

    strategy: Literal["flat", "ddp", "fsdp2", "deepspeed"] = "flat"
    """How ranks train the score network; flat: one reduction a step, all else whole. Same adapter up to rounding."""
    zero_stage: Annotated[int, Range(1, 3)] = 1
    """deepspeed only: what ranks hold in parts, 1 the optimiser, 2 the gradient too, 3 the frozen network too."""
    exchange: Literal["all_gather"] = "all_gather"
    """How renders reach the other ranks."""
    numerics: Literal["fast", "exact"] = "fast"
    """exact: bit for bit the same particles on any number of ranks, slower."""
    timeout_s: Annotated[float, Range(0, 86400, above=True)] = 120.0
    """Seconds after which a rank that does not answer is an error."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept for resuming."""

    every: Count = 500
    """Rounds between checkpoints; 0 is only at the end."""
    keep: Annotated[int, Range(2, 10**9)] = 2
    """Newest complete checkpoints kept on disk; two, so that one is left when the newest is found damaged."""
    asynchronous: bool = True
    """Files are written while the next rounds run; the run stops only for the copy to the host."""
    max_failures: Positive = 3
    """Saves that may fail one after another (full disk, I/O errors) before the run ends."""


@dataclass(frozen=True)
class LogConfig:
    """What is reported while training."""

    every: Positive = 10
    """Rounds between lines of metrics.jsonl."""
    images_every: Count = 0
    """Rounds between contact sheets; 0 is only at the end."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Whether metrics also go to Weights and Biases; online falls back to offline where it does not answer."""
    wandb_project: str = "distvsd"
    """Project in Weights and Biases."""
    wandb_name: str = ""
    """Name of the run there; empty is the name of run.dir."""
    wandb_group: str = ""
    """Group of the run there, such as a sweep."""


@dataclass(frozen=True)
class Config:
    """A whole run; every field has a default."""

    run: RunConfig = RunConfig()
    """Where the run lives and what makes its random numbers."""
    prompt: str | tuple[str, ...] = "an object"
    """What is made: one text for all particles, or a list with exactly one per particle; any text of at most 100000
    characters is legal, and lists of at most 20000 texts with 1000000 characters."""
    prior: PriorConfig = PriorConfig()
    """The frozen text-to-image diffusion model that teaches."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The gradient the particles follow."""
    particles: ParticlesConfig = ParticlesConfig()
    """What is optimised, how many, and how fast."""
    cameras: CamerasConfig = CamerasConfig()
    """Where cameras are drawn from."""
    render: RenderConfig = RenderConfig()
    """How particles are drawn."""
    score: ScoreConfig = ScoreConfig()
    """The shared score network."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How long the run is."""
    parallel: ParallelConfig = ParallelConfig()
    """How ranks work together."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept for resuming."""
    log: LogConfig = LogConfig()
    """What is reported while training."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """One prompt per particle, in the order of their ids."""
        texts = (self.prompt,) if isinstance(self.prompt, str) else self.prompt
        return texts * self.particles.count if len(texts) == 1 else texts

    @property
    def reads_cameras(self) -> bool:
        """Whether the score network is told the camera: an image looks the same from all, and a camera that is always
        dropped would train nothing but an offset."""
        return self.particles.kind != "image" and self.score.camera_drop < 1

    def encoded_edge(self, resolution: int, native: int) -> int:
        """Edge in pixels of the image that latents stand for when renders have `resolution`; native: the prior's."""
        is_latent = self.particles.kind == "image" and self.particles.image.space == "latent"
        return resolution if is_latent or self.render.encode_resolution == "render" else native
