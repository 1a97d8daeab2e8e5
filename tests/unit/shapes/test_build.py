"""`distvsd prior build` without its classifier, at a size that takes seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distvsd.errors import PriorError, UsageError
from distvsd.prior import load_prior
from distvsd.shapes import world
from distvsd.shapes.build import BuildConfig, build_pipeline, draw_images
from distvsd.shapes.captions import LEVELS
from distvsd.shapes.trainer import PriorTrainer

TINY = BuildConfig(num_images=12, steps=5, batch_size=4, channels=(16, 32), text_width=16, text_layers=1)


def built(folder: Path, config: BuildConfig = TINY, save_every: int = 2) -> Path:
    build_pipeline(folder, config, "cpu", lambda line: None, save_every)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}/{name}": value
        for part in ("unet", "text_encoder")
        for file in (folder / part).glob("*.safetensors")
        for name, value in load_file(file).items()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("whole"))


def test_a_build_writes_an_ordinary_pipeline_that_draws_images(whole: Path) -> None:
    prior = load_prior(str(whole), ["a red cube"])
    images = prior.sample(["a red cube"], 2, guidance_scale=2.0, steps=2, seed=0)
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all()


def test_a_build_that_is_stopped_and_called_again_ends_with_the_bits_of_one_that_was_not(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = PriorTrainer.update

    def stopped(trainer: PriorTrainer, *arguments: torch.Tensor) -> float:
        if trainer.step == 3:  # one step after the last save
            raise KeyboardInterrupt
        return update(trainer, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PriorTrainer, "update", stopped)
        built(tmp_path)
    expected, found = weights(whole), weights(built(tmp_path))
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_build_of_another_configuration_is_not_continued(whole: Path) -> None:
    with pytest.raises(UsageError, match="another configuration"):
        built(whole, replace(TINY, seed=1))


def test_a_build_begins_with_another_pipelines_weights_word_by_word(whole: Path, tmp_path: Path) -> None:
    # The same pipeline with other token numbers: "red" and "torus" exchanged in its tokenizer and in its embedding.
    start = built(tmp_path / "start")
    file = start / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    numbers = tokenizer["model"]["vocab"]
    numbers["red"], numbers["torus"] = numbers["torus"], numbers["red"]
    del numbers["~"]  # and one token is missing
    file.write_text(json.dumps(tokenizer))
    (found,) = (start / "text_encoder").glob("*.safetensors")
    tensors = load_file(found)
    (name,) = [name for name in tensors if name.endswith("token_embedding.weight")]
    swapped = tensors[name].clone()
    swapped[[numbers["red"], numbers["torus"]]] = tensors[name][[numbers["torus"], numbers["red"]]]
    save_file(tensors | {name: swapped}, found, {"format": "pt"})
    again = built(tmp_path / "again", replace(TINY, steps=0, start=str(start)))
    prompts = ["a red torus", "a blue cube"]
    texts = [load_prior(str(folder), prompts).texts.bare(torch.tensor([0, 1])).text for folder in (start, again, whole)]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_a_start_of_another_architecture_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="another architecture"):
        built(tmp_path, replace(TINY, channels=(16, 48), start=str(whole)))


def test_a_start_that_is_no_pipeline_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(PriorError, match="nowhere"):
        built(tmp_path / "new", replace(TINY, start=str(tmp_path / "nowhere")))
    assert not (tmp_path / "new").exists()


def test_cubes_are_drawn_four_times_as_often_as_another_shape_only_where_the_caption_names_the_shape() -> None:
    drawn, none = torch.arange(len(world.SHAPES)), torch.full((len(world.SHAPES),), -1)
    one_of_each = world.Labels(drawn, drawn, drawn, none, none)
    for level, share in (("full", 4 / 8), ("shape", 4 / 8), ("color", 1 / 5), ("object", 1 / 5), ("empty", 1 / 5)):
        levels = torch.full((4000,), LEVELS.index(level))
        pick = draw_images(one_of_each, levels, torch.Generator().manual_seed(0))
        counts = pick.bincount(minlength=len(world.SHAPES)) / len(pick)
        expected = torch.full((len(world.SHAPES),), (1 - share) / 4)
        expected[world.SHAPES.index("cube")] = share
        assert (counts - expected).abs().max() < 0.03, level  # four standard deviations of a share of one half
