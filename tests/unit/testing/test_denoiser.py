"""`check_denoiser` accepts every network that can be loaded, and names the rule that a broken one violates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distvsd.networks.base import Adaptable, Condition
from distvsd.networks.unet import UNet
from distvsd.prior import Pipeline
from distvsd.testing import as_flow, check_denoiser
from distvsd.testing.denoiser import check_process
from distvsd.vsd.process import Diffusion, Flow


@pytest.fixture
def tiny(shared_prior: Callable[..., Pipeline]) -> Callable[..., tuple[UNet, Condition]]:
    def make(layout: str = "sd15", prediction: str | None = None, views: int = 1) -> tuple[UNet, Condition]:
        prior = shared_prior(layout, prediction)
        ids = torch.tensor([0, 1]).repeat_interleave(views)
        return prior.denoiser, prior.condition(ids, views_per_particle=views)  # type: ignore[return-value]

    return make


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("layout", ["sd15", "sd21", "shapes"])
def test_unets_of_every_layout_and_prediction_pass(tiny: Any, layout: str, prediction: str) -> None:
    check_denoiser(*tiny(layout, prediction))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_flow_model_made_of_a_unet_passes(tiny: Any, prediction: str) -> None:
    denoiser, condition = tiny("sd15", prediction, views=2)
    check_denoiser(as_flow(denoiser), condition)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_passes_with_and_without_a_shift(shift: float) -> None:
    check_process(Flow(shift))


@dataclass(frozen=True)
class Broken:
    """A UNet with one thing wrong."""

    inner: UNet
    wrong: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def on(self, module: nn.Module) -> Adaptable:
        return self.inner if self.wrong == "on" else Broken(self.inner.on(module), self.wrong)  # type: ignore[return-value]

    def add_camera(self, module: nn.Module, embedding: nn.Module | None) -> nn.Module | None:
        return None if self.wrong == "camera" else self.inner.add_camera(module, embedding)

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        match self.wrong:
            case "text":
                condition = replace(condition, text=torch.zeros_like(condition.text))
            case "time":
                t = torch.zeros_like(t)
            case "in place":
                noisy.mul_(0.5)
            case "camera":
                condition = replace(condition, cameras=None)
        output = self.inner.predict(noisy, t, condition)
        match self.wrong:
            case "shape":
                return output[:, :1]
            case "dtype":
                return output.double()
            case "infinite":
                return output / 0
            case "rows":
                return output - output.mean()
        return output


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ("shape", "must give"),
        ("dtype", "float32"),
        ("infinite", "not finite"),
        ("in place", "in place"),
        ("rows", "other particles"),
        ("text", "texts"),
        ("time", "time"),
        ("camera", "camera"),
    ],
)
def test_what_is_wrong_is_named(tiny: Any, wrong: str, word: str) -> None:
    denoiser, condition = tiny()
    with pytest.raises(AssertionError, match=word):
        check_denoiser(Broken(denoiser, wrong), condition)  # type: ignore[arg-type]


def test_a_module_that_wants_gradients_is_refused(tiny: Any) -> None:
    import copy

    denoiser, condition = tiny()
    with pytest.raises(AssertionError, match="wants a gradient"):
        check_denoiser(replace(denoiser, module=copy.deepcopy(denoiser.module).requires_grad_()), condition)


def test_too_few_particles_are_refused(tiny: Any) -> None:
    denoiser, condition = tiny()
    with pytest.raises(AssertionError, match="at least two particles"):
        check_denoiser(denoiser, condition[:1])


@pytest.mark.parametrize(
    ("method", "replacement", "word"),
    [
        ("times", lambda self, u, low, high: torch.zeros_like(u, dtype=torch.int64), "does not grow"),
        ("times", lambda self, u, low, high: (u * 99).long(), "leave the range"),
        ("weight", lambda self, t: torch.ones_like(t, dtype=torch.float32), "sigma"),
        ("to_eps", lambda self, output, noisy, t: output + 1, "not the noise"),
        ("to_x0", lambda self, output, noisy, t: output + 1, "not the clean"),
    ],
)
def test_a_process_that_contradicts_itself_is_named(method: str, replacement: Any, word: str) -> None:
    broken = type("Broken", (Diffusion,), {method: replacement})
    with pytest.raises(AssertionError, match=word):
        check_process(broken(torch.linspace(0.99, 0.01, 100), "epsilon"))
