"""The particles a rank owns: their parameters, their optimiser, their renders and their updates.

Particles live in groups that are rendered and updated in one call; a group is all of the rank's particles, or as many
as `micro_batch` says. With one particle a group, the arithmetic of a particle does not depend on its neighbours to the
last bit, which `numerics: exact` needs. A group that does not fit into memory is halved for the rest of the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distvsd.cameras import Cameras, OrbitSampler
from distvsd.faults import fault, poison
from distvsd.particles.adam import ParticleAdam
from distvsd.particles.base import Keys, Parameters, Particle, Rendered
from distvsd.particles.good import GOOD_EVERY, GoodStates
from distvsd.particles.group import Group
from distvsd.particles.health import DefaultHealth, Health, HealthOptions, Update
from distvsd.particles.recompute import forgetful
from distvsd.particles.stored import GOOD, read_particle

__all__ = ["Ensemble", "Group", "Update", "Views"]


@dataclass(frozen=True)
class Views:
    """What one group rendered this round: ids `[P]`, cameras `[P, V]`, and the renders with their graph."""

    ids: Tensor
    cameras: Cameras
    rendered: Rendered


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
        health: HealthOptions | None = None,
        recompute: bool = False,
    ) -> None:
        """micro_batch: particles a group, 0 for all of them in one. health: None for the configuration's defaults.

        recompute: a group is drawn again in the backward pass, with the same bits, instead of being kept until then.
        """
        self.particle, self.sampler, self.num_views, self.seed = particle, sampler, num_views, seed
        self._render = forgetful(particle.render) if recompute else particle.render
        self.ids = list(ids)
        self._options: HealthOptions = health or DefaultHealth()
        self._health = {particle_id: Health() for particle_id in self.ids}
        self._good = GoodStates()
        self._crowded_out: set[int] = set()  # for whom the memory did not suffice in this round
        size = micro_batch or max(len(self.ids), 1)
        self.groups: list[Group] = []
        for first in range(0, len(self.ids), size):
            own = self.ids[first : first + size]
            chosen = torch.tensor(own, device=device)
            parameters = {name: value.requires_grad_() for name, value in particle.init(seed, chosen).items()}
            self.groups.append(Group(own, chosen, parameters, ParticleAdam.zeros(parameters, betas, eps)))

    @property
    def quarantined(self) -> list[int]:
        """Particles of this rank that take no part any more."""
        return [particle_id for particle_id, health in self._health.items() if health.quarantined]

    @property
    def num_bytes(self) -> int:
        """Of everything in `state`."""
        return sum(tensor.nbytes for state in self.state().values() for tensor in state.values())

    def render(self, step: int, resolution: int) -> list[Views]:
        """Every particle from `num_views` fresh cameras, one entry a group; keyed by (seed, particle, step).

        Out of memory, a group is halved for the rest of the run and drawn again; a single particle that does not fit
        is NaN in all its views, without a graph. What else a renderer raises passes through.
        """
        self._crowded_out.clear()
        drawn: list[tuple[Group, Cameras, Rendered | None]] = []
        while len(drawn) < len(self.groups):
            at = len(drawn)
            group = self.groups[at]
            cameras = self.sampler.sample(self.seed, group.ids, step, self.num_views)
            rendered = self._draw(group, cameras, resolution, step)
            if rendered is None and len(group.own) > 1:
                self.groups[at : at + 1] = group.halves()
            else:
                drawn.append((group, cameras, rendered))
                self._crowded_out.update(group.own if rendered is None else ())
        like = next((rendered for _, _, rendered in drawn if rendered is not None), None)
        return [
            Views(group.ids, cameras, rendered or self._undrawn(group, cameras, resolution, like))
            for group, cameras, rendered in drawn
        ]

    def _draw(self, group: Group, cameras: Cameras, resolution: int, step: int) -> Rendered | None:
        """None where the memory did not suffice; by then the exception, and the graph that it held, are gone."""
        try:
            fault("render", group.own)
            keys = Keys(self.seed, group.ids, step)
            rendered = self._render(group.parameters, cameras, resolution, keys)
        except torch.OutOfMemoryError:
            return None
        return dataclasses.replace(rendered, images=poison("render", rendered.images, group.ids))

    def _undrawn(self, group: Group, cameras: Cameras, resolution: int, like: Rendered | None) -> Rendered:
        """NaN in the place of the views of one particle that could not be drawn. like: what another group drew."""
        penalty = torch.zeros(1, device=cameras.fovy.device)
        if like is not None:
            # In the same layout of memory: a batch of two layouts is laid out anew, and the networks' kernels, and with
            # them the last bits of everybody in it, depend on the layout.
            images, opacity = (torch.full_like(part.detach()[:1], torch.nan) for part in (like.images, like.opacity))
            return Rendered(images, opacity, penalty)
        image: tuple[int, ...] = (3, resolution, resolution)
        if self.particle.is_latent:
            # Only the particle knows the size of its latents; to draw no view of it takes no memory.
            with torch.no_grad():
                image = self.particle.view(group.parameters, cameras[:, :0], resolution, 0.0).images.shape[2:]
        blank = penalty.new_full((*cameras.shape, 1, *image[1:]), torch.nan)
        return Rendered(blank.expand(-1, -1, image[0], -1, -1), blank, penalty)

    def update(self, views: list[Views], latents: Tensor, gradient: Tensor, step: int) -> Update:
        """One Adam step a particle along `gradient` at the latents, plus the regularisers' own gradient.

        latents: `[N, C, h, w]` with the graph to this ensemble's parameters, in the order of the groups; gradient: the
        same shape (Eq. 9: the UNet's Jacobian is left out, the encoder's and the renderer's are not). A particle whose
        latents, gradient at the latents or gradient is not finite keeps its state, as do all of this rank's when the
        memory does not suffice for the backward pass; `particles.health` says what happens when that goes on. Every
        `GOOD_EVERY` rounds the states are marked as good. Consumes the graph.
        """
        if not self.ids:
            return Update()
        self._good.before_moves(self._state_of)
        # The backward pass may swallow a NaN (a ReLU does), so what goes into it is looked at as well.
        finite = latents.detach().flatten(1).isfinite().all(1) & gradient.flatten(1).isfinite().all(1)
        sound = finite.reshape(-1, self.num_views).all(1)
        moved: list[int] = []
        if self._backward(views, latents, gradient):
            rates = self.particle.learning_rates(step)
            for group, is_sound in zip(self.groups, sound.split([len(g.own) for g in self.groups]), strict=True):
                records = [self._health[particle_id] for particle_id in group.own]
                taking_part = is_sound.new_tensor([not health.quarantined for health in records])
                factors = [health.rate(self._options) for health in records]
                moved += group.move(rates, is_sound & taking_part, factors)
        else:
            self._crowded_out.update(self.ids)
            self.groups = [half for group in self.groups for half in group.halves()]
        update = self._judge(set(moved))
        if (step + 1) % GOOD_EVERY == 0:
            self.mark_good()
        return update

    def _backward(self, views: list[Views], latents: Tensor, gradient: Tensor) -> bool:
        """Gradients into the parameters' `grad`; False, and none, where the memory did not suffice."""
        penalties = torch.cat([view.rendered.penalty for view in views])
        # What is NaN because it could not be drawn has no graph.
        roots = [root for root in (latents, penalties) if root.requires_grad]
        seeds = [gradient if root is latents else torch.ones_like(root) for root in roots]
        try:
            fault("gradient", self.ids)
            if roots:
                torch.autograd.backward(roots, seeds)
        except torch.OutOfMemoryError:
            for group in self.groups:
                group.forget_gradients()
            return False
        return True

    def _judge(self, moved: set[int]) -> Update:
        """Brings every record up to date, and puts back who has failed for too long."""
        update = Update()
        for particle_id, health in self._health.items():
            if particle_id not in moved:
                update.absent.append(particle_id)
            if health.quarantined:
                continue
            verdict = health.judge(particle_id in moved, self._options)
            (update.healthy if verdict == "healthy" else update.unhealthy).append(particle_id)
            if verdict != "healthy" and particle_id in self._crowded_out:
                update.crowded_out.append(particle_id)
            if verdict == "restore":
                update.restored.append(particle_id)
            if verdict == "quarantine":
                update.quarantined.append(particle_id)
            if verdict in ("restore", "quarantine"):
                self._put_back(particle_id)
            if verdict == "quarantine":
                self._good.forget(particle_id)  # it has moved for the last time
        return update

    @torch.no_grad()
    def _put_back(self, particle_id: int) -> None:
        """To its last good state; who was never marked good begins anew, with the initial state of its own stream."""
        group, row = self._find(particle_id)
        good = self._good.kept(particle_id)
        if good is None:
            fresh = self.particle.init(self.seed, group.ids[row : row + 1])
            good = {f"param/{name}": value[0] for name, value in fresh.items()}
        for name, live in group.state_of(row).items():
            live.copy_(good.get(name, torch.zeros_like(live)))

    def mark_good(self) -> None:
        """The present state of every particle that is well becomes the one that it goes back to.

        `update` calls it, by the number of the round: when checkpoints are written must not change what comes later.
        """
        self._good.mark(
            particle_id for particle_id, health in self._health.items() if not health.bad and not health.quarantined
        )

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

    def health(self) -> dict[int, dict[str, Any]]:
        """Every particle's record by id, as plain values for the manifest; `good` says where its last good state is."""
        return {
            particle_id: health.to_json() | {"good": self._good.place(particle_id)}
            for particle_id, health in self._health.items()
        }

    def state(self) -> dict[int, dict[str, Tensor]]:
        """All that a particle needs to go on, by id: param/*, adam_m/*, adam_v/* and adam_step; views of live tensors.

        Also the state that a particle would go back to, with names that begin with `good/`, unless that is this one or
        the initial one.
        """
        states = {}
        for group in self.groups:
            if group.ids.is_cuda:
                torch.cuda.synchronize(group.ids.device)  # the copies of good states are on the host by now
            for row, particle_id in enumerate(group.own):
                good = self._good.kept(particle_id) or {}
                states[particle_id] = group.state_of(row) | {GOOD + name: value for name, value in good.items()}
        return states

    @torch.no_grad()
    def load_state(self, particle_id: int, tensors: dict[str, Tensor], health: dict[str, Any] | None = None) -> None:
        """Restores one particle bit for bit. health: its record in the manifest, None for one that never failed.

        Raises CheckpointError, and changes nothing, where `read_particle` refuses it.
        """
        group, row = self._find(particle_id)
        targets = group.state_of(row)
        record, place, good = read_particle(particle_id, targets, tensors, health)
        for name, target in targets.items():
            target.copy_(tensors[name])
        self._health[particle_id] = record
        self._good.forget(particle_id)
        if place == "beside":
            self._good.keep(particle_id, {name: good[name] for name in targets})
        elif place == "present":
            self._good.mark([particle_id])

    def _state_of(self, particle_id: int) -> dict[str, Tensor]:
        group, row = self._find(particle_id)
        return group.state_of(row)

    def _find(self, particle_id: int) -> tuple[Group, int]:
        for group in self.groups:
            if particle_id in group.own:
                return group, group.own.index(particle_id)
        raise KeyError(f"particle {particle_id} is not on this rank, which owns {self.ids}")
