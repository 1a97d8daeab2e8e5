"""What a sampler of cameras must fulfil to be used here: run `check_sampler` on yours in your own tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.cameras import Cameras, CameraSampler, Field
from distvsd.errors import ConfigError
from distvsd.testing.rules import require, subject

TOLERANCE = 1e-4  # world units and radians
STEPS = 4  # rounds that are looked at


def check_sampler(
    sampler: CameraSampler,
    ids: Sequence[int] = (3, 0, 11),
    *,
    field_of: Callable[[Tensor], Field] | None = None,
    distance: tuple[float, float] = (0.0, math.inf),
    free_of: float = math.inf,
    num_views: int = 3,
    device: torch.device | str = "cpu",
) -> None:
    """Raises AssertionError with one paragraph, what is wrong and why it matters, for the first rule that is broken.

    ids: at least two particles. field_of: the field of particles `[P]`, for samplers that read it. distance: least and
    largest distance from the origin at which the sampler claims to place cameras, world units. free_of: the highest
    density in which it claims to place one; needs field_of. Needs no ranks and does not communicate.
    """
    require(len(set(ids)) == len(ids) >= 2, f"ids is {list(ids)}; give at least two different ones")
    require(free_of == math.inf or field_of is not None, "free_of is given without field_of; there is nothing to read")
    chosen = torch.tensor(list(ids), device=device)
    trial = _Trial(sampler, chosen, field_of, distance, free_of, num_views)
    with subject("this sampler cannot be used here"):
        trial.poses_are_sound()
        trial.positions_are_as_claimed()
        trial.keyed()
        trial.rows_are_independent()
        trial.works_or_refuses_without_a_field()
        trial.inspection_is_fixed()


@dataclass(frozen=True)
class _Trial:
    sampler: CameraSampler
    ids: Tensor
    field_of: Callable[[Tensor], Field] | None
    distance: tuple[float, float]
    free_of: float
    num_views: int
    seed: int = 7

    def poses_are_sound(self) -> None:
        for views in (1, self.num_views):
            for step in range(STEPS):
                _sound(f"sample at step {step}", self._sample(step, views), (len(self.ids), views), self.ids.device)

    def positions_are_as_claimed(self) -> None:
        low, high = self.distance
        for step in range(STEPS):
            positions = self._sample(step).extrinsics[..., :3, 3]
            away = positions.norm(dim=-1)
            require(
                bool(((away >= low - TOLERANCE) & (away <= high + TOLERANCE)).all()),
                f"cameras are {float(away.amin()):.3g} to {float(away.amax()):.3g} away from the origin, not between "
                f"{low:.3g} and {high:.3g}, as they claim",
            )
            if self.field_of is not None:
                density = self.field_of(self.ids)(positions)
                require(
                    bool((density <= self.free_of).all()),
                    f"a camera stands where the density is {float(density.amax()):.3g}; the sampler claims at most "
                    f"{self.free_of:.3g}",
                )

    def keyed(self) -> None:
        first = self._sample(0)
        require(
            _same(first, self._sample(0)),
            "sample gives other cameras when it is called again; draw from distvsd.vsd.rng keyed by seed, id and step, "
            "or a resumed run differs",
        )
        require(not _same(first, self._sample(1)), "sample ignores the step; particles would be seen from few sides")
        other_seed = self._sample(0, seed=self.seed + 1)
        require(not _same(first, other_seed), "sample ignores its seed; two runs would have the same cameras")
        require(
            self.num_views == 1 or not _same(first[:, :1], first[:, 1:2]), "the views of one particle are all the same"
        )

    def rows_are_independent(self) -> None:
        together = self._sample(0)
        for row, particle_id in enumerate(self.ids.tolist()):
            one = slice(row, row + 1)
            require(
                _same(self._sample(0, rows=one), together[one]),
                f"the cameras of particle {particle_id} depend on which particles are sampled in the same call, and "
                "another number of ranks groups the particles differently",
            )
            twin = next((other for other in range(row) if _same(together[other], together[row])), None)
            require(
                twin is None,
                f"particles {particle_id} and {int(self.ids[twin or 0])} have the same cameras; key the streams by the "
                "ids",
            )

    def works_or_refuses_without_a_field(self) -> None:
        try:
            cameras = self.sampler.sample(self.seed, self.ids, 0, self.num_views, None)
        except ConfigError:
            return
        _sound("sample without a field", cameras, (len(self.ids), self.num_views), self.ids.device)

    def inspection_is_fixed(self) -> None:
        for views in (1, 5):
            cameras = self.sampler.inspection(views)
            _sound(f"inspection({views})", cameras, (1, views), torch.device("cpu"))
            require(
                _same(cameras, self.sampler.inspection(views)),
                "inspection gives other cameras when it is called again; evaluations could not be compared",
            )
            poses = {tuple(matrix.flatten().tolist()) for matrix in cameras.extrinsics[0]}
            require(len(poses) == views, f"inspection({views}) has only {len(poses)} different cameras")

    def _sample(
        self, step: int, views: int | None = None, rows: slice = slice(None), seed: int | None = None
    ) -> Cameras:
        ids = self.ids[rows]
        field = None if self.field_of is None else _at_rows(self.field_of(ids), len(ids))
        return self.sampler.sample(self.seed if seed is None else seed, ids, step, views or self.num_views, field)


def _at_rows(field: Field, particles: int) -> Field:
    """The field, refusing points that are not one row a particle."""

    def read(points: Tensor) -> Tensor:
        require(
            points.ndim == 3 and points.shape[0] == particles and points.shape[2] == 3,
            f"the field is read at points {list(points.shape)}; they must be [{particles}, N, 3], row i of particle i",
        )
        return field(points)

    return read


def _sound(where: str, cameras: Cameras, shape: tuple[int, int], device: torch.device) -> None:
    wanted = {"extrinsics": (*shape, 4, 4), "fovy": shape, "elevation": shape, "azimuth": shape}
    for name, expected in wanted.items():
        value: Tensor = getattr(cameras, name)
        require(
            value.shape == expected and value.dtype == torch.float32 and value.device == device,
            f"{where}: {name} is {value.dtype} {list(value.shape)} on {value.device}; it must be float32 "
            f"{list(expected)} on {device}",
        )
        require(bool(value.isfinite().all()), f"{where}: {name} is not finite")
        require(not value.requires_grad, f"{where}: {name} has a graph; cameras are not trained")
    rotation, position = cameras.extrinsics[..., :3, :3], cameras.extrinsics[..., :3, 3]
    upright = rotation @ rotation.transpose(-1, -2) - torch.eye(3, device=device)
    last = cameras.extrinsics[..., 3, :] - torch.tensor([0.0, 0.0, 0.0, 1.0], device=device)
    require(
        bool(upright.abs().amax() < TOLERANCE)
        and bool((torch.linalg.det(rotation) > 0).all())
        and bool(last.abs().amax() < TOLERANCE),
        f"{where}: extrinsics are not rotations and positions, camera to world",
    )
    require(
        bool(((cameras.fovy > 0) & (cameras.fovy < math.pi)).all()), f"{where}: fovy is not between 0 and pi radians"
    )
    away = position.norm(dim=-1).clamp_min(1e-12)
    # As unit vectors, because an angle jumps at a full turn and has no value on the axis.
    along = torch.stack(
        (
            cameras.elevation.cos() * cameras.azimuth.cos(),
            cameras.elevation.cos() * cameras.azimuth.sin(),
            cameras.elevation.sin(),
        ),
        dim=-1,
    )
    require(
        bool((along * away[..., None] - position).abs().amax() < TOLERANCE * (1 + away.amax())),
        f"{where}: elevation and azimuth are not those of the camera as seen from the origin, by which prompts are "
        "chosen",
    )


def _same(a: Cameras, b: Cameras) -> bool:
    return torch.equal(a.extrinsics, b.extrinsics) and torch.equal(a.fovy, b.fovy)
