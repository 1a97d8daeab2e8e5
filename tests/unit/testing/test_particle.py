"""`check_particle` finds every rule that a user's representation violates, and accepts the built-in ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.cameras import Cameras, Field
from distvsd.particles import Cost, Handed, Keys, NerfParticle, Parameters, Rendered
from distvsd.testing import check_particle
from distvsd.vsd.rng import Purpose, normal
from tests.unit.particles.shards import SMALL, image, nerf

BUSY = {"samples_per_ray": 8, "bound": 1.0, "smoothstep": True, "init_color": 0.5, "density_noise": 0.5}
BUSY |= {"entropy": 0.1, "sparsity": 0.1, "coverage": 0.1, "coverage_range": (0.4, 0.6)}


def busy(**fields: Any) -> NerfParticle:
    """A small field that uses every option of a field."""
    return nerf(dataclasses.replace(SMALL, **(BUSY | fields)))


PIXELS = image((3, 16, 16))


@pytest.mark.parametrize(
    "particle",
    [PIXELS, image((4, 8, 8)), busy(), busy(log2_table_size=6), busy(background="none")],
    ids=["pixels", "latents", "dense grid", "hashed grid", "no background"],
)
def test_the_representations_of_the_house_conform(particle: Any) -> None:
    check_particle(particle, ids=[5, 2, 9])
    check_particle(particle, ids=[0, 2**31 - 1], num_views=1)


def test_a_part_that_is_never_shown_is_found_unless_it_is_named() -> None:
    """With a plain colour behind every view the learned background has no gradient, which may be intended."""
    hidden = [name for name in busy().init(0, torch.tensor([0])) if name.startswith("background")]
    with pytest.raises(AssertionError, match=r"background_bias0, .* had no gradient in 4 renders"):
        check_particle(busy(random_background=1.0))
    check_particle(busy(random_background=1.0), without_gradient=hidden)


class Broken:
    """A conforming image; a test spoils one of its methods."""

    is_latent = False
    has_views = False
    deterministic = True

    def init(self, seed: int, ids: Tensor, source: Handed | None = None) -> Parameters:
        if source is not None:
            return source.copied_for(self, ids)
        return {"image": 0.5 + 0.1 * normal(seed, Purpose.INIT, ids, 0, (3, 16, 16))}

    def learning_rates(self, step: int) -> dict[str, float]:
        return {"image": 0.01}

    def render(self, parameters: Parameters, cameras: Cameras, resolution: int, keys: Keys) -> Rendered:
        return PIXELS.render(parameters, cameras, resolution, keys)

    def view(self, parameters: Parameters, cameras: Cameras, resolution: int, background: float) -> Rendered:
        return PIXELS.view(parameters, cameras, resolution, background)

    def field(self, parameters: Parameters) -> Field | None:
        return None

    def cost(self, resolution: int) -> Cost:
        return Cost(trained=3 * 16 * 16, frozen=0, points=1)

    def surface(self, parameters: Parameters, resolution: int, threshold: float) -> None:
        return None


def test_the_particle_that_is_spoiled_below_conforms() -> None:
    check_particle(Broken())


def spoiled_init(change: Callable[[Tensor, int, Tensor], Tensor]) -> type[Broken]:
    class Spoiled(Broken):
        def init(self, seed: int, ids: Tensor, source: Handed | None = None) -> Parameters:
            return {"image": change(super().init(seed, ids, source)["image"], seed, ids)}

    return Spoiled


def spoiled_render(change: Callable[[Rendered, Parameters, Keys], Rendered]) -> type[Broken]:
    class Spoiled(Broken):
        def render(self, parameters: Parameters, cameras: Cameras, resolution: int, keys: Keys) -> Rendered:
            return change(super().render(parameters, cameras, resolution, keys), parameters, keys)

    return Spoiled


def images(change: Callable[[Tensor], Tensor]) -> Callable[[Rendered, Parameters, Keys], Rendered]:
    return lambda rendered, parameters, keys: dataclasses.replace(rendered, images=change(rendered.images))


def own_generator(values: Tensor, seed: int, ids: Tensor) -> Tensor:
    """Adds random numbers from a generator that continues from call to call."""
    return values + torch.rand(values.shape, generator=GENERATOR)


GENERATOR = torch.Generator()


def change_the_parameters(rendered: Rendered, parameters: Parameters, keys: Keys) -> Rendered:
    with torch.no_grad():
        parameters["image"] += 1e-3
    return rendered


def counting(rendered: Rendered, parameters: Parameters, keys: Keys) -> Rendered:
    COUNTER.append(0)
    return dataclasses.replace(rendered, images=rendered.images + 1e-3 * len(COUNTER))


COUNTER: list[int] = []

INITS: list[tuple[str, Callable[[Tensor, int, Tensor], Tensor], str]] = [
    ("double", lambda v, seed, ids: v.double(), "init: image is torch.float64"),
    ("one row", lambda v, seed, ids: v[:1], r"first axis must be that of the 3 particles"),
    ("nan", lambda v, seed, ids: v / 0 * 0, "init: image is not finite"),
    ("not repeated", own_generator, "other values when it is called again"),
    ("no seed", lambda v, seed, ids: 0.5 + normal(0, Purpose.INIT, ids, 0, (3, 16, 16)) / 10, "init ignores its seed"),
    ("all alike", lambda v, seed, ids: v[:1].expand_as(v).clone() * 0 + seed / 20, "start alike"),
    ("by row", lambda v, seed, ids: v + torch.arange(len(ids)).reshape(-1, 1, 1, 1) / 99, "differently when it is"),
    ("neighbours", lambda v, seed, ids: v + v.mean() / 10, "differently when it is made alone"),
    ("nobody", lambda v, seed, ids: v if len(v) else v[:, :1], "init for no ids has other names or shapes"),
    ("bytes", lambda v, seed, ids: v * 255, r"images of fresh particles lie in .* colours must be in \[0, 1\]"),
]  # fmt: skip

RENDERS: list[tuple[str, Callable[[Rendered, Parameters, Keys], Rendered], str]] = [
    ("no view axis", images(lambda v: v[:, 0]), r"images are .*; they must be \[P, V, C, H, W\]"),
    ("grey", images(lambda v: v[:, :, :1]), r"images are \[3, 2, 1, 16, 16\]; they must be \[3, 2, 3, 16, 16\]"),
    ("half", images(lambda v: v.half()), "images is torch.float16"),
    ("nan", images(lambda v: v / 0 * 0), "images is not finite for fresh particles"),
    ("opacity", lambda r, p, k: dataclasses.replace(r, opacity=2 * r.opacity), r"opacity lies in \[2, 2\]"),
    ("opacity shape", lambda r, p, k: dataclasses.replace(r, opacity=r.images), r"opacity is .*; it must be .* 1, 16"),
    ("penalty", lambda r, p, k: dataclasses.replace(r, penalty=r.penalty.sum()), "penalty is .* one number a particle"),
    ("not repeated", counting, "render gives another image when it is called again"),
    ("changes", change_the_parameters, "render changes the parameters"),
    ("neighbours", images(lambda v: v - 0.1 * v.mean().detach()), "images of particle 3 depends on which particles"),
    ("by row", images(lambda v: v + torch.arange(3).reshape(3, 1, 1, 1, 1) / 99), "depends on which particles"),
    ("detached", images(lambda v: v.detach()), "no gradient to any parameter; is the render detached"),
    ("no gradient", images(lambda v: v.detach() + 0 * v), "image had no gradient in 4 renders"),
    ("root", images(lambda v: v + (v - v.detach()).abs().sqrt()), "the gradient of image is not finite"),
    ("leak", images(lambda v: v + (v - v.detach()).mean(0)), "have a gradient to image of other particles"),
    ("nan reaches", images(lambda v: v + 0 * v.detach().mean()), "a NaN in particle 3 reaches images of other"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "complaint"), [case[1:] for case in INITS], ids=[case[0] for case in INITS])
def test_a_wrong_start_is_found(change: Callable[..., Tensor], complaint: str) -> None:
    with pytest.raises(AssertionError, match=f"this particle cannot be trained here: .*{complaint}"):
        check_particle(spoiled_init(change)())


@pytest.mark.parametrize(("change", "complaint"), [case[1:] for case in RENDERS], ids=[case[0] for case in RENDERS])
def test_a_wrong_render_is_found(change: Callable[..., Rendered], complaint: str) -> None:
    with pytest.raises(AssertionError, match=f"this particle cannot be trained here: .*{complaint}"):
        check_particle(spoiled_render(change)())


def test_a_nan_that_reaches_only_the_gradients_of_others_is_found() -> None:
    class Leak(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, images: Tensor) -> Tensor:
            ctx.save_for_backward(images)
            return images.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            (saved,) = ctx.saved_tensors
            return gradient + 0 * saved.mean()

    with pytest.raises(AssertionError, match="a NaN in particle 3 reaches the gradient of image of other"):
        check_particle(spoiled_render(images(Leak.apply))())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rates", "complaint"),
    [
        ({}, "there is nothing to optimise"),
        ({"image": 0.1, "grid": 0.1}, "has one for grid, which init does not make"),
        ({"image": float("nan")}, "image is not a finite number"),
        ({"image": -0.1}, "image is not a finite number of at least 0"),
    ],
)
def test_wrong_learning_rates_are_found(rates: dict[str, float], complaint: str) -> None:
    class Spoiled(Broken):
        def learning_rates(self, step: int) -> dict[str, float]:
            return rates

    with pytest.raises(AssertionError, match=complaint):
        check_particle(Spoiled())


class TwoParts(Broken):
    """An image that is brightened by a second parameter, which is frozen."""

    def init(self, seed: int, ids: Tensor, source: Handed | None = None) -> Parameters:
        if source is not None:
            return source.copied_for(self, ids)
        return super().init(seed, ids) | {"shade": torch.full((len(ids), 1), 0.1)}

    def render(self, parameters: Parameters, cameras: Cameras, resolution: int, keys: Keys) -> Rendered:
        drawn = super().render(parameters, cameras, resolution, keys)
        return dataclasses.replace(drawn, images=drawn.images + parameters["shade"][:, :, None, None, None])

    def cost(self, resolution: int) -> Cost:
        return Cost(trained=3 * 16 * 16, frozen=1, points=1)


def test_learning_rates_that_name_other_parameters_later_are_found() -> None:
    class Spoiled(TwoParts):
        def learning_rates(self, step: int) -> dict[str, float]:
            return {"image": 0.1} if step else {"image": 0.1, "shade": 0.1}

    with pytest.raises(AssertionError, match="names other parameters than at round 0"):
        check_particle(Spoiled(), frozen={"shade"})


def test_a_parameter_without_a_learning_rate_must_be_meant_to_be_frozen() -> None:
    check_particle(TwoParts(), frozen={"shade"})
    with pytest.raises(AssertionError, match="has none for shade; name in frozen"):
        check_particle(TwoParts())
    with pytest.raises(AssertionError, match="image has a learning rate, but is named in frozen"):
        check_particle(TwoParts(), frozen={"shade", "image"})


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        (Cost(trained=769, frozen=1, points=1), "769 trained numbers a particle; init makes 768"),
        (Cost(trained=768, frozen=0, points=1), "0 frozen numbers a particle; init makes 1"),
        (Cost(trained=768, frozen=1, points=0), "evaluated at 0 points"),
    ],
)
def test_a_cost_that_is_not_what_init_makes_is_found(found: Cost, complaint: str) -> None:
    class Spoiled(TwoParts):
        def cost(self, resolution: int) -> Cost:
            return found

    with pytest.raises(AssertionError, match=complaint):
        check_particle(Spoiled(), frozen={"shade"})


def test_images_that_do_not_fit_what_is_said_of_views_are_found() -> None:
    class Images(Broken):
        has_views = True

    class Flat(NerfParticle):
        has_views = False

    with pytest.raises(AssertionError, match="has_views is True, but every camera sees the same"):
        check_particle(Images())
    field = busy()
    flat = Flat(config=field.config, learning_rate=field.learning_rate, network_learning_rate=field.learning_rate)
    with pytest.raises(AssertionError, match="has_views is False, but images depend on the camera"):
        check_particle(flat)


def handed() -> Handed:
    return Handed(TwoParts(), TwoParts().init(1, torch.tensor([3, 0, 11])))


def test_parameters_that_are_handed_over_to_the_same_kind_conform() -> None:
    check_particle(TwoParts(), source=handed(), frozen={"shade"})


def ignored(source: Handed, fresh: Parameters) -> Parameters:
    return fresh


def shared(source: Handed, fresh: Parameters) -> Parameters:
    return dict(source.parameters)


def changed(source: Handed, fresh: Parameters) -> Parameters:
    source.parameters["shade"] += 1
    return {"image": source.parameters["image"].clone(), "shade": fresh["shade"]}


def of_the_first(source: Handed, fresh: Parameters) -> Parameters:
    return fresh | {"image": fresh["image"] + source.parameters["image"][:1]}


@pytest.mark.parametrize(
    ("take", "complaint"),
    [
        (ignored, "init ignores its source"),
        (shared, "image, shade shares memory with the source"),
        (changed, "init changes the parameters that are handed over"),
        (of_the_first, "starts differently when it is made alone"),
    ],
)
def test_a_wrong_hand_over_is_found(take: Callable[[Handed, Parameters], Parameters], complaint: str) -> None:
    class Spoiled(TwoParts):
        def init(self, seed: int, ids: Tensor, source: Handed | None = None) -> Parameters:
            fresh = super().init(seed, ids)
            if source is None:
                return fresh
            if "shade" not in source.parameters:
                source.refuse(self, "it has no shade")
            return take(source, fresh)

    with pytest.raises(AssertionError, match=complaint):
        check_particle(Spoiled(), source=handed(), frozen={"shade"})


def test_a_source_that_is_silently_ignored_is_found() -> None:
    class Spoiled(Broken):
        def init(self, seed: int, ids: Tensor, source: Handed | None = None) -> Parameters:
            return super().init(seed, ids)

    with pytest.raises(AssertionError, match="accepts a source of a kind that it cannot know; raise ConfigError"):
        check_particle(Spoiled())


FIELDS: list[tuple[str, Callable[[Tensor, Parameters], Tensor], str]] = [
    ("colour too", lambda d, p: d[..., None].expand(-1, -1, 3), r"field gives torch.float32 \[3, 33, 3\]"),
    ("double", lambda d, p: d.double(), r"field gives torch.float64"),
    ("negative", lambda d, p: d - 1, "not a density of at least 0"),
    ("not repeated", lambda d, p: d + torch.rand(d.shape, generator=GENERATOR), "when it is called again"),
    ("neighbours", lambda d, p: d + d.mean(), "field of particle 3 depends on which particles"),
    ("nan reaches", lambda d, p: d + 0 * p["image"].mean(), "a NaN in particle 3 reaches the field"),
]


@pytest.mark.parametrize(("change", "complaint"), [case[1:] for case in FIELDS], ids=[case[0] for case in FIELDS])
def test_a_wrong_field_is_found(change: Callable[[Tensor, Parameters], Tensor], complaint: str) -> None:
    class Spoiled(Broken):
        def field(self, parameters: Parameters) -> Field:
            own = parameters["image"].mean((1, 2, 3))[:, None].abs()
            return lambda points: change(own * points.norm(dim=-1), parameters)

    with pytest.raises(AssertionError, match=complaint):
        check_particle(Spoiled())


def test_a_view_that_is_random_is_found() -> None:
    class Spoiled(Broken):
        def view(self, parameters: Parameters, cameras: Cameras, resolution: int, background: float) -> Rendered:
            drawn = super().view(parameters, cameras, resolution, background)
            return dataclasses.replace(drawn, images=drawn.images + 0.1 * torch.rand(1, generator=GENERATOR))

    with pytest.raises(AssertionError, match=r"view gives another image .* view must draw nothing random at all"):
        check_particle(Spoiled())


def test_a_draw_from_the_global_random_state_is_found_even_where_it_does_not_show() -> None:
    def draws(rendered: Rendered, parameters: Parameters, keys: Keys) -> Rendered:
        torch.rand(1)
        return rendered

    with pytest.raises(AssertionError, match="torch's global random state was used"):
        check_particle(spoiled_render(draws)())


def test_no_parameters_at_all_are_found_and_so_is_a_single_particle() -> None:
    class Spoiled(Broken):
        def init(self, seed: int, ids: Tensor, source: Handed | None = None) -> Parameters:
            return {}

    with pytest.raises(AssertionError, match="there is nothing to optimise"):
        check_particle(Spoiled())
    with pytest.raises(AssertionError, match="at least two different"):
        check_particle(Broken(), ids=[4])


def test_latents_need_no_range_and_rounding_is_allowed_where_a_device_adds_in_any_order() -> None:
    class Latents(Broken):
        is_latent = True
        deterministic = False

        def init(self, seed: int, ids: Tensor, source: Handed | None = None) -> Parameters:
            return {"image": 30 * super().init(seed, ids, source)["image"]}

        def render(self, parameters: Parameters, cameras: Cameras, resolution: int, keys: Keys) -> Rendered:
            drawn = super().render(parameters, cameras, resolution, keys)
            return dataclasses.replace(drawn, images=drawn.images + 1e-6 * torch.rand(1, generator=GENERATOR))

    check_particle(Latents())
