"""Random streams: reference vectors, independence of batching, moments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distvsd.vsd import rng
from distvsd.vsd.rng import Purpose, normal, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Known-answer vectors of the Random123 distribution (kat_vectors, philox4x32, 10 rounds).
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def testphilox_gives_the_published_vectors(counter, key, expected):
    words = rng.philox(*(torch.tensor([word]) for word in counter), *key)
    assert tuple(int(word) for word in words) == expected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6), st.integers(0, 2**40), st.integers(0, 5))
def test_a_particles_numbers_do_not_depend_on_who_else_is_drawn(ids, step, pick):
    pick %= len(ids)
    together = normal(3, Purpose.NOISE, ids, step, (3, 5))
    alone = normal(3, Purpose.NOISE, [ids[pick]], step, (3, 5))
    assert torch.equal(together[pick], alone[0])


def test_every_part_of_the_key_changes_the_numbers():
    base = uniform(1, Purpose.NOISE, [4], 7, (64,), lane=0)
    others = [
        uniform(2, Purpose.NOISE, [4], 7, (64,)),
        uniform(1 + 2**40, Purpose.NOISE, [4], 7, (64,)),
        uniform(1, Purpose.CAMERA, [4], 7, (64,)),
        uniform(1, Purpose.NOISE, [5], 7, (64,)),
        uniform(1, Purpose.NOISE, [4], 8, (64,)),
        uniform(1, Purpose.NOISE, [4], 7, (64,), lane=1),
    ]
    assert all((base == other).float().mean() < 0.05 for other in others)


def test_moments_are_those_of_the_distributions():
    u = uniform(0, Purpose.NOISE, range(16), 0, (20_000,))
    n = normal(0, Purpose.NOISE, range(16), 0, (20_000,))
    # 320,000 numbers: standard errors 0.0005 for the mean of u, 0.0018 for that of n; five of them allowed.
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 2.6e-3 and abs(u.var() - 1 / 12) < 1e-3
    assert abs(n.mean()) < 9e-3 and abs(n.var() - 1) < 0.013 and abs((n**4).mean() - 3) < 0.1


def test_an_empty_shape_is_one_number_a_particle():
    assert uniform(0, Purpose.TIMESTEP, [1, 2, 3], 0, ()).shape == (3,)
    assert uniform(0, Purpose.TIMESTEP, torch.zeros(0, dtype=torch.int64), 0, (4,)).shape == (0, 4)


def test_seeding_a_library_leaves_the_global_generator_as_it_was():
    before = torch.get_rng_state()
    with rng.seeded(5, Purpose.INIT):
        first = torch.rand(3)
    with rng.seeded(5, Purpose.INIT):
        second = torch.rand(3)
    assert torch.equal(first, second) and torch.equal(before, torch.get_rng_state())
