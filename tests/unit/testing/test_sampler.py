"""`check_sampler` finds every rule that a sampler violates, and accepts the built-in one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.cameras import Cameras, Field, OrbitSampler
from distvsd.config import CamerasConfig
from distvsd.testing import check_sampler

ORBIT = OrbitSampler(CamerasConfig())
GENERATOR = torch.Generator()


def test_the_sampler_of_the_house_conforms() -> None:
    check_sampler(ORBIT, distance=CamerasConfig().distance)
    check_sampler(ORBIT, ids=[0, 2**31 - 1], num_views=1)


class Spoiled:
    """The orbit sampler; a test spoils one part of it."""

    def __init__(
        self,
        change: Callable[[Cameras], Cameras] = lambda cameras: cameras,
        keys: Callable[[int, Tensor, int], tuple[int, Tensor, int]] = lambda seed, ids, step: (seed, ids, step),
        inspected: Callable[[Cameras], Cameras] = lambda cameras: cameras,
    ) -> None:
        self.change, self.keys, self.inspected = change, keys, inspected

    def sample(self, seed: int, ids: Tensor, step: int, views: int, field: Field | None) -> Cameras:
        return self.change(ORBIT.sample(*self.keys(seed, ids, step), views, field))

    def inspection(self, views: int) -> Cameras:
        return self.inspected(ORBIT.inspection(views))


def with_(**changes: Callable[[Tensor], Tensor]) -> Callable[[Cameras], Cameras]:
    """Changes fields of the cameras."""
    return lambda cameras: dataclasses.replace(
        cameras, **{name: change(getattr(cameras, name)) for name, change in changes.items()}
    )


def pose(*diagonal: float) -> Callable[[Cameras], Cameras]:
    return with_(extrinsics=lambda matrix: matrix * torch.tensor([*diagonal, 1.0]))


def turned_by_the_mean(cameras: Cameras) -> Cameras:
    """A field of view that depends on the other particles."""
    return dataclasses.replace(cameras, fovy=cameras.fovy + 0.1 * cameras.fovy.mean())


def random_fovy(fovy: Tensor) -> Tensor:
    return fovy + 0.1 * torch.rand(fovy.shape, generator=GENERATOR)


CASES: list[tuple[str, Spoiled, str]] = [
    ("no view axis", Spoiled(lambda cameras: cameras[:, 0]), r"extrinsics is .* \[3, 4, 4\].*\[3, 1, 4, 4\]"),
    ("double", Spoiled(with_(fovy=Tensor.double)), "fovy is torch.float64"),
    ("nan", Spoiled(with_(fovy=lambda v: v / 0 * 0)), "fovy is not finite"),
    ("graph", Spoiled(with_(azimuth=lambda v: v.clone().requires_grad_())), "azimuth has a graph"),
    ("scaled", Spoiled(pose(2, 2, 2)), "not rotations"),
    ("mirrored", Spoiled(pose(-1, 1, 1)), "not rotations"),
    ("degrees", Spoiled(with_(fovy=torch.rad2deg)), "fovy is not between 0 and pi"),
    ("turned", Spoiled(with_(azimuth=lambda v: v + 0.5)), "elevation and azimuth are not those"),
    ("not repeated", Spoiled(with_(fovy=random_fovy)), "other cameras when it is called again"),
    ("no step", Spoiled(keys=lambda seed, ids, step: (seed, ids, 0)), "ignores the step"),
    ("no seed", Spoiled(keys=lambda seed, ids, step: (0, ids, step)), "ignores its seed"),
    ("one view", Spoiled(lambda c: c[:, torch.zeros(c.shape[1], dtype=torch.int64)]), "views of one particle are all"),
    ("neighbours", Spoiled(turned_by_the_mean), "depend on which particles"),
    ("no ids", Spoiled(keys=lambda seed, ids, step: (seed, 0 * ids, step)), "have the same cameras"),
    ("inspection of each", Spoiled(inspected=lambda c: c[torch.zeros(2, dtype=torch.int64)]), r"inspection\(1\)"),
    ("inspection drawn", Spoiled(inspected=with_(fovy=random_fovy)), "inspection gives other cameras"),
    ("inspection of one", Spoiled(inspected=lambda c: c[:, torch.zeros(c.shape[1], dtype=torch.int64)]), "different"),
]


@pytest.mark.parametrize(("sampler", "complaint"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_wrong_sampler_is_found(sampler: Any, complaint: str) -> None:
    with pytest.raises(AssertionError, match=f"this sampler cannot be used here: .*{complaint}"):
        check_sampler(sampler)


def test_the_sampler_that_is_spoiled_above_conforms() -> None:
    check_sampler(Spoiled())


def test_cameras_at_other_distances_than_claimed_are_found() -> None:
    with pytest.raises(AssertionError, match=r"not between 0.1 and 0.9"):
        check_sampler(ORBIT, distance=(0.1, 0.9))


def fog(ids: Tensor) -> Field:
    return lambda points: points.norm(dim=-1)


def test_cameras_inside_matter_are_found_where_the_sampler_claims_otherwise() -> None:
    check_sampler(ORBIT, field_of=fog)
    with pytest.raises(AssertionError, match=r"density is .* at most 0.9"):
        check_sampler(ORBIT, field_of=fog, free_of=0.9)
    with pytest.raises(AssertionError, match="free_of is given without field_of"):
        check_sampler(ORBIT, free_of=0.9)


def test_a_field_that_is_read_without_an_axis_of_particles_is_found() -> None:
    class Reads(Spoiled):
        def sample(self, seed: int, ids: Tensor, step: int, views: int, field: Field | None) -> Cameras:
            cameras = super().sample(seed, ids, step, views, field)
            if field is not None:
                field(cameras.extrinsics[..., :3, 3].flatten(0, 1))
            return cameras

    with pytest.raises(AssertionError, match=r"the field is read at points \[3, 3\]"):
        check_sampler(Reads(), field_of=fog)


def test_cameras_that_break_where_there_is_no_field_are_found() -> None:
    class Needs(Spoiled):
        def sample(self, seed: int, ids: Tensor, step: int, views: int, field: Field | None) -> Cameras:
            cameras = super().sample(seed, ids, step, views, field)
            return cameras if field else dataclasses.replace(cameras, fovy=cameras.fovy * math.nan)

    with pytest.raises(AssertionError, match="without a field: fovy is not finite"):
        check_sampler(Needs(), field_of=fog)


def test_a_draw_from_the_global_random_state_and_a_single_particle_are_found() -> None:
    def draws(cameras: Cameras) -> Cameras:
        torch.rand(1)
        return cameras

    with pytest.raises(AssertionError, match="global random state"):
        check_sampler(Spoiled(draws))
    with pytest.raises(AssertionError, match="at least two different"):
        check_sampler(ORBIT, ids=[4])
