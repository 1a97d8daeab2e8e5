from __future__ import annotations

import pytest
import torch

from distvsd.errors import PriorError
from distvsd.networks.base import Condition
from distvsd.prior.prompts import VIEWS, PromptTable, view_index, view_indices, view_suffix


class Encoder:
    """Embeds text number i as the constant i, and records the texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: object) -> Condition:
        self.texts = list(texts)  # type: ignore[call-overload]
        numbers = torch.arange(len(self.texts), dtype=torch.float32)
        return Condition(numbers[:, None, None].expand(-1, 3, 2).contiguous(), pooled=numbers[:, None])

    def read(self, condition: Condition) -> list[str]:
        assert condition.pooled is not None and torch.equal(condition.text[:, 0, 0], condition.pooled[:, 0])
        return [self.texts[int(row[0, 0])] for row in condition.text]


def table(prompts: list[str], view_dependent: bool = True, negative: str = "") -> tuple[PromptTable, Encoder]:
    encoder = Encoder()
    return PromptTable(prompts, negative, view_dependent, encoder), encoder


@pytest.mark.parametrize(
    ("elevation", "azimuth", "view"),
    [
        (0, 0, "front view"),
        (0, 22, "front view"),
        (0, -22, "front view"),
        (0, 23, "three-quarter view"),
        (0, -67, "three-quarter view"),
        (0, 68, "side view"),
        (0, -112, "side view"),
        (0, 113, "three-quarter back view"),
        (0, 157, "three-quarter back view"),
        (0, 158, "back view"),
        (0, -180, "back view"),
        (0, 360, "front view"),
        (14, 0, "front view"),
        (16, 0, "front view from above"),
        (16, -90, "side view from above"),
        (44, 540, "back view from above"),
        (46, 0, "overhead view"),
    ],
)
def test_the_words_for_a_camera_follow_its_azimuth_and_from_above_its_elevation(
    elevation: float, azimuth: float, view: str
) -> None:
    assert view_suffix(elevation, azimuth) == view
    assert VIEWS[view_index(elevation, azimuth)] == view


def test_many_cameras_at_once_get_the_view_that_each_gets_alone() -> None:
    pairs = [(elevation, azimuth) for elevation in (-30, 0, 14, 16, 44, 46, 80) for azimuth in range(-539, 540, 7)]
    elevation, azimuth = torch.tensor(pairs, dtype=torch.float32).deg2rad().unbind(dim=1)
    indices = view_indices(elevation, azimuth)
    assert indices.dtype == torch.int64
    assert indices.tolist() == [view_index(*pair) for pair in pairs]


def test_each_particle_reads_its_own_prompt_with_and_without_its_view() -> None:
    texts, encoder = table(["a cat", "a dog"])
    ids, views = torch.tensor([1, 0, 1]), torch.tensor([0, 4, 10])
    assert encoder.read(texts.bare(ids)) == ["a dog", "a cat", "a dog"]
    assert encoder.read(texts.viewed(ids, views)) == ["a dog, front view", "a cat, back view", "a dog, overhead view"]


def test_without_view_dependence_the_view_changes_nothing_and_no_suffixed_text_is_encoded() -> None:
    texts, encoder = table(["a cat"], view_dependent=False)
    assert encoder.read(texts.viewed(torch.tensor([0, 0]), torch.tensor([1, 10]))) == ["a cat", "a cat"]
    assert encoder.texts == ["a cat", ""]


def test_particles_that_share_a_prompt_share_its_encoding() -> None:
    _, encoder = table(["a cat"] * 500 + ["a dog"])
    assert len(encoder.texts) == 2 * 12 + 1
    assert len(set(encoder.texts)) == len(encoder.texts)


def test_the_empty_prompt_is_legal_and_has_no_views() -> None:
    texts, encoder = table([""])
    assert encoder.texts == [""]
    assert encoder.read(texts.viewed(torch.tensor([0]), torch.tensor([2]))) == [""]


def test_the_negative_prompt_comes_as_often_as_asked() -> None:
    texts, encoder = table(["a cat"], negative="blurry")
    assert encoder.read(texts.negative(3)) == ["blurry"] * 3


def test_prompts_are_found_again_by_their_words_and_unknown_ones_are_refused() -> None:
    texts, _ = table(["a cat", "a dog"])
    assert texts.ids_of(["a dog", "a cat", "a dog"]) == [1, 0, 1]
    with pytest.raises(PriorError, match="'a bird' was not given"):
        texts.ids_of(["a cat", "a bird"])


def test_a_table_without_prompts_is_refused() -> None:
    with pytest.raises(PriorError, match="no prompts"):
        table([])
