"""An adaptive sampler, which reads the field of each particle: no camera is placed inside matter."""

from dataclasses import dataclass

import pytest
import torch

from distvsd.cameras import Cameras, look_at_origin
from distvsd.errors import ConfigError
from distvsd.testing import check_sampler
from distvsd.vsd.rng import Purpose, uniform
from tests.unit.particles.shards import image, nerf, shard

NERF = nerf()
LIMIT = 0.5


@dataclass(frozen=True)
class FreeSpaceSampler:
    """Draws `tries` positions and takes the first at which the density is at most `limit`, or else the least dense one.
    The camera looks at the origin."""

    reach: float = 0.6
    limit: float = LIMIT
    tries: int = 64

    def sample(self, seed, ids, step, views, field):
        if field is None:
            raise ConfigError("cameras in free space need particles that have a volume")
        draws = uniform(seed, Purpose.CAMERA, ids, step, (views * self.tries, 3))
        positions = (2 * draws - 1) * self.reach
        density = field(positions).reshape(len(ids), views, self.tries)
        order = torch.arange(self.tries).expand_as(density)
        first = torch.where(density <= self.limit, order, self.tries).amin(-1)
        chosen = torch.where(first < self.tries, first, density.argmin(-1))
        index = chosen[..., None, None].expand(-1, -1, 1, 3)
        return self.at(positions.reshape(*density.shape, 3).gather(2, index)[:, :, 0])

    def inspection(self, views):
        turn = torch.arange(views) * (2 * torch.pi / views)
        return self.at(0.1 * torch.stack((turn.cos(), turn.sin(), 0 * turn), dim=-1)[None])

    def at(self, positions) -> Cameras:
        distance = positions.norm(dim=-1)
        elevation = (positions[..., 2] / distance).asin()
        return look_at_origin(
            elevation, torch.atan2(positions[..., 1], positions[..., 0]), distance, 1.0 + 0 * distance
        )


def field_of(ids):
    return NERF.field(NERF.init(0, ids))


def test_it_conforms_and_keeps_out_of_matter():
    check_sampler(FreeSpaceSampler(), field_of=field_of, free_of=LIMIT, distance=(0.0, 1.1))


def test_without_looking_at_the_field_it_would_stand_in_matter():
    with pytest.raises(AssertionError, match="density"):
        check_sampler(FreeSpaceSampler(limit=1e9), field_of=field_of, free_of=LIMIT)


def positions(views):
    return views.cameras.extrinsics[..., :3, 3]


def test_the_ensemble_gives_each_particle_its_own_present_field_without_a_graph():
    particles = shard(NERF, [4, 9], sampler=FreeSpaceSampler(), views=3)
    [[before]] = particles.render(0, 4)
    # The density at the centre is 10 in both; this lowers it to at most softplus(10 - 30) in particle 9.
    particles.parameters_of(9)["decoder_bias"][0] -= 30.0
    [[after]] = particles.render(0, 4)
    assert not after.cameras.extrinsics.requires_grad
    assert torch.equal(positions(after)[0], positions(before)[0])
    assert not torch.equal(positions(after)[1], positions(before)[1])
    live = {name: value.detach() for name, value in after.group.parameters.items()}
    assert (NERF.field(live)(positions(after)) <= LIMIT).all()


def test_grouping_does_not_change_which_field_is_read():
    together, alone = (shard(NERF, [4, 9, 2], sampler=FreeSpaceSampler(), views=2, micro_batch=size) for size in (0, 1))
    [[whole]] = together.render(3, 4)
    parts = torch.cat([positions(views) for [views] in alone.render(3, 4)])
    torch.testing.assert_close(positions(whole), parts, rtol=0, atol=1e-6)


def test_particles_without_a_volume_are_refused():
    with pytest.raises(ConfigError, match="volume"):
        list(shard(image(), [0], sampler=FreeSpaceSampler()).render(0, 4))
