"""Extensions that change no file of the package; see docs/extending.md for whole examples of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from distvsd.cameras import OrbitSampler
from distvsd.config import Config, load_config
from distvsd.errors import CheckpointError, ConfigError
from distvsd.looking.opened import load_particles
from distvsd.parallel.world import World
from distvsd.prior import load_prior
from distvsd.run import build
from distvsd.run.build import build_run
from distvsd.run.contents import verify
from distvsd.run.custom import Custom
from distvsd.run.train import train
from distvsd.testing import as_flow
from distvsd.vsd.objectives import Draws, Part, Predictions, weighted_difference

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


def trained(run: Path, custom: Custom) -> Tensor:
    """Two particles after 50 rounds of SDS with the embedded prior, `[2, C, h, w]`."""
    train(load_config(SMOKE, [*SMALL, "objective.kind=sds", f"run.dir={run}"]), custom=custom)
    ensemble = load_particles(run, custom=custom).ensemble
    return torch.stack([ensemble.parameters_of(particle_id)["image"] for particle_id in (0, 1)])


def difference(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference over that of the values."""
    return float((one - other).square().mean().sqrt() / one.square().mean().sqrt())


def test_particles_of_a_flow_model_are_those_of_the_diffusion_model_that_it_is_made_of(tmp_path: Path) -> None:
    """With SDS, whose gradient is a function of eps and w(t): the change of variables leaves both as they are, so the
    particles are equal but for rounding, which 50 steps of Adam enlarge."""
    diffusion = trained(tmp_path / "diffusion", Custom())
    flow = trained(tmp_path / "flow", Custom(denoiser=as_flow))
    assert difference(diffusion, flow) < 1e-3
    # So that the bound says something: the two particles, which differ in their draws only, are far apart.
    assert difference(*diffusion) > 0.1


def test_the_first_gradient_of_vsd_is_the_same_with_a_flow_model(tmp_path: Path) -> None:
    """Until the score network has learnt: its loss has other weights over time, so later gradients differ."""
    config = load_config(SMOKE, [*SMALL, "prior.guidance_scale=3", "score.warmup=0", f"run.dir={tmp_path / 'run'}"])
    gradients: list[list[Tensor]] = []
    for custom in (Custom(), Custom(denoiser=as_flow)):
        run = build_run(config, ALONE, lambda done: False, custom=custom)
        samples = run.loop.encode(*run.ensemble.render(0, 64), 64).detached()
        first = run.loop.objective(samples, 0)
        for step in range(3):
            run.loop.round(step)
        gradients.append([first, run.loop.objective(samples, 0)])
    assert difference(gradients[0][0], gradients[1][0]) < 1e-3
    assert difference(gradients[0][1], gradients[1][1]) > 1e-3


def test_the_score_networks_loss_under_flow_is_the_diffusions_in_other_units(tmp_path: Path) -> None:
    config = load_config(SMOKE, [*SMALL, f"run.dir={tmp_path / 'run'}"])
    losses: list[Tensor] = []
    for custom in (Custom(), Custom(denoiser=as_flow)):
        run = build_run(config, ALONE, lambda done: False, custom=custom)
        assert run.training is not None
        score = run.training.score
        samples = run.loop.encode(*run.ensemble.render(0, 64), 64).detached()
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


class Tracked(OrbitSampler):
    """A sampler of the caller's own."""


def test_custom_parts_are_named_in_checkpoints_and_asked_for_again(
    configured: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint that was trained with them is sound; a run without them, or with others, does not go on from it."""
    config = configured(schedule__rounds=2)
    train(config, custom=Custom(cameras=Tracked(config.cameras)))
    assert len(verify(Path(config.run.dir))) == 1
    assert "cameras" in caplog.text
    longer = configured(schedule__rounds=3)
    with pytest.raises(CheckpointError, match="cameras=Tracked"):
        train(longer, "must")
    assert train(longer, "must", Custom(cameras=Tracked(config.cameras))) == 0


@dataclass(frozen=True)
class FromPromptAlone:
    """An objective that needs no score network."""

    needs: ClassVar[frozenset[Part]] = frozenset({"conditional"})

    def gradient(self, predictions: Predictions, draws: Draws) -> Tensor:
        return weighted_difference(predictions.of("conditional"), draws.noise, draws)


def test_a_strategy_for_a_score_network_that_no_objective_needs_is_refused(configured: Callable[..., Config]) -> None:
    world = World(rank=0, size=2, local_rank=0, local_size=2, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"fsdp2.*flat"):
        build_run(
            configured(parallel__strategy="fsdp2"),
            world,
            lambda done: False,
            custom=Custom(objective=FromPromptAlone()),
        )


@pytest.mark.parametrize(("base", "waits"), [(False, True), (True, False)])
def test_only_a_network_that_ranks_will_split_waits_in_the_hosts_memory(
    configured: Callable[..., Config], prior: Path, monkeypatch: pytest.MonkeyPatch, base: bool, waits: bool
) -> None:
    """With a base of its own the score network is split and the teacher is not: it must be where it computes."""
    asked: list[Any] = []

    def spy(*arguments: Any, **named: Any) -> Any:
        asked.append(named["unet_device"])
        return load_prior(*arguments, **named)

    monkeypatch.setattr(build, "load_prior", spy)
    world = World(rank=0, size=2, local_rank=0, local_size=2, device=torch.device("cpu"))
    changes = {"parallel__strategy": "fsdp2"} | ({"score__base": prior} if base else {})
    build_run(configured(**changes), world, lambda done: False)
    assert asked == ["cpu" if waits else None]


def test_a_score_step_counts_whole_particles(configured: Callable[..., Config]) -> None:
    score = configured(score__replay_share=0.01).score
    # 81 particles of 100 views: 0.82 of a particle is replayed, so one is, with its 100 views.
    assert score.rows_a_step(81, 100) == 8200
    assert configured(score__batch_size=3).score.rows_a_step(5, 4) == 4
