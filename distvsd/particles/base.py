"""What a representation must offer: how its particles begin, what of them is trained, and how they are drawn.

The parameters of P particles are one dictionary of tensors with a leading axis of P; a store owns them. A
representation holds no tensors of particles, and knows nothing of guidance, of ranks and of files.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor

from distvsd.cameras import Cameras, Field
from distvsd.errors import ConfigError
from distvsd.render.meshes import Surface
from distvsd.render.splat import Splats

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Keys:
    """Keys of the random draws of one render: the streams of particles `ids` `[P]` at round `step` of run `seed`."""

    seed: int
    ids: Tensor
    step: int


@dataclass(frozen=True)
class Rendered:
    """images `[P, V, C, H, W]` float32: RGB in [0, 1], or latents where the particle says so. opacity `[P, V, 1, H,
    W]`.

    penalty `[P]`: the regularisers of each particle, weighted, to be minimised beside the guidance.
    """

    images: Tensor
    opacity: Tensor
    penalty: Tensor


@dataclass(frozen=True)
class Cost:
    """What one particle takes. trained, frozen: its numbers with and without an optimiser. points: at which the
    renderer evaluates it for one view.

    For `distvsd plan`, and 0 where nobody counted: flops, the operations of the products of that view, and touched,
    the float32 numbers that it must read and write.
    """

    trained: int
    frozen: int
    points: int
    flops: float = 0.0
    touched: float = 0.0


@dataclass(frozen=True)
class Handed:
    """What the stage before hands over: its kind of particle, and the final parameters `[P, ...]`, on any device."""

    particle: Particle
    parameters: Parameters

    def rows(self, rows: slice) -> Handed:
        """The same for some of the particles; shares memory."""
        return Handed(self.particle, {name: value[rows] for name, value in self.parameters.items()})

    def copied_for(self, particle: Particle, ids: Tensor, anew: Collection[str] = ()) -> Parameters:
        """Copies of the parameters, float32 on the device of `ids` `[P]`, for a particle of the same kind and sizes.

        anew: parameters that are not taken over, on either side. Raises ConfigError for another
        kind, or where a parameter has another shape than `particle` gives it.
        """
        blank = particle.init(0, ids[:0])
        expected = {name: tuple(value.shape[1:]) for name, value in blank.items() if name not in anew}
        found = {name: tuple(value.shape[1:]) for name, value in self.parameters.items() if name not in anew}
        if type(self.particle) is not type(particle) or self.particle.is_latent != particle.is_latent:
            self.refuse(particle, "these are two kinds of particle")
        if found != expected:
            named = sorted(name for name in found | expected if found.get(name) != expected.get(name))
            sizes = ", ".join(f"{name} {_size(found.get(name))} to {_size(expected.get(name))}" for name in named[:3])
            self.refuse(particle, f"their parameters differ ({sizes})")
        return {name: self.parameters[name].detach().to(ids.device, copy=True) for name in expected}

    @torch.no_grad()
    def density(self, particle: Particle, points: Tensor) -> Tensor:
        """Density `[P, N]` of what is handed over to `particle`, at world points `[N, 3]`, on their device.

        One particle a call: no bit depends on which others are on the rank. Raises ConfigError for what has no volume.
        """
        rows = []
        for row in range(len(next(iter(self.parameters.values())))):
            own = {name: value.to(points.device) for name, value in self.rows(slice(row, row + 1)).parameters.items()}
            field = self.particle.field(own)
            if field is None:
                self.refuse(particle, "it has no volume")
            rows.append(field(points[None]))
        return torch.cat(rows) if rows else points.new_zeros(0, len(points))

    @torch.no_grad()
    def colors(self, points: Tensor) -> Tensor | None:
        """RGB in [0, 1] of what is handed over, at the points of each particle `[P, N, 3]`, on their device; None where
        it offers no colours. One particle a call, as `density`."""
        if not isinstance(self.particle, Colored):
            return None
        rows = []
        for row in range(len(points)):
            own = {name: value.to(points.device) for name, value in self.rows(slice(row, row + 1)).parameters.items()}
            rows.append(self.particle.colors(own, points[row : row + 1]))
        return torch.cat(rows) if rows else points.clone()

    @torch.no_grad()
    def surfaces(self, device: torch.device) -> list[Surface] | None:
        """The surface of each particle that is handed over, if these have one and no density. One particle a call."""
        found = []
        for row in range(len(next(iter(self.parameters.values())))):
            own = {name: value.to(device) for name, value in self.rows(slice(row, row + 1)).parameters.items()}
            surface = None if self.particle.field(own) is not None else self.particle.surface(own, 3, 1.0)
            if surface is None:
                return None
            found.append(surface)
        return found or None

    def refuse(self, particle: Particle, why: str) -> NoReturn:
        """Raises ConfigError: `particle` cannot begin from this."""
        raise ConfigError(
            f"a {type(self.particle).__name__} cannot be handed over to a {type(particle).__name__}: {why}; give this "
            "stage particles of the kind and sizes of the stage before, or a kind that can be made from them"
        )


def _size(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


class HandedRows(Protocol):
    """What the stage before hands over, of which a part may be read at a time; `Handed` is one in memory."""

    def rows(self, rows: slice) -> Handed:
        """Some of the particles."""
        ...


class Particle(Protocol):
    """One kind of particle. Every method is local, communicates nothing, and treats particles independently:

    row i of the result depends on row i of the parameters, of the cameras and of the ids only.
    """

    @property
    def is_latent(self) -> bool:
        """True where `render` returns latents of the prior, which are not encoded again."""
        ...

    @property
    def has_views(self) -> bool:
        """False where every camera sees the same, as of an image."""
        ...

    @property
    def deterministic(self) -> bool:
        """True where the same call gives the same bits, forward and backward, on this device."""
        ...

    def init(self, seed: int, ids: Tensor, source: Handed | None = None) -> Parameters:
        """Fresh parameters for particles `ids` `[P]`, each from its own stream; float32, on the device of `ids`.

        source: of the stage before, row i of particle ids[i]; the result shares no memory with it. Raises ConfigError
        for a source that this kind cannot begin from, and without one where it needs one. For no ids, with the same
        names and shapes `[0, ...]`, none is needed: what a checkpoint must hold is known from that.
        """
        ...

    def learning_rates(self, step: int) -> dict[str, float]:
        """The learning rate of each trained parameter at this round; the names are the same at every round.

        A parameter that `init` gives and that is not named here is frozen: no gradient, no optimiser state. Only
        `Adaptive.adapt` changes it.
        """
        ...

    def render(self, parameters: Parameters, cameras: Cameras, resolution: int, keys: Keys) -> Rendered:
        """The training render of P particles from cameras `[P, V]`, square images; differentiable in the trained
        parameters."""
        ...

    def view(self, parameters: Parameters, cameras: Cameras, resolution: int, background: float) -> Rendered:
        """The same without anything random, on a plain grey background in [0, 1]; for looking and evaluating."""
        ...

    def field(self, parameters: Parameters) -> Field | None:
        """The density of these particles as a function of world points; None for what has no volume.

        Reads the parameters when it is called; differentiable in points and parameters.
        """
        ...

    def surface(self, parameters: Parameters, resolution: int, threshold: float) -> Surface | None:
        """The triangle meshes of these particles with their colours, as export writes them; None for what has none.

        resolution: cubes along an edge of the lattice on which a density is read; threshold: density per world unit at
        which the surface lies. What has a mesh of its own reads neither.
        """
        ...

    def cost(self, resolution: int) -> Cost:
        """What one particle takes at square images of so many pixels; makes no particle."""
        ...


@runtime_checkable
class Colored(Protocol):
    """What a kind of particle offers beside `Particle` if it has colours in space."""

    def colors(self, parameters: Parameters, points: Tensor) -> Tensor:
        """RGB in [0, 1] `[P, N, 3]` at the world points `[P, N, 3]` of each particle; grey where there is nothing."""
        ...


@runtime_checkable
class Splatted(Protocol):
    """What a kind of particle offers beside `Particle` if it is made of Gaussians."""

    def splats(self, parameters: Parameters) -> Splats:
        """The Gaussians of these particles, as export writes them; shares memory with the parameters."""
        ...


@dataclass(frozen=True)
class Adapted:
    """What `Adaptive.adapt` changes. parameters: new values `[P, ...]` of some of them, trained or frozen. restarted:
    for some of the trained ones a bool mask that broadcasts to their shape, where Adam's moments become 0."""

    parameters: Parameters
    restarted: dict[str, Tensor]


