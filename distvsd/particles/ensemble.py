"""The particles a rank owns: their parameters, their optimiser, their renders and their updates.

Particles live in groups that are rendered and updated in one call; a group is all of the rank's particles, or as many
as `micro_batch` says. With one particle a group, the arithmetic of a particle does not depend on its neighbours to the
last bit, which `numerics: exact` needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.cameras import Cameras, OrbitSampler
from distvsd.errors import CheckpointError
from distvsd.particles.adam import ParticleAdam
from distvsd.particles.base import Keys, Parameters, Particle, Rendered


@dataclass
class Group:
    """P particles as stacked tensors: ids `[P]`, parameters `[P, ...]` (leaves that require gradients), their Adam."""

    ids: Tensor
    parameters: Parameters
    adam: ParticleAdam


@dataclass(frozen=True)
class Views:
    """What one group rendered this round: ids `[P]`, cameras `[P, V]`, and the renders with their graph."""

    ids: Tensor
    cameras: Cameras
    rendered: Rendered


@dataclass(frozen=True)
class Update:
    """healthy: ids whose gradients were finite, which moved. unhealthy: ids that kept their state this round."""

    healthy: list[int]
    unhealthy: list[int]


class Ensemble:
    """This rank's shard of the particles. Every method is local and communicates nothing; a shard may be empty."""

    def __init__(
        self,
        particle: Particle,
        ids: Sequence[int],
        sampler: OrbitSampler,
        num_views: int,
        seed: int,
        betas: tuple[float, float],
        eps: float,
        micro_batch: int,
        device: torch.device | str,
    ) -> None:
        """micro_batch: particles a group, 0 for all of them in one."""
        self.particle, self.sampler, self.num_views, self.seed = particle, sampler, num_views, seed
        self.ids = list(ids)
        size = micro_batch or max(len(self.ids), 1)
        self.groups = []
        for first in range(0, len(self.ids), size):
            chosen = torch.tensor(self.ids[first : first + size], device=device)
            parameters = {name: value.requires_grad_() for name, value in particle.init(seed, chosen).items()}
            self.groups.append(Group(chosen, parameters, ParticleAdam.zeros(parameters, betas, eps)))

    def render(self, step: int, resolution: int) -> list[Views]:
        """Every particle from `num_views` fresh cameras, one entry a group; keyed by (seed, particle, step)."""
        views = []
        for group in self.groups:
            cameras = self.sampler.sample(self.seed, group.ids, step, self.num_views)
            keys = Keys(self.seed, group.ids, step)
            views.append(Views(group.ids, cameras, self.particle.render(group.parameters, cameras, resolution, keys)))
        return views

    def update(self, views: list[Views], latents: Tensor, gradient: Tensor, step: int) -> Update:
        """One Adam step a particle along `gradient` at the latents, plus the regularisers' own gradient.

        latents: `[N, C, h, w]` with the graph to this ensemble's parameters, in the order of the groups; gradient: the
        same shape (Eq. 9: the UNet's Jacobian is left out, the encoder's and the renderer's are not). A particle with
        a gradient that is not finite keeps its state. Consumes the graph.
        """
        if not views:
            return Update([], [])
        penalties = torch.cat([view.rendered.penalty for view in views])
        roots, seeds = [latents], [gradient]
        if penalties.requires_grad:
            roots, seeds = [*roots, penalties], [*seeds, torch.ones_like(penalties)]
        torch.autograd.backward(roots, seeds)
        rates = self.particle.learning_rates(step)
        healthy: list[int] = []
        for group in self.groups:
            gradients = {
                name: torch.zeros_like(value) if value.grad is None else value.grad
                for name, value in group.parameters.items()
            }
            finite = torch.stack([value.flatten(1).isfinite().all(1) for value in gradients.values()]).all(0)
            group.adam.step(group.parameters, gradients, rates, finite)
            for value in group.parameters.values():
                value.grad = None
            healthy += group.ids[finite].tolist()
        return Update(healthy, sorted(set(self.ids) - set(healthy)))

    @torch.no_grad()
    def view(self, ids: Sequence[int], cameras: Cameras, resolution: int, background: float) -> Rendered:
        """Particles `ids` of this shard from given cameras `[len(ids), V]`, nothing random, on a grey background."""
        states = [self.parameters_of(particle_id) for particle_id in ids]
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        return self.particle.view(stacked, cameras, resolution, background)

    def parameters_of(self, particle_id: int) -> Parameters:
        """One particle's parameters, without the leading axis; views of the live tensors."""
        group, row = self._find(particle_id)
        return {name: value.detach()[row] for name, value in group.parameters.items()}

    def state(self) -> dict[int, dict[str, Tensor]]:
        """All that a particle needs to go on, by id: param/*, adam_m/*, adam_v/* and adam_step; views of live
        tensors."""
        states = {}
        for group in self.groups:
            for row, particle_id in enumerate(group.ids.tolist()):
                tensors = {f"param/{name}": value.detach()[row] for name, value in group.parameters.items()}
                tensors |= {f"adam_m/{name}": value[row] for name, value in group.adam.mean.items()}
                tensors |= {f"adam_v/{name}": value[row] for name, value in group.adam.square.items()}
                states[particle_id] = tensors | {"adam_step": group.adam.count[row]}
        return states

    @torch.no_grad()
    def load_state(self, particle_id: int, tensors: dict[str, Tensor]) -> None:
        """Restores one particle bit for bit. Raises CheckpointError where names or shapes are not this ensemble's."""
        group, row = self._find(particle_id)
        targets = {f"param/{name}": value[row] for name, value in group.parameters.items()}
        targets |= {f"adam_m/{name}": value[row] for name, value in group.adam.mean.items()}
        targets |= {f"adam_v/{name}": value[row] for name, value in group.adam.square.items()}
        targets |= {"adam_step": group.adam.count[row]}
        for name, target in targets.items():
            if name not in tensors or tensors[name].shape != target.shape:
                found = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise CheckpointError(
                    f"particle {particle_id}: {name} should be {tuple(target.shape)} but the checkpoint holds {found}; "
                    "resume with the particles' configuration of that run"
                )
            target.copy_(tensors[name])

    def _find(self, particle_id: int) -> tuple[Group, int]:
        for group in self.groups:
            rows = (group.ids == particle_id).nonzero()
            if len(rows):
                return group, int(rows[0])
        raise KeyError(f"particle {particle_id} is not on this rank, which owns {self.ids}")
