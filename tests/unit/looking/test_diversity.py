"""Diversity, with cases that can be worked out by hand."""

import math

import pytest
import torch

from distvsd.looking.diversity import MODES, mean_cosine, mode_counts, mode_names, total_variation, vendi_score


def test_there_are_thirty_modes_and_they_are_counted_by_colour_and_shape():
    counts = mode_counts([{"color": 0, "shape": 1}, {"color": 0, "shape": 1}, {"color": 5, "shape": 4}, {"scene": 2}])
    assert len(MODES) == len(counts) == 30
    assert mode_names(counts) == {"red cube": 2, "orange torus": 1}
    assert MODES[int(counts.argmax())] == (0, 1)


@pytest.mark.parametrize(
    ("counts", "target", "distance"),
    [
        ([1, 1, 1, 1], None, 0.0),
        ([4, 0, 0, 0], None, 0.75),  # (0.75 + 3 x 0.25) / 2
        ([1, 1, 0, 0], None, 0.5),
        ([3, 1], [1, 3], 0.5),  # (|.75 - .25| + |.25 - .75|) / 2
        ([2, 0], [0, 7], 1.0),
        ([0, 0], None, 1.0),
    ],
)
def test_total_variation(counts, target, distance):
    goal = None if target is None else torch.tensor(target)
    assert total_variation(torch.tensor(counts), goal) == pytest.approx(distance)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_identical_particles_are_one_and_orthogonal_ones_all_count(count):
    assert vendi_score(torch.ones(count, 9)) == pytest.approx(1)
    assert vendi_score(3 * torch.eye(9)[:count]) == pytest.approx(count)


def test_two_equal_pairs_are_two_and_more_particles_than_features_are_no_matter():
    pairs = torch.eye(2).repeat(5, 1)
    assert vendi_score(pairs) == pytest.approx(2)


def test_vendi_of_two_particles_at_sixty_degrees():
    # The cosine matrix over 2 has the eigenvalues (1 +- 1/2) / 2, that is 3/4 and 1/4.
    features = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(3) / 2]])
    assert vendi_score(features) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_mean_cosine_compares_particles_at_the_same_view_only():
    # View 0: equal directions (cosine 1); view 1: opposite (-1); view 2: orthogonal (0).
    one = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    two = torch.tensor([[5.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    assert mean_cosine(torch.stack((one, two))) == pytest.approx(0)
    assert mean_cosine(torch.stack((one, one, one))) == pytest.approx(1)
    assert mean_cosine(one[None]) == 1.0
