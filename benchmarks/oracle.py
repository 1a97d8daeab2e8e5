"""Variational score distillation against a target that is known exactly: a mixture of Gaussians in the plane.

2048 image particles are latents `[N, 2, 1, 1]`. The prior's score is the exact score of the mixture at every noise
level. The trainer's own loop, objective, optimiser and score training move the particles; only the two networks are
replaced. If the method is right, the particles become samples of the target. `--arms` chooses the arms, all by default:

    python -m benchmarks.oracle --picture benchmarks/oracle.png
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from benchmarks.mixture import Mixture, cosine_alphas_cumprod, measure, noise_floor, ring
from distvsd.cameras import OrbitSampler
from distvsd.config import CamerasConfig, ImageConfig, ParticlesConfig, ScoreConfig
from distvsd.parallel.exchange import Exchange
from distvsd.parallel.reduce import reduce_gradients
from distvsd.parallel.world import World
from distvsd.particles import Ensemble, ImageParticle, Resident, Views
from distvsd.run.loop import Loop
from distvsd.score.lora import LoraScore
from distvsd.score.optimizer import AdapterOptimizer
from distvsd.score.replay import Replay
from distvsd.score.sharing import Everywhere
from distvsd.score.strategies.flat import Flat
from distvsd.score.training import ScoreTraining
from distvsd.vsd.objectives import SDS, VSD, Distillation, Predictions, PriorPart
from distvsd.vsd.process import Diffusion, add_noise
from distvsd.vsd.rng import Purpose, seeded
from distvsd.vsd.samples import Samples

Arm = Literal["vsd-exact", "vsd-network", "vsd-adapter", "sds"]
ARMS: tuple[Arm, ...] = ("vsd-exact", "vsd-network", "vsd-adapter", "sds")
BETAS, ADAM_EPS = (0.9, 0.99), 1e-15


class EmpiricalScore:
    """The exact score of the particles' own distribution q_t, the mean of N(alpha x_j, sigma^2 I) over all j.

    The sum includes the particle that x_t is drawn from. VSD's gradient is that of KL(q_t || p_t), where x_t is drawn
    from q_t, and a perfectly trained network has the score of q_t. Without that particle the gradient would be wrong.

    points(): the current particles, `[M, 2]`.
    """

    def __init__(self, points: Callable[[], Tensor], alphas_cumprod: Tensor, chunk: int = 256) -> None:
        self.points, self.alphas_cumprod, self.chunk = points, alphas_cumprod, chunk

    @torch.no_grad()
    def eps(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, cameras: Tensor | None) -> Tensor:
        points = self.points()
        flat, abar = noisy.flatten(1), self.alphas_cumprod[timesteps]
        rows = zip(flat.split(self.chunk), abar.split(self.chunk), strict=True)
        return torch.cat([self._chunk(part, of, points) for part, of in rows]).view_as(noisy)

    def _chunk(self, noisy: Tensor, abar: Tensor, points: Tensor) -> Tensor:
        alpha, variance = abar.sqrt()[:, None], (1 - abar)[:, None]
        squared = (noisy**2).sum(1, keepdim=True) - 2 * alpha * noisy @ points.T + alpha**2 * (points**2).sum(1)
        shares = torch.softmax(-squared / (2 * variance), 1)
        return (noisy - alpha * (shares @ points)) / variance.sqrt()


class NetworkScore:
    """A small network that `ScoreTraining` trains on the particles with the score's denoising loss.

    base: the prior's velocity(points, abar). The network then is a correction of it that starts at zero, as the LoRA
    does. With None the network is the whole score. The learning rate falls to zero over `num_steps` steps.
    """

    def __init__(
        self, base: Callable[[Tensor, Tensor], Tensor] | None, alphas_cumprod: Tensor, num_steps: int, seed: int
    ) -> None:
        self.base, self.alphas_cumprod = base, alphas_cumprod
        self.process = Diffusion(alphas_cumprod, "v_prediction")
        width, frequencies = 128, 8
        with seeded(seed, Purpose.SCORE_INIT):
            layers: list[nn.Module] = [nn.Linear(2 + 2 * frequencies + 1, width), nn.SiLU()]
            for _ in range(2):
                layers += [nn.Linear(width, width), nn.SiLU()]
            last = nn.Linear(width, 2)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        self.network = nn.Sequential(*layers, last)
        self.trainable: dict[str, Parameter] = dict(self.network.named_parameters())
        self.optimizer = torch.optim.AdamW(self.trainable.values(), weight_decay=0.0)
        self.num_steps, self.steps = num_steps, 0
        share = torch.arange(len(alphas_cumprod)) / len(alphas_cumprod)
        turns = share[:, None] * 2.0 ** torch.arange(frequencies) * math.pi / 2
        half_log_snr = (alphas_cumprod.clamp_min(1e-9) / (1 - alphas_cumprod)).log()[:, None] / 4
        self.time = torch.cat((turns.sin(), turns.cos(), half_log_snr), 1)

    @torch.no_grad()
    def eps(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, cameras: Tensor | None) -> Tensor:
        return self.process.to_eps(self._velocity(noisy, timesteps), noisy, timesteps)

    def loss(self, samples: Samples, timesteps: Tensor, noise: Tensor, keep_camera: Tensor) -> Tensor:
        output = self._velocity(add_noise(self.process, samples.latents, noise, timesteps), timesteps)
        return (output - self.process.target(samples.latents, noise, timesteps)).square().flatten(1).mean(1)

    def gradients(
        self,
        samples: Samples,
        timesteps: Tensor,
        noise: Tensor,
        keep_camera: Tensor,
        denominator: float,
        micro_batches: Sequence[slice],
    ) -> tuple[Iterator[Tensor], Tensor]:
        loss = self.loss(samples, timesteps, noise, keep_camera)
        parts = torch.autograd.grad(loss.sum() / denominator, list(self.trainable.values()))
        return iter([torch.cat([part.reshape(-1) for part in parts])]), loss.detach()

    def step(self, flat_gradient: Tensor, learning_rate: float) -> None:
        sizes = [parameter.numel() for parameter in self.trainable.values()]
        for parameter, part in zip(self.trainable.values(), flat_gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self.optimizer.param_groups[0]["lr"] = cosine(learning_rate, self.num_steps)(self.steps)
        self.optimizer.step()
        self.steps += 1

    def _velocity(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        flat = noisy.flatten(1)
        output: Tensor = self.network(torch.cat((flat, self.time[timesteps]), 1))
        if self.base is not None:
            output = output + self.base(flat, self.alphas_cumprod[timesteps])
        return output.view_as(noisy)


def cosine(peak: float, length: int, warmup: int = 50) -> Callable[[int], float]:
    """A learning rate by step: half a cosine from `peak` to 0 at `length`, times a linear rise over `warmup` steps."""
    return lambda step: peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(step / length, 1.0)))


@dataclass(frozen=True)
class Settings:
    """One run. learning_rate and score_learning_rate are the peaks of `cosine`.

    t is drawn from [t_min, t_max]; t_max falls linearly to t_max_end over the first part `t_max_fall` of the rounds.
    """

    arm: Arm
    seed: int = 0
    particles: int = 2048
    rounds: int = 1000
    learning_rate: float = 0.03
    t_min: float = 0.02
    t_max: float = 0.98
    t_max_end: float = 0.2
    t_max_fall: float = 0.33
    score_steps: int = 4
    score_learning_rate: float = 3e-3
    init_scale: float = 1.0


def distil(mixture: Mixture, settings: Settings, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Runs the trainer's loop and returns the particles `[N, 2]`. watch(step, particles) is called in every round."""
    count, rounds, seed = settings.particles, settings.rounds, settings.seed
    alphas_cumprod, world = cosine_alphas_cumprod(), World(0, 1, 0, 1, torch.device("cpu"))
    latents = ImageConfig(space="latent", init_scale=settings.init_scale)
    rate = cosine(settings.learning_rate, rounds)
    particle = ImageParticle(config=latents, shape=(2, 1, 1), learning_rate=rate)
    shard = ParticlesConfig(betas=BETAS, eps=ADAM_EPS, micro_batch=0)
    store = Resident(particle, range(count), shard, seed=seed)
    cameras = CamerasConfig(elevation=(0.0, 0.0), distance=(1.0, 1.0), fovy=(40.0, 40.0))
    ensemble = Ensemble(store, OrbitSampler(cameras), shard)

    def points() -> Tensor:
        return store.groups[0].parameters["image"].detach().flatten(1)

    def prior(noisy: Tensor, times: Tensor, samples: Samples, parts: frozenset[PriorPart]) -> Predictions:
        return Predictions(guided=mixture.eps(noisy.flatten(1), alphas_cumprod[times]).view_as(noisy))

    def encode(views: list[Views], resolution: int) -> Samples:
        [view] = views
        blank = torch.zeros(count, dtype=torch.int64)
        cameras = view.cameras.flatten().extrinsics.flatten(1).float()
        return Samples(view.rendered.images.flatten(0, 1), cameras, view.ids, blank, torch.ones(count))

    training = None
    if settings.arm in ("vsd-adapter", "vsd-network"):
        steps = settings.score_steps
        base = mixture.velocity if settings.arm == "vsd-adapter" else None
        network = NetworkScore(base, alphas_cumprod, rounds * steps, seed)
        config = ScoreConfig(
            steps_per_round=steps, learning_rate=settings.score_learning_rate, camera_drop=0.0, replay_rounds=0
        )
        length = sum(parameter.numel() for parameter in network.trainable.values())
        training = ScoreTraining(
            score=cast(LoraScore, network),
            strategy=Flat(
                functools.partial(reduce_gradients, world, length=length, numerics="fast"),
                cast(AdapterOptimizer, network),
            ),
            sharing=Everywhere(world),
            config=config,
            seed=seed,
            num_particles=count,
            num_views=1,
            micro_batch=0,
            replay=Replay(0),
        )
        score_eps = network.eps
    else:
        score_eps = EmpiricalScore(points, alphas_cumprod).eps
    fall, falling = settings.t_max_end - settings.t_max, rounds * settings.t_max_fall
    objective = Distillation(
        objective=SDS() if settings.arm == "sds" else VSD(),
        process=Diffusion(alphas_cumprod, "epsilon"),
        prior=prior,
        score=score_eps,
        seed=seed,
        num_views=1,
        t_min=lambda step: settings.t_min,
        t_max=lambda step: settings.t_max + fall * min(step / falling, 1.0),
    )

    def watched(done: Any) -> bool:
        if watch is not None:
            watch(done.step, points())
        return False

    Loop(
        ensemble=ensemble,
        encode=encode,
        objective=objective,
        exchange=lambda samples, step: Exchange(world, [count]).start(samples).wait(),
        exclude=lambda union, absent: union,  # points are always finite
        training=training,
        resolution=lambda step: 1,
        watch=watched,
        lag_due=lambda step: False,
    ).run(0, rounds)
    return points().clone()


