"""Contact sheets have the right geometry and pixels, and turntables can be read back."""

import math
import resource

import numpy
import pytest
import torch
from PIL import Image

from distvsd.errors import RunError
from distvsd.looking.images import GAP, PAPER, cell_scale, contact_sheet, mosaic, save_png, to_image, turntable


def numbered(count, views, edge):
    """Image k, in reading order, is the plain grey 20 + 13 k of 255."""
    levels = (20 + 13 * torch.arange(count * views)).reshape(count, views, 1, 1, 1) / 255
    return levels.expand(count, views, 3, edge, edge).contiguous()


def test_a_row_is_a_particle_and_a_column_a_view():
    images = numbered(3, 4, 64)
    sheet = contact_sheet(images)
    # 64 pixels are shown as 128, with a gap before each cell and after the last.
    assert sheet.size == (4 * 130 + GAP, 3 * 130 + GAP)
    for particle in range(3):
        for view in range(4):
            pixel = sheet.getpixel((GAP + view * 130 + 64, GAP + particle * 130 + 64))
            assert pixel == (20 + 13 * (4 * particle + view),) * 3
    assert sheet.getpixel((0, 0)) == PAPER and sheet.getpixel((GAP + 128, 64)) == PAPER


def test_labels_take_a_column_on_the_left_and_do_not_cover_pictures():
    images = torch.ones(2, 4, 3, 64, 64)
    plain, named = contact_sheet(images), contact_sheet(images, ["0  a red cube", "1  " + "very long words " * 40])
    left = named.width - plain.width
    assert 60 < left < 260 and named.height == plain.height
    assert named.crop((left, 0, named.width, named.height)).tobytes() == plain.tobytes()
    for row in (0, 1):
        strip = numpy.asarray(named.crop((0, row * 130, left, (row + 1) * 130)))
        assert (strip > 150).any()


def test_single_views_fill_a_square_in_reading_order():
    images = numbered(10, 1, 128)
    sheet = contact_sheet(images)
    assert sheet.size == (4 * 130 + GAP, 3 * 130 + GAP)
    sixth = sheet.getpixel((GAP + 130 + 10, GAP + 130 + 10))
    assert sixth == (20 + 13 * 5,) * 3
    assert contact_sheet(images, ["x"] * 10).height > sheet.height


def test_a_wrong_number_of_labels_is_refused():
    with pytest.raises(ValueError, match="3 labels for 2 particles"):
        contact_sheet(torch.zeros(2, 4, 3, 8, 8), ["a", "b", "c"])


@pytest.mark.parametrize(
    ("edge", "cells", "scale"),
    [(64, 64, 2.0), (48, 64, 2.0), (64, 2000, 1.0), (128, 8, 1.0), (512, 8, 0.5), (8, 1, 16.0)],
)
def test_small_cells_grow_by_whole_factors_and_large_ones_shrink(edge, cells, scale):
    assert cell_scale(edge, edge, cells) == scale


def test_values_are_clamped_rounded_and_broken_ones_are_magenta():
    image = torch.tensor([-1.0, 0.5, 2.0, math.nan]).reshape(1, 1, 4).repeat(3, 1, 1)
    assert [to_image(image).getpixel((column, 0)) for column in range(4)] == [
        (0, 0, 0),
        (128, 128, 128),
        (255, 255, 255),
        (255, 0, 255),
    ]


def test_a_png_comes_back_as_it_was(tmp_path):
    picture = to_image(torch.rand(3, 5, 7, generator=torch.Generator()))
    path = save_png(picture, tmp_path, "new/folder/a.png")
    assert Image.open(path).tobytes() == picture.tobytes()


def test_a_mosaic_is_a_grid_of_the_same_frame():
    images = numbered(5, 2, 4)
    frames = mosaic(images)
    assert frames.shape == (2, 3, 8, 12)
    for frame in range(2):
        assert torch.equal(frames[frame, :, 4:8, 4:8], images[4, frame])
        assert not frames[frame, :, 4:, 8:].any()
    assert mosaic(images, edge=6).shape == (2, 3, 4, 6)


def test_a_turntable_has_its_frames_in_order_and_an_even_size(tmp_path):
    from imageio_ffmpeg import read_frames

    levels = torch.linspace(0.2, 0.8, 6)
    frames = levels.reshape(6, 1, 1, 1).expand(6, 3, 385, 401)
    path = turntable(frames, tmp_path, "videos/turn.mp4")
    reader = read_frames(str(path))
    facts = next(reader)
    assert facts["size"] == (400, 384)
    means = [numpy.frombuffer(frame, numpy.uint8).mean() / 255 for frame in reader]
    assert means == pytest.approx(levels.tolist(), abs=0.02)


def test_small_frames_are_enlarged_to_be_seen(tmp_path):
    from imageio_ffmpeg import read_frames

    path = turntable(torch.rand(2, 3, 64, 64, generator=torch.Generator()), tmp_path, "small.mp4")
    assert next(read_frames(str(path)))["size"] == (384, 384)


def test_a_turntable_that_the_disk_does_not_take_is_an_error_and_leaves_the_old_one(tmp_path):
    frames = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = turntable(frames, tmp_path, "renders/a.mp4").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(RunError, match=r"a\.mp4 cannot be written"):
            turntable(frames, tmp_path, "renders/a.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "renders").iterdir()] == ["a.mp4"]
    assert (tmp_path / "renders/a.mp4").read_bytes() == before