@runtime_checkable
class Adaptive(Protocol):
    """What a kind of particle offers beside `Particle` if its structure changes while it is trained.

    The parameters keep their names and shapes, so structure is in their values: which of a fixed number of gaussians
    are in use, for example. Frozen parameters that change must follow from the trained ones, as a grid of where there
    is matter: they are no part of a good state, and a particle that is put back has them as `init` makes them.
    """

    def adapt(self, parameters: Parameters, keys: Keys, factors: Tensor) -> Adapted | None:
        """The structure of P particles after the update of round `keys.step`; None where it stays as it is.

        The ensemble calls it once a round for every group, without gradients, and takes over the rows of the particles
        that moved in this round; it does nothing to the others, whose rows may be NaN. factors: `[P]`, on each
        particle's learning rates. Changes nothing in place. Like everything of a particle it is a function of its
        arguments, row i of row i only, so that a resumed run does the same.
        """
        ...


def blank_parameters(particle: Particle, ids: Tensor) -> Parameters:
    """Zeros in the names and shapes of what `init` makes for `ids` `[P]`; needs no source."""
    return {name: value.new_zeros(len(ids), *value.shape[1:]) for name, value in particle.init(0, ids[:0]).items()}


def parameter_counts(particle: Particle) -> tuple[int, int]:
    """Trained and frozen numbers of one particle; takes no memory."""
    blank = particle.init(0, torch.zeros(0, dtype=torch.int64))
    sizes = {name: value.shape[1:].numel() for name, value in blank.items()}
    trained = sum(sizes[name] for name in particle.learning_rates(0))
    return trained, sum(sizes.values()) - trained