def picture(panels: dict[str, Tensor], mixture: Mixture, edge: int = 360) -> Any:
    """A Pillow image with one scatter plot per panel. Circles of two standard deviations mark the modes."""
    from PIL import Image, ImageDraw

    half, title, fine = 2.2, 24, 3  # shows [-half, half]^2; drawn `fine` times larger and then reduced
    size = edge * fine
    sheet = Image.new("RGB", (edge * len(panels), edge + title), "white")
    for column, (name, points) in enumerate(panels.items()):
        canvas = Image.new("RGB", (size, size), "white")
        pen = ImageDraw.Draw(canvas, "RGBA")

        def disc(x: float, y: float, radius: float, pen: Any = pen, **style: Any) -> None:
            at, upwards, r = (x / half + 1) * size / 2, (1 - y / half) * size / 2, radius / half * size / 2
            pen.ellipse((at - r, upwards - r, at + r, upwards + r), **style)

        for (x, y), std in zip(mixture.means.tolist(), mixture.stds.tolist(), strict=True):
            disc(x, y, 2 * std, outline=(200, 80, 60, 255), width=fine)
        for x, y in points.tolist():
            disc(x, y, 0.016, fill=(30, 60, 140, 110))
        sheet.paste(canvas.resize((edge, edge), Image.Resampling.LANCZOS), (column * edge, title))
        ImageDraw.Draw(sheet).text((column * edge + 8, 6), name, fill="black")
    return sheet


def main(argv: Sequence[str] | None = None) -> None:
    defaults = Settings("sds")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="(default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="(default: %(default)s)")
    parser.add_argument("--particles", type=int, default=defaults.particles, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="(default: %(default)s)")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="write scatter plots of target and arms")
    args = parser.parse_args(argv)
    mixture = ring()
    panels, found = {"target": mixture.sample(args.particles, 1)}, []
    for arm in args.arms:
        for seed in args.seeds:
            settings = Settings(arm, seed, args.particles, args.rounds)
            began = time.process_time()
            points = distil(mixture, settings)
            panels.setdefault(arm, points)
            found.append(asdict(settings) | {"cpu_s": time.process_time() - began} | measure(points, mixture))
            distance, spread = found[-1]["sliced_wasserstein"], found[-1]["spread_median"]
            print(f"{arm} seed {seed}: sliced Wasserstein {distance:.4f}, spread {spread:.2f}", file=sys.stderr)
    if args.picture:
        picture(panels, mixture).save(args.picture)
    target_of = {"weights": mixture.weights.tolist(), "stds": mixture.stds.tolist()}
    print(json.dumps({"target": target_of, "floor": noise_floor(args.particles, mixture), "runs": found}))


if __name__ == "__main__":
    main()
