"""What a representation must fulfil to be trained here: run `check_particle` on yours in your own tests.

Everything the ensemble, the exact mode and the isolation of diverged particles build on is tried out, on a few
particles and small images: seconds on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.cameras import Cameras, OrbitSampler
from distvsd.particles.base import Keys, Parameters, Particle, Rendered

GRADIENT_STEPS = 4  # rounds over which a parameter must have had a gradient once
ROUNDING = 1e-4  # relative; batches of another size may add in another order
SLACK = 0.25  # by which colours may leave [0, 1]: freely optimised pixels do, values in [0, 255] do so by far


def check_particle(
    particle: Particle,
    ids: Sequence[int] = (3, 0, 11),
    *,
    sampler: OrbitSampler | None = None,
    resolution: int = 16,
    num_views: int = 2,
    without_gradient: Collection[str] = (),
    device: torch.device | str = "cpu",
) -> None:
    """Raises AssertionError with one paragraph, what is wrong and why it matters, for the first rule that is broken.

    ids: at least two particles. sampler: where cameras are drawn from, 1 to 1.5 away from the origin unless given.
    without_gradient: parameters that rightly never have one, as those of a background that is never shown. Needs no
    ranks and does not communicate.
    """
    cameras = sampler or OrbitSampler((-10.0, 45.0), (-180.0, 180.0), (1.0, 1.5), (40.0, 70.0))
    _require(len(set(ids)) == len(ids) >= 2, f"ids is {list(ids)}; give at least two different ones")
    check = _Check(particle, torch.tensor(list(ids), device=device), cameras, resolution, num_views)
    with _global_random_state_kept():
        check.init()
        check.learning_rates()
        check.shapes_and_ranges()
        check.repeats()
        check.rows_are_independent()
        check.gradients(without_gradient)
        check.gradient_rows_are_independent()
        check.lost_particle_is_alone()


@dataclass
class _Check:
    particle: Particle
    ids: Tensor
    sampler: OrbitSampler
    resolution: int
    num_views: int
    seed: int = 7

    def init(self) -> None:
        parameters, again = self._fresh(), self.particle.init(self.seed, self.ids)
        _require(bool(parameters), "init returns no parameters; there is nothing to optimise")
        for name, value in parameters.items():
            _require(
                value.dtype == torch.float32 and value.device == self.ids.device,
                f"init: {name} is {value.dtype} on {value.device}; it must be float32 on the device of the ids "
                f"({self.ids.device})",
            )
            _require(
                value.ndim >= 1 and value.shape[0] == len(self.ids),
                f"init: {name} is {list(value.shape)}; its first axis must be that of the {len(self.ids)} particles",
            )
            _require(bool(value.isfinite().all()), f"init: {name} is not finite")
        _require(
            _equal(parameters, again),
            "init gives other values when it is called again; draw from distvsd.vsd.rng with the seed and the ids, so "
            "that a run can be repeated",
        )
        self._init_is_keyed(parameters)
        none = self.particle.init(self.seed, self.ids[:0])
        _require(
            {name: value.shape for name, value in none.items()}
            == {name: value[:0].shape for name, value in parameters.items()},
            "init for no ids has other names or shapes than for some, the number of particles apart; what a checkpoint "
            "must hold of one is known from it",
        )

    def _init_is_keyed(self, parameters: Parameters) -> None:
        other_seed = self.particle.init(self.seed + 1, self.ids)
        _require(not _equal(parameters, other_seed), "init ignores its seed; two runs would start alike")
        for row, particle_id in enumerate(self.ids.tolist()):
            for other in range(row):
                same = _equal(_row(parameters, row), _row(parameters, other))
                _require(
                    not same,
                    f"init: particles {particle_id} and {int(self.ids[other])} start alike; key the streams by the "
                    "ids, or all particles stay in one mode",
                )
            alone = self.particle.init(self.seed, self.ids[row : row + 1])
            _require(
                _equal(_row(alone, 0), _row(parameters, row)),
                f"init: particle {particle_id} starts differently when it is made alone; its values may depend on its "
                "id only, because another number of ranks groups the particles differently",
            )

    def learning_rates(self) -> None:
        names = set(self._fresh())
        for step in (0, 10**6):
            rates = self.particle.learning_rates(step)
            missing, unknown = sorted(names - rates.keys()), sorted(rates.keys() - names)
            _require(not missing, f"learning_rates({step}) has none for {', '.join(missing)}")
            _require(not unknown, f"learning_rates({step}) has one for {', '.join(unknown)}, which init does not make")
            wrong = [name for name, rate in rates.items() if not (math.isfinite(rate) and rate >= 0)]
            _require(not wrong, f"learning_rates({step}): {', '.join(wrong)} is not a finite number of at least 0")

    def shapes_and_ranges(self) -> None:
        sizes = [self.resolution] if self.particle.is_latent else [self.resolution, self.resolution + 8]
        for size in sizes:
            for name, rendered in (("render", self._render(resolution=size)), ("view", self._view(size))):
                self._check_rendered(f"{name} at {size} pixels", rendered, size)

    def _check_rendered(self, where: str, rendered: Rendered, size: int) -> None:
        images, opacity, penalty = rendered.images, rendered.opacity, rendered.penalty
        rows = (len(self.ids), self.num_views)
        _require(images.ndim == 5, f"{where}: images are {list(images.shape)}; they must be [P, V, C, H, W]")
        expected = (*rows, *images.shape[2:]) if self.particle.is_latent else (*rows, 3, size, size)
        _require(images.shape == expected, f"{where}: images are {list(images.shape)}; they must be {list(expected)}")
        expected = (*rows, 1, *images.shape[3:])
        _require(opacity.shape == expected, f"{where}: opacity is {list(opacity.shape)}; it must be {list(expected)}")
        _require(
            penalty.shape == rows[:1],
            f"{where}: penalty is {list(penalty.shape)}; it must be one number a particle, [{rows[0]}]",
        )
        for name, value in (("images", images), ("opacity", opacity), ("penalty", penalty)):
            _require(value.dtype == torch.float32, f"{where}: {name} is {value.dtype}; it must be float32")
            _require(bool(value.isfinite().all()), f"{where}: {name} is not finite for fresh particles")
        low, high = float(opacity.detach().amin()), float(opacity.detach().amax())
        _require(low >= -1e-4 and high <= 1 + 1e-4, f"{where}: opacity lies in [{low:.3g}, {high:.3g}], not in [0, 1]")
        low, high = float(images.detach().amin()), float(images.detach().amax())
        _require(
            self.particle.is_latent or (low >= -SLACK and high <= 1 + SLACK),
            f"{where}: images of fresh particles lie in [{low:.3g}, {high:.3g}]; colours must be in [0, 1]",
        )

    def repeats(self) -> None:
        """The same call gives the same, and leaves the parameters as they are."""
        parameters = self._fresh()
        before = {name: value.clone() for name, value in parameters.items()}
        draws: dict[str, Callable[[], Rendered]] = {
            "render": lambda: self._render(parameters),
            "view": lambda: self._view(self.resolution, parameters),
        }
        for name, draw in draws.items():
            first, second = draw().images, draw().images
            same = torch.equal(first, second) if self.particle.deterministic else _close(first, second)
            _require(
                same,
                f"{name} gives another image when it is called again with the same keys; draw from distvsd.vsd.rng "
                "keyed by seed, id and step"
                + ("" if name == "render" else " (and view must draw nothing random at all)"),
            )
            _require(_equal(parameters, before), f"{name} changes the parameters it is given")

    def rows_are_independent(self) -> None:
        """Particles drawn alone look as they do among others, up to rounding."""
        parameters = self._fresh()
        together = self._render(parameters)
        for row, particle_id in enumerate(self.ids.tolist()):
            one = slice(row, row + 1)
            mine = {name: value[one] for name, value in parameters.items()}
            alone = self.particle.render(mine, self._cameras()[one], self.resolution, self._keys(rows=one))
            for name in ("images", "opacity", "penalty"):
                _require(
                    _close(getattr(alone, name)[0], getattr(together, name)[row]),
                    f"render: {name} of particle {particle_id} depends on which particles are drawn in the same call; "
                    "row i may depend on row i of parameters, cameras and ids only",
                )

    def gradients(self, without: Collection[str]) -> None:
        had: set[str] = set()
        for step in range(GRADIENT_STEPS):
            parameters = self._leaves()
            for name, gradient in self._backward(parameters, self._render(parameters, step=step)).items():
                _require(bool(gradient.isfinite().all()), f"the gradient of {name} is not finite at round {step}")
                if bool(gradient.ne(0).any()):
                    had.add(name)
        lost = sorted(set(self._fresh()) - had - set(without))
        _require(
            not lost,
            f"{', '.join(lost)} had no gradient in {GRADIENT_STEPS} renders; is it detached? If it is rightly without "
            "one, name it in without_gradient",
        )

    def gradient_rows_are_independent(self) -> None:
        for row, particle_id in enumerate(self.ids.tolist()):
            parameters = self._leaves()
            rendered = self._render(parameters)
            only = Rendered(rendered.images[row], rendered.opacity[row], rendered.penalty[row])
            for name, gradient in self._backward(parameters, only).items():
                others = torch.cat((gradient[:row], gradient[row + 1 :]))
                _require(
                    not bool(others.ne(0).any()),
                    f"the images of particle {particle_id} have a gradient to {name} of other particles; particles "
                    "must not share anything",
                )

    def lost_particle_is_alone(self) -> None:
        """A particle whose every number is NaN must not reach the images and gradients of the others."""
        sound = self._leaves()
        expected_render = self._render(sound)
        expected = self._backward(sound, expected_render)
        for row, particle_id in enumerate(self.ids.tolist()):
            others = [other for other in range(len(self.ids)) if other != row]
            lost = self._leaves()
            for value in lost.values():
                value.data[row] = math.nan
            rendered = self._render(lost)
            for name in ("images", "opacity", "penalty"):
                _require(
                    _close(getattr(rendered, name)[others], getattr(expected_render, name)[others]),
                    f"a NaN in particle {particle_id} reaches {name} of other particles; one that diverged would take "
                    "all of its rank with it",
                )
            for name, gradient in self._backward(lost, rendered).items():
                _require(
                    _close(gradient[others], expected[name][others]),
                    f"a NaN in particle {particle_id} reaches the gradient of {name} of other particles",
                )

    def _fresh(self) -> Parameters:
        return self.particle.init(self.seed, self.ids)

    def _leaves(self) -> Parameters:
        return {name: value.detach().clone().requires_grad_() for name, value in self._fresh().items()}

    def _cameras(self, step: int = 0) -> Cameras:
        return self.sampler.sample(self.seed, self.ids, step, self.num_views)

    def _keys(self, step: int = 0, rows: slice = slice(None)) -> Keys:
        return Keys(self.seed, self.ids[rows], step)

    def _render(self, parameters: Parameters | None = None, step: int = 0, resolution: int = 0) -> Rendered:
        chosen = self._fresh() if parameters is None else parameters
        return self.particle.render(chosen, self._cameras(step), resolution or self.resolution, self._keys(step))

    def _view(self, resolution: int, parameters: Parameters | None = None) -> Rendered:
        chosen = self._fresh() if parameters is None else parameters
        return self.particle.view(chosen, self._cameras(), resolution, 0.5)

    def _backward(self, parameters: Parameters, rendered: Rendered) -> Parameters:
        """Gradients of a sum that weighs every pixel differently, so that none cancels; zeros where there is none."""
        images = rendered.images
        weights = torch.linspace(-1, 2, images.numel(), device=images.device).reshape(images.shape)
        # nansum would hide what is looked for: a lost row's terms stay NaN, and have no way to the others' gradients.
        target = (images * weights).sum() + rendered.penalty.sum()
        _require(target.requires_grad, "images have no gradient to any parameter; is the render detached?")
        found = torch.autograd.grad(target, list(parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(value) if gradient is None else gradient
            for (name, value), gradient in zip(parameters.items(), found, strict=True)
        }


@contextmanager
def _global_random_state_kept() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    _require(
        torch.equal(before, torch.get_rng_state()),
        "torch's global random state was used; what it gives depends on everything drawn before, so that a resumed run "
        "would differ: draw from distvsd.vsd.rng",
    )


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(f"this particle cannot be trained here: {text}")


def _equal(a: Parameters, b: Parameters) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _row(parameters: Parameters, row: int) -> Parameters:
    return {name: value[row] for name, value in parameters.items()}


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(b.detach().abs().amax()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=ROUNDING, atol=ROUNDING * max(scale, 1e-12))
