"""Particles that are rendered and updated in one call: their stacked parameters and the state of their optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.faults import poison
from distvsd.particles.adam import ParticleAdam
from distvsd.particles.base import Adapted, Parameters, Particle

# Adam squares the gradient. A square that overflows would make the second moment infinite: the particle would never
# move again, and nothing would be NaN. So a gradient from here on counts as not finite; (1e18)^2 is far below 3e38.
LARGEST_GRADIENT = 1e18


@dataclass
class Group:
    """P particles. own: their ids, on the host; ids: the same `[P]` on the device; parameters `[P, ...]`, of which the
    trained ones are leaves that require gradients; adam: of the trained ones."""

    own: list[int]
    ids: Tensor
    parameters: Parameters
    adam: ParticleAdam

    @staticmethod
    def of(
        particle: Particle, own: list[int], ids: Tensor, parameters: Parameters, betas: tuple[float, float], eps: float
    ) -> Group:
        """Particles that have not moved yet."""
        rates = particle.learning_rates(0)
        trained = {name: value.requires_grad_() for name, value in parameters.items() if name in rates}
        return Group(own, ids, parameters, ParticleAdam.zeros(trained, betas, eps))

    @property
    def trained(self) -> Parameters:
        return {name: self.parameters[name] for name in self.adam.mean}

    def move(self, rates: dict[str, float], may_move: Tensor, factors: list[float]) -> list[int]:
        """One step of those in `may_move` `[P]` whose gradients are finite; returns their ids, and forgets `grad`.

        factors: on each particle's learning rates.
        """
        trained = self.trained
        gradients = {
            name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in trained.items()
        }
        self.forget_gradients()
        first = next(iter(gradients))
        gradients[first] = poison("gradient", gradients[first], self.ids)
        # The largest magnitude of each particle; NaN passes through a maximum, and compares as false.
        largest = [torch.linalg.vector_norm(value.flatten(1), torch.inf, 1) for value in gradients.values()]
        moves = may_move & torch.stack([norm < LARGEST_GRADIENT for norm in largest]).all(0)
        self.adam.step(trained, gradients, rates, moves, largest[0].new_tensor(factors))
        return [particle_id for particle_id, moved in zip(self.own, moves.tolist(), strict=True) if moved]

    @torch.no_grad()
    def take_over(self, adapted: Adapted, ids: list[int]) -> None:
        """The new structure of particles `ids`; the others keep every bit."""
        chosen = self.ids.new_tensor([particle_id in ids for particle_id in self.own]).bool()
        for name, value in adapted.parameters.items():
            rows = chosen.reshape(-1, *[1] * (value.ndim - 1))
            self.parameters[name].copy_(torch.where(rows, value, self.parameters[name]))
        for name, mask in adapted.restarted.items():
            rows = mask & chosen.reshape(-1, *[1] * (mask.ndim - 1))
            for moment in (self.adam.mean[name], self.adam.square[name]):
                moment.copy_(torch.where(rows, torch.zeros_like(moment), moment))

    def forget_gradients(self) -> None:
        for value in self.trained.values():
            value.grad = None

    def halves(self) -> list[Group]:
        """The same particles as two groups, or the group itself if it has one particle. Shares the memory: this is
        called when none is free."""
        middle = len(self.own) // 2
        return [self.part(slice(0, middle)), self.part(slice(middle, None))] if middle else [self]

    def part(self, rows: slice) -> Group:
        """Some of the particles as a group of their own; shares the memory."""
        adam = self.adam
        return Group(
            self.own[rows],
            self.ids[rows],
            {name: value.detach()[rows].requires_grad_(value.requires_grad) for name, value in self.parameters.items()},
            ParticleAdam(
                adam.betas,
                adam.eps,
                {name: value[rows] for name, value in adam.mean.items()},
                {name: value[rows] for name, value in adam.square.items()},
                adam.count[rows],
            ),
        )

    def state_of(self, row: int | slice) -> dict[str, Tensor]:
        """All that a particle needs to go on: param/* of every parameter, adam_m/* and adam_v/* of the trained ones,
        and adam_step; views of live tensors, which may be written to."""
        tensors = {f"param/{name}": value.detach()[row] for name, value in self.parameters.items()}
        tensors |= {f"adam_m/{name}": value[row] for name, value in self.adam.mean.items()}
        tensors |= {f"adam_v/{name}": value[row] for name, value in self.adam.square.items()}
        return tensors | {"adam_step": self.adam.count[row]}


def without_frozen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of `Group.state_of` that updates change: no parameters without moments."""
    return {
        name: value
        for name, value in state.items()
        if not name.startswith("param/") or f"adam_m/{name.removeprefix('param/')}" in state
    }
