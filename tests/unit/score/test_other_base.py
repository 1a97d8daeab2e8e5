"""The score network may adapt another model than the prior, if latents, texts and schedule agree."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distvsd.cli import main
from distvsd.config import load_config
from distvsd.errors import DistvsdError, PriorError
from distvsd.parallel.world import World
from distvsd.run.build import Run, build_run
from distvsd.run.train import train
from distvsd.testing.pipelines import tiny_pipeline

SMOKE = Path(__file__).parents[3] / "configs" / "smoke.yaml"
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    def make(base: Path) -> Run:
        teacher = tiny_pipeline(tmp_path / "teacher", "sd21", "epsilon", seed=0)
        changes = [f"prior.path={teacher}", f"score.base={base}", "render.resolution=16", "particles.count=2"]
        return build_run(load_config(SMOKE, [*changes, f"run.dir={tmp_path / 'run'}"]), ALONE, lambda done: False)

    return make


def learner(folder: Path) -> Path:
    return tiny_pipeline(folder / "learner", "sd21", "v_prediction", seed=1)


def test_a_learner_that_predicts_velocity_learns_under_a_teacher_that_predicts_noise(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    parts = run(learner(tmp_path))
    assert parts.training is not None
    teacher, score = parts.prior.denoiser, parts.training.score
    assert [each.process.prediction for each in (teacher, score)] == ["epsilon", "v_prediction"]  # type: ignore[union-attr]
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, ids = torch.tensor([300, 800]), torch.tensor([0, 1])
    text, nowhere = parts.prior.texts.bare(ids).text, torch.zeros(2, 16)
    with torch.no_grad():
        output = score.network(noisy, t, encoder_hidden_states=text, class_labels=nowhere).sample
    # The learner's own output is a velocity: eps = alpha v + sigma x.
    abar = teacher.process.alphas_cumprod[t].reshape(-1, 1, 1, 1)  # type: ignore[union-attr]
    eps = score.eps(noisy, t, ids, None)
    torch.testing.assert_close(eps, abar.sqrt() * output + (1 - abar).sqrt() * noisy, rtol=1e-5, atol=1e-6)
    for step in (0, 1):
        parts.loop.round(step)
    assert score.local.num_steps == 2


def test_a_run_whose_score_has_another_base_is_verified_and_resumed_with_that_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tiny_pipeline(tmp_path / "teacher", "sd21", "epsilon", seed=0)
    base, folder = learner(tmp_path), tmp_path / "run"
    changes = [f"prior.path={teacher}", "render.resolution=16", "particles.count=2", f"run.dir={folder}"]
    changes += ["schedule.rounds=2", "checkpoint.every=1"]
    train(load_config(SMOKE, [*changes, f"score.base={base}"]))
    capsys.readouterr()
    assert main(["verify", str(folder), "--digest"]) == 0
    assert "score/adapter" in capsys.readouterr().out
    with pytest.raises(DistvsdError, match=re.escape(str(base))):
        train(load_config(SMOKE, [*changes, "schedule.rounds=3"]))


def changed(folder: Path, file: str, **values: object) -> Path:
    path = learner(folder) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return path.parents[1]


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda folder: tiny_pipeline(folder / "learner", "shapes", seed=1), "latents"),
        (lambda folder: tiny_pipeline(folder / "learner", "sd15", seed=1), "text encoder"),
        (lambda folder: changed(folder, "scheduler/scheduler_config.json", beta_end=0.02), "noise schedule"),
    ],
)
def test_a_base_with_other_latents_texts_or_noise_is_refused(
    run: Callable[..., Run], tmp_path: Path, make: Callable[[Path], Path], word: str
) -> None:
    with pytest.raises(PriorError, match=word):
        run(make(tmp_path))
