"""Renders are resized to the size that the UNet was trained at."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from distvsd.vsd.resize import resized


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("edge", [8, 24, 40, 64, 512])
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 24, 40)])
def test_values_and_gradients_are_those_of_torchs_antialiased_bilinear_resize(
    edge: int, shape: tuple[int, ...]
) -> None:
    images = pictures(*shape).requires_grad_()
    expected = interpolate(images, (edge, edge), mode="bilinear", align_corners=False, antialias=True)
    found = resized(images, edge)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    upstream = pictures(*expected.shape)
    (of_found,) = torch.autograd.grad((found * upstream).sum(), images, retain_graph=True)
    (of_expected,) = torch.autograd.grad((expected * upstream).sum(), images)
    torch.testing.assert_close(of_found, of_expected, rtol=1e-4, atol=1e-4)


def test_where_it_enlarges_it_is_the_plain_bilinear_resize_of_the_papers_code() -> None:
    images = pictures(2, 3, 64, 64)
    plain = interpolate(images, (512, 512), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resized(images, 512), plain, rtol=0, atol=1e-5)


def test_a_plain_picture_stays_plain_and_one_of_the_right_size_is_returned_itself() -> None:
    assert (resized(torch.full((1, 3, 48, 48), 0.3), 64) - 0.3).abs().max() < 1e-6
    assert (resized(torch.full((1, 3, 48, 48), 0.3), 16) - 0.3).abs().max() < 1e-6
    images = pictures(1, 3, 64, 64)
    assert resized(images, 64) is images


def test_a_checkerboard_that_shrinks_becomes_grey_and_not_one_of_its_colours() -> None:
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    shrunk = resized(board.float().expand(1, 3, 64, 64), 16)
    assert (shrunk - 0.5).abs().max() < 0.01
