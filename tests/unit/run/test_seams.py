"""Extensions that change no file of the package; see docs/extending.md for whole examples of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.config import Config, load_config
from distvsd.looking.opened import load_particles
from distvsd.parallel.world import World
from distvsd.run.build import Custom, build_run
from distvsd.run.train import train
from distvsd.testing import as_flow

SMOKE = Path(__file__).parents[3] / "configs" / "smoke.yaml"
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))

ROUNDS = 50
SMALL = (
    "particles.kind=image",
    "particles.image.space=latent",
    "particles.learning_rate=0.05",
    "particles.count=2",
    "prior.guidance_scale=1",
    "log.every=50",
    "checkpoint.every=0",
    f"schedule.rounds={ROUNDS}",
)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The latents `[2, C, h, w]` of two particles after 50 rounds with the embedded prior, by objective and process."""
    found = {}
    for kind in ("sds", "vsd"):
        for process, custom in (("diffusion", Custom()), ("flow", Custom(denoiser=as_flow))):
            run = tmp_path_factory.mktemp(f"{kind}-{process}") / "run"
            train(load_config(SMOKE, [*SMALL, f"objective.kind={kind}", f"run.dir={run}"]), custom=custom)
            ensemble = load_particles(run, custom=custom).ensemble
            particles = [ensemble.parameters_of(particle_id)["image"] for particle_id in (0, 1)]
            found[f"{kind} {process}"] = torch.stack(particles)
    return found


def difference(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference over that of `one`."""
    return float((one - other).square().mean().sqrt() / one.square().mean().sqrt())


def test_particles_of_a_flow_model_are_those_of_the_diffusion_model_that_it_is_made_of(
    latents: dict[str, Tensor],
) -> None:
    """The gradient of SDS depends on eps and w(t) only. The change of variables keeps both, so the particles are equal
    up to rounding, which 50 steps of Adam enlarge."""
    assert difference(latents["sds diffusion"], latents["sds flow"]) < 1e-3
    # The bound means something: two particles that differ only in their draws are far apart.
    assert difference(*latents["sds diffusion"]) > 0.1


def test_vsd_with_a_flow_model_differs_by_how_the_score_network_weighs_its_losses(latents: dict[str, Tensor]) -> None:
    """The adapter's loss has other weights over time, so the particles differ a little from those of the diffusion
    model, but less than those of another objective do."""
    away = difference(latents["vsd diffusion"], latents["vsd flow"])
    assert 0 < away < 0.5 * difference(latents["vsd diffusion"], latents["sds diffusion"])


def test_the_score_networks_loss_under_flow_is_the_diffusions_in_other_units(tmp_path: Path) -> None:
    config = load_config(SMOKE, [*SMALL, f"run.dir={tmp_path / 'run'}"])
    losses: list[Tensor] = []
    for custom in (Custom(), Custom(denoiser=as_flow)):
        run = build_run(config, ALONE, lambda done: False, custom=custom)
        assert run.training is not None
        score = run.training.score
        samples = run.loop.encode(run.ensemble.render(0, 64), 64).detached()
        times = score.process.times(torch.tensor([0.3, 0.7]), 0.0, 1.0)
        noise = torch.sin(torch.arange(samples.latents.numel())).view_as(samples.latents)
        losses.append(score.loss(samples, times, noise, torch.ones(2, dtype=torch.bool)).detach())
        _, sigma = score.process.alpha_sigma(times)
    # The embedded prior predicts x_0. For a given x_s an error e in x_0 means -(1 - s) / s e in eps, hence -e / s in v.
    torch.testing.assert_close(losses[1], losses[0] / sigma.square(), rtol=1e-3, atol=1e-5)


def test_a_run_without_a_score_network_goes_on_from_a_checkpoint_that_holds_one(
    tmp_path: Path, configured: Callable[..., Config]
) -> None:
    """Older versions also saved an adapter with SDS, which was never trained."""
    train(configured(schedule__rounds=2, objective__kind="vsd"))
    assert train(configured(schedule__rounds=4, objective__kind="sds"), "must") == 0


@pytest.fixture
def configured(tmp_path: Path, prior: Path) -> Callable[..., Config]:
    def make(**changes: Any) -> Config:
        settings = {"prior.path": prior, "particles.count": 2, "render.resolution": 16, "run.dir": tmp_path / "run"}
        given = settings | {key.replace("__", "."): value for key, value in changes.items()}
        return load_config(SMOKE, [f"{key}={value}" for key, value in given.items()])

    return make
