"""One rank's particles in a round: their renders and their updates, on what the store leases.

Particles are rendered and updated in groups, one call each. With one particle a group, the bits of a particle do not
depend on its neighbours, which `numerics: exact` needs. A group that does not fit into memory is halved for the rest of
the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from distvsd.cameras import Cameras, CameraSampler
from distvsd.config import ParticlesConfig
from distvsd.faults import fault, poison
from distvsd.particles.base import Adaptive, Keys, Parameters, Particle, Rendered
from distvsd.particles.good import GoodStates
from distvsd.particles.group import Group, without_frozen
from distvsd.particles.health import Health, Update, judge
from distvsd.particles.recompute import checkpointed
from distvsd.particles.store import ParticleStore
from distvsd.particles.stored import GOOD, blank_state, read_particle

__all__ = ["Ensemble", "Group", "Update", "Views"]


@dataclass(frozen=True)
class Views:
    """What one group rendered this round: cameras `[P, V]`, and the renders with their graph."""

    group: Group
    cameras: Cameras
    rendered: Rendered

    @property
    def ids(self) -> Tensor:
        """`[P]`, on the device."""
        return self.group.ids


class Ensemble:
    """This rank's shard of the particles. Every method is local and communicates nothing; a shard may be empty."""

    def __init__(
        self, store: ParticleStore, sampler: CameraSampler, config: ParticlesConfig, whole: bool = False
    ) -> None:
        """config: `views` a particle and round, `recompute` and `health` are read. whole: `render` gives one part, for
        networks that all ranks must call equally often."""
        self.store, self.sampler, self.num_views = store, sampler, config.views
        self._render = checkpointed(store.particle.render) if config.recompute else store.particle.render
        self._config = config.health
        self._health = {particle_id: Health() for particle_id in store.ids}
        self._good = GoodStates(store.copies)
        self._whole = whole
        self.halved = False  # a group did not fit into memory since they were formed
        self._out_of_memory: set[int] = set()  # in this round
        self._update = Update()  # of this round, so far

    @property
    def particle(self) -> Particle:
        return self.store.particle

    @property
    def ids(self) -> list[int]:
        return self.store.ids

    def regroup(self, size: int) -> None:
        """From the next round on, groups of so many particles; 0 is all in one."""
        self.store.regroup(size)
        self.halved = False

    @property
    def quarantined(self) -> list[int]:
        """Particles of this rank that take no part any more."""
        return [particle_id for particle_id, health in self._health.items() if health.quarantined]

    @property
    def num_bytes(self) -> int:
        """Of everything in `stream`; reads nothing."""
        present, good = (
            sum(tensor.nbytes for tensor in of.values()) for of in (self._like, without_frozen(self._like))
        )
        beside = sum(self._good.place(particle_id) == "beside" for particle_id in self.ids)
        return len(self.ids) * present + beside * good

    @cached_property
    def _like(self) -> dict[str, Tensor]:
        """The names, dtypes and shapes of a state."""
        return blank_state(self.particle)

    def render(self, step: int, resolution: int) -> Iterator[list[Views]]:
        """The active particles from `num_views` fresh cameras, keyed by (seed, particle, step), part by part.

        A part is one group, or the whole shard where that was asked for. It is to be updated before the next is asked
        for, so that a round holds the graph of one part. A shard without active particles gives one empty part.

        Out of memory, a group is halved for the rest of the run and drawn again; a single particle that does not fit
        is NaN in all its views, without a graph. What else a renderer raises passes through.
        """
        self._out_of_memory.clear()
        self._update = Update()
        drawn = (views for group in self.store.lease(step) for views in self._views(group, resolution, step))
        if self._whole:
            yield list(drawn)
            return
        first = next(drawn, None)
        yield [] if first is None else [first]
        del first
        for views in drawn:
            yield [views]

    def _views(self, group: Group, resolution: int, step: int) -> Iterator[Views]:
        """Of the group, or of its parts where it does not fit into memory."""
        found = self._draw(group, resolution, step)
        if found is None and len(group.own) > 1:
            self.halved = True
            for half in self.store.split(group):
                yield from self._views(half, resolution, step)
            return
        if found is None:
            self._out_of_memory.update(group.own)
        yield Views(group, *(found or self._undrawn(group, resolution, step)))

    def _sample(self, group: Group, step: int) -> Cameras:
        field = self.particle.field(group.parameters)
        without_graph = None if field is None else torch.no_grad()(field)
        return self.sampler.sample(self.store.seed, group.ids, step, self.num_views, without_graph)

    def _draw(self, group: Group, resolution: int, step: int) -> tuple[Cameras, Rendered] | None:
        """None where the memory did not suffice; by then the exception, and the graph that it held, are gone."""
        try:
            fault("render", group.own)
            cameras = self._sample(group, step)
            rendered = self._render(group.parameters, cameras, resolution, Keys(self.store.seed, group.ids, step))
        except torch.OutOfMemoryError:
            return None
        return cameras, dataclasses.replace(rendered, images=poison("render", rendered.images, group.ids))

    def _undrawn(self, group: Group, resolution: int, step: int) -> tuple[Cameras, Rendered]:
        """NaN in the place of the views of one particle that could not be drawn."""
        cameras = self._sample(group, step)
        image: tuple[int, ...] = (3, resolution, resolution)
        if self.particle.is_latent:
            # Only the particle knows the size of its latents; to draw no view of it takes no memory.
            with torch.no_grad():
                image = self.particle.view(group.parameters, cameras[:, :0], resolution, 0.0).images.shape[2:]
        blank = cameras.fovy.new_full((*cameras.shape, 1, *image[1:]), torch.nan)
        return cameras, Rendered(blank.expand(-1, -1, image[0], -1, -1), blank, torch.zeros(1, device=blank.device))

    def update(self, views: list[Views], latents: Tensor, gradient: Tensor, step: int) -> None:
        """One Adam step a particle along `gradient` at the latents, plus the regularisers' own gradient.

        views: a part of this round's `render`. latents: `[N, C, h, w]` with the graph to this ensemble's parameters, in
        the order of the views; gradient: the same shape (Eq. 9: the UNet's Jacobian is left out, the encoder's and the
        renderer's are not). A particle whose latents, gradient at the latents or gradient is not finite keeps its
        state, as do all of this part when the memory does not suffice for the backward pass; `particles.health` says
        what happens when that goes on. Consumes the graph.
        """
        if views:
            self._update = self._update + self._move(views, latents, gradient, step)

    def finish(self, step: int) -> Update:
        """What all updates of this round did. Every `particles.health.good_every` rounds the states are marked as
        good."""
        if (step + 1) % self._config.good_every == 0:
            self.mark_good()
        found_again, set_back = self.store.take_losses()
        return self._update + Update(found_again=found_again, set_back=set_back)

    def _move(self, views: list[Views], latents: Tensor, gradient: Tensor, step: int) -> Update:
        groups = [view.group for view in views]
        own = [particle_id for group in groups for particle_id in group.own]
        self._good.before_moves(own)
        # The backward pass may swallow a NaN (a ReLU does), so what goes into it is looked at as well.
        finite = latents.detach().flatten(1).isfinite().all(1) & gradient.flatten(1).isfinite().all(1)
        sound = finite.reshape(-1, self.num_views).all(1)
        moved: set[int] = set()
        if self._backward(views, latents, gradient):
            rates = self.particle.learning_rates(step)
            for group, is_sound in zip(groups, sound.split([len(group.own) for group in groups]), strict=True):
                records = [self._health[particle_id] for particle_id in group.own]
                taking_part = is_sound.new_tensor([not health.quarantined for health in records])
                factors = [health.rate(self._config) for health in records]
                own_moved = group.move(rates, is_sound & taking_part, factors)
                self._adapt(group, own_moved, factors, step)
                moved.update(own_moved)
        else:
            self._out_of_memory.update(own)
            self.halved = True
            groups = [half for group in groups for half in self.store.split(group)]
        update = judge({i: self._health[i] for i in own}, moved, self._out_of_memory, self._config)
        for particle_id in (*update.restored, *update.quarantined):
            self._put_back(particle_id)
        for particle_id in update.quarantined:
            self._good.forget(particle_id)  # it has moved for the last time
        self.store.commit(groups)
        return update

    @torch.no_grad()
    def _adapt(self, group: Group, moved: list[int], factors: list[float], step: int) -> None:
        """The structure of those that moved, where their kind has one that changes."""
        if not moved or not isinstance(self.particle, Adaptive):
            return
        keys = Keys(self.store.seed, group.ids, step)
        like = next(iter(group.trained.values()))
        adapted = self.particle.adapt(group.parameters, keys, like.new_tensor(factors))
        if adapted is not None:
            group.take_over(adapted, moved)

    def _backward(self, views: list[Views], latents: Tensor, gradient: Tensor) -> bool:
        """Gradients into the parameters' `grad`; False, and none, where the memory did not suffice."""
        penalties = torch.cat([view.rendered.penalty for view in views])
        # What is NaN because it could not be drawn has no graph.
        roots = [root for root in (latents, penalties) if root.requires_grad]
        seeds = [gradient if root is latents else torch.ones_like(root) for root in roots]
        try:
            fault("gradient", [particle_id for view in views for particle_id in view.group.own])
            if roots:
                torch.autograd.backward(roots, seeds)
        except torch.OutOfMemoryError:
            for view in views:
                view.group.forget_gradients()
            return False
        return True

    @torch.no_grad()
    def _put_back(self, particle_id: int) -> None:
        """To its last good state, or to its initial one where it was never marked good. What is frozen but adapts
        begins anew: it follows from what is trained."""
        good, state = self._good.kept(particle_id), self.store.state_of(particle_id)
        trained = without_frozen(state)
        adapts = len(trained) < len(state) and isinstance(self.particle, Adaptive)
        begun = {}
        if good is None or adapts:
            begun = {f"param/{name}": value for name, value in self.store.initial(particle_id).items()}
        for name, live in (state if adapts else trained).items():
            source = begun if good is None or name not in trained else good
            live.copy_(source.get(name, torch.zeros_like(live)))

    def mark_good(self) -> None:
        """The present state of every particle that is well becomes the one that it goes back to.

        `finish` calls it, by the number of the round: when checkpoints are written must not change what comes later.
        """
        self._good.mark(
            particle_id for particle_id, health in self._health.items() if not health.bad and not health.quarantined
        )

    @torch.no_grad()
    def view(self, ids: Sequence[int], cameras: Cameras, resolution: int, background: float) -> Rendered:
        """Particles `ids` of this shard from given cameras `[len(ids), V]`, nothing random, on a grey background."""
        device = self.store.device
        states = [self.parameters_of(particle_id) for particle_id in ids]
        stacked = {name: torch.stack([state[name].to(device) for state in states]) for name in states[0]}
        return self.particle.view(stacked, cameras.to(device), resolution, background)

    def parameters_of(self, particle_id: int) -> Parameters:
        """One particle's parameters, without the leading axis; views of the live tensors."""
        state = self.store.state_of(particle_id)
        return {name.removeprefix("param/"): value for name, value in state.items() if name.startswith("param/")}

    def close(self) -> None:
        """Nothing may be asked of the ensemble any more."""
        self.store.close()

    def health(self) -> dict[int, dict[str, Any]]:
        """Every particle's record by id, as plain values for the manifest; `good` says where its last good state is."""
        return {
            particle_id: health.to_json() | {"good": self._good.place(particle_id)}
            for particle_id, health in self._health.items()
        }

    def stream(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """All that a particle needs to go on, one particle after the other: its id, and param/*, adam_m/*, adam_v/* and
        adam_step; views of live tensors. A state is valid until the next is asked for.

        Also the state that a particle would go back to, with names that begin with `good/`, unless that is this one or
        the initial one.
        """
        if self.store.device.type == "cuda":
            torch.cuda.synchronize(self.store.device)  # the copies of good states are on the host by now
        for particle_id, state in self.store.stream():
            yield particle_id, self._with_good(particle_id, state)

    def saved(self, particle_id: int) -> dict[str, Tensor]:
        """What `stream` gives of one particle."""
        if self.store.device.type == "cuda":
            torch.cuda.synchronize(self.store.device)
        return self._with_good(particle_id, self.store.state_of(particle_id))

    def _with_good(self, particle_id: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        good = self._good.kept(particle_id) or {}
        return state | {GOOD + name: value for name, value in good.items()}

    def state(self) -> dict[int, dict[str, Tensor]]:
        """All of `stream` at once, in memory."""
        return dict(self.stream())

    @torch.no_grad()
    def load_state(self, particle_id: int, tensors: dict[str, Tensor], health: dict[str, Any] | None = None) -> None:
        """Restores one particle bit for bit. health: its record in the manifest, None for one that never failed.

        Raises CheckpointError, and changes nothing, where `read_particle` refuses it.
        """
        record, place, good = read_particle(particle_id, self._like, tensors, health)
        self.store.put(particle_id, {name: tensors[name] for name in self._like})
        self._health[particle_id] = record
        self._good.forget(particle_id)
        if place == "beside":
            self._good.keep(particle_id, {name: good[name] for name in without_frozen(self._like)})
        elif place == "present":
            self._good.mark([particle_id])
