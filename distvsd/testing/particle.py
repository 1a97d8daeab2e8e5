"""What a representation must fulfil to be trained here: run `check_particle` on yours in your own tests.

It checks everything that the ensemble, the exact mode and the isolation of diverged particles rely on, with a few
particles and small images: seconds on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch

from distvsd.cameras import CameraSampler, OrbitSampler
from distvsd.config import CamerasConfig
from distvsd.particles.base import Handed, Particle, Rendered
from distvsd.testing import growth, particle_init
from distvsd.testing.rules import close, equal, require, subject
from distvsd.testing.trial import Trial
from distvsd.vsd.rng import Purpose, uniform

GRADIENT_STEPS = 4  # rounds over which a parameter must have had a gradient once
SLACK = 0.25  # by how much colours may leave [0, 1]: freely optimised pixels do a little, values in [0, 255] by far
POINTS = 33  # at which a field is read


def check_particle(
    particle: Particle,
    ids: Sequence[int] = (3, 0, 11),
    *,
    source: Handed | None = None,
    sampler: CameraSampler | None = None,
    resolution: int = 16,
    num_views: int = 2,
    frozen: Collection[str] = (),
    without_gradient: Collection[str] = (),
    device: torch.device | str = "cpu",
) -> None:
    """Raises AssertionError with one paragraph, what is wrong and why it matters, for the first rule that is broken.

    ids: at least two particles. source: what they begin from, rows in the order of ids. sampler: where cameras are
    drawn from, 1 to 1.5 away from the origin unless given. frozen: parameters that are meant to have no learning rate.
    without_gradient: trained parameters that rightly never have a gradient, as those of a background that is never
    shown. Needs no ranks and does not communicate.
    """
    require(len(set(ids)) == len(ids) >= 2, f"ids is {list(ids)}; give at least two different ones")
    cameras = sampler or OrbitSampler(CamerasConfig())
    trial = Trial(
        particle, torch.tensor(list(ids), device=device), source, cameras, resolution=resolution, num_views=num_views
    )
    with subject("this particle cannot be trained here"):
        particle_init.init(trial)
        particle_init.learning_rates(trial, frozen)
        particle_init.cost(trial)
        particle_init.hand_over(trial)
        shapes_and_ranges(trial)
        repeats(trial)
        cameras_matter_as_claimed(trial)
        rows_are_independent(trial)
        gradients(trial, without_gradient)
        gradient_rows_are_independent(trial)
        lost_particle_is_alone(trial)
        density(trial)
        growth.adapts(trial)


def shapes_and_ranges(trial: Trial) -> None:
    sizes = [trial.resolution] if trial.particle.is_latent else [trial.resolution, trial.resolution + 8]
    for size in sizes:
        for name, rendered in (("render", trial.render(resolution=size)), ("view", trial.view(resolution=size))):
            _check_rendered(trial, f"{name} at {size} pixels", rendered, size)


def _check_rendered(trial: Trial, where: str, rendered: Rendered, size: int) -> None:
    images, opacity, penalty = rendered.images, rendered.opacity, rendered.penalty
    rows = (len(trial.ids), trial.num_views)
    require(images.ndim == 5, f"{where}: images are {list(images.shape)}; they must be [P, V, C, H, W]")
    expected = (*rows, *images.shape[2:]) if trial.particle.is_latent else (*rows, 3, size, size)
    require(images.shape == expected, f"{where}: images are {list(images.shape)}; they must be {list(expected)}")
    expected = (*rows, 1, *images.shape[3:])
    require(opacity.shape == expected, f"{where}: opacity is {list(opacity.shape)}; it must be {list(expected)}")
    require(
        penalty.shape == rows[:1],
        f"{where}: penalty is {list(penalty.shape)}; it must be one number a particle, [{rows[0]}]",
    )
    for name, value in (("images", images), ("opacity", opacity), ("penalty", penalty)):
        require(value.dtype == torch.float32, f"{where}: {name} is {value.dtype}; it must be float32")
        require(bool(value.isfinite().all()), f"{where}: {name} is not finite for fresh particles")
    low, high = float(opacity.detach().amin()), float(opacity.detach().amax())
    require(low >= -1e-4 and high <= 1 + 1e-4, f"{where}: opacity lies in [{low:.3g}, {high:.3g}], not in [0, 1]")
    low, high = float(images.detach().amin()), float(images.detach().amax())
    require(
        trial.particle.is_latent or (low >= -SLACK and high <= 1 + SLACK),
        f"{where}: images of fresh particles lie in [{low:.3g}, {high:.3g}]; colours must be in [0, 1]",
    )


def repeats(trial: Trial) -> None:
    """The same call gives the same, and leaves the parameters as they are."""
    parameters = trial.init()
    before = {name: value.clone() for name, value in parameters.items()}
    draws: dict[str, Callable[[], Rendered]] = {
        "render": lambda: trial.render(parameters),
        "view": lambda: trial.view(parameters),
    }
    for name, draw in draws.items():
        first, second = draw().images, draw().images
        same = torch.equal(first, second) if trial.particle.deterministic else close(first, second)
        require(
            same,
            f"{name} gives another image when it is called again with the same keys; draw from distvsd.vsd.rng "
            "keyed by seed, id and step" + ("" if name == "render" else " (and view must draw nothing random at all)"),
        )
        require(equal(parameters, before), f"{name} changes the parameters it is given")


def cameras_matter_as_claimed(trial: Trial) -> None:
    first, second = trial.view(step=0).images, trial.view(step=1).images
    same = close(first, second) and close(first, first[:, :1].expand_as(first))
    require(
        same or trial.particle.has_views,
        "has_views is False, but images depend on the camera; such particles are evaluated from one view",
    )
    require(
        not (same and trial.particle.has_views),
        "has_views is True, but every camera sees the same; the score network would be told cameras that mean nothing",
    )


def rows_are_independent(trial: Trial) -> None:
    """Particles drawn alone look as they do among others, up to rounding."""
    parameters = trial.init()
    together = trial.render(parameters)
    for row, particle_id in enumerate(trial.ids.tolist()):
        one = slice(row, row + 1)
        mine = {name: value[one] for name, value in parameters.items()}
        alone = trial.particle.render(mine, trial.cameras()[one], trial.resolution, trial.keys(rows=one))
        for name in ("images", "opacity", "penalty"):
            require(
                close(getattr(alone, name)[0], getattr(together, name)[row]),
                f"render: {name} of particle {particle_id} depends on which particles are drawn in the same call; "
                "row i may depend on row i of parameters, cameras and ids only",
            )


def gradients(trial: Trial, without: Collection[str]) -> None:
    had: set[str] = set()
    for step in range(GRADIENT_STEPS):
        parameters = trial.leaves()
        for name, gradient in trial.backward(parameters, trial.render(parameters, step=step)).items():
            require(bool(gradient.isfinite().all()), f"the gradient of {name} is not finite at round {step}")
            if bool(gradient.ne(0).any()):
                had.add(name)
    lost = sorted(set(trial.trained()) - had - set(without))
    require(
        not lost,
        f"{', '.join(lost)} had no gradient in {GRADIENT_STEPS} renders; is it detached? If it is rightly without "
        "one, name it in without_gradient",
    )


def gradient_rows_are_independent(trial: Trial) -> None:
    for row, particle_id in enumerate(trial.ids.tolist()):
        parameters = trial.leaves()
        rendered = trial.render(parameters)
        only = Rendered(rendered.images[row], rendered.opacity[row], rendered.penalty[row])
        for name, gradient in trial.backward(parameters, only).items():
            others = torch.cat((gradient[:row], gradient[row + 1 :]))
            require(
                not bool(others.ne(0).any()),
                f"the images of particle {particle_id} have a gradient to {name} of other particles; particles "
                "must not share anything",
            )


def lost_particle_is_alone(trial: Trial) -> None:
    """A particle whose every number is NaN must not reach the images and gradients of the others."""
    sound = trial.leaves()
    expected_render = trial.render(sound)
    expected = trial.backward(sound, expected_render)
    for row, particle_id in enumerate(trial.ids.tolist()):
        others = [other for other in range(len(trial.ids)) if other != row]
        lost = trial.leaves()
        for value in lost.values():
            value.data[row] = math.nan
        rendered = trial.render(lost)
        for name in ("images", "opacity", "penalty"):
            require(
                close(getattr(rendered, name)[others], getattr(expected_render, name)[others]),
                f"a NaN in particle {particle_id} reaches {name} of other particles; one that diverged would take "
                "all of its rank with it",
            )
        for name, gradient in trial.backward(lost, rendered).items():
            require(
                close(gradient[others], expected[name][others]),
                f"a NaN in particle {particle_id} reaches the gradient of {name} of other particles",
            )


def density(trial: Trial) -> None:
    """Where there is a field, each particle's depends on no other particle."""
    parameters, count = trial.init(), len(trial.ids)
    field = trial.particle.field(parameters)
    if field is None:
        return
    points = uniform(trial.seed, Purpose.SAMPLE, trial.ids, 0, (POINTS, 3)) - 0.5
    found = field(points)
    require(
        found.shape == (count, POINTS) and found.dtype == torch.float32,
        f"field gives {found.dtype} {list(found.shape)} at points {list(points.shape)}; it must be float32 "
        f"{[count, POINTS]}",
    )
    require(bool((found >= 0).all()), "field is not a density of at least 0 everywhere for fresh particles")
    require(close(field(points), found), "field gives other densities when it is called again")
    for row, particle_id in enumerate(trial.ids.tolist()):
        one, others = slice(row, row + 1), [other for other in range(count) if other != row]
        alone = trial.particle.field({name: value[one] for name, value in parameters.items()})
        require(
            alone is not None and close(alone(points[one])[0], found[row]),
            f"the field of particle {particle_id} depends on which particles are read in the same call",
        )
        lost = {name: value.clone() for name, value in parameters.items()}
        for value in lost.values():
            value[row] = math.nan
        rest = trial.particle.field(lost)
        require(
            rest is not None and close(rest(points)[others], found[others]),
            f"a NaN in particle {particle_id} reaches the field of other particles",
        )
