"""Contact sheets (PNG) and turntables (MP4) from images; Pillow and imageio's ffmpeg are imported when used."""

from __future__ import annotations

import math
import subprocess
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distvsd.errors import BackendError, RunError
from distvsd.runtime import inside

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

GAP = 2  # pixels between cells
PAPER = (24, 24, 24)
TEXT = (225, 225, 225)
FONT_SIZE = 13
LINE_CHARACTERS, MAX_LINES = 22, 5  # of a label
SMALL_CELL, LARGE_CELL = 128, 256  # few cells are enlarged to about the first; no cell is larger than the second
FEW_CELLS = 256
VIDEO_EDGE = 384
FRAMES_PER_SECOND = 18


def contact_sheet(images: Tensor, labels: Sequence[str] | None = None) -> Image:
    """A picture of images `[P, V, 3, H, W]` in [0, 1]: a row a particle, a column a view, the labels on the left.

    Where there is one view only, the particles fill a square grid in reading order and labels stand below each.
    Small images are enlarged. Values that are not finite are shown in magenta.
    """
    from PIL import Image, ImageDraw

    count, num_views = images.shape[:2]
    if labels is not None and len(labels) != count:
        raise ValueError(f"contact_sheet got {len(labels)} labels for {count} particles; give one each or none")
    columns = num_views if num_views > 1 else math.ceil(math.sqrt(count))
    rows = math.ceil(count * num_views / columns)
    scale = cell_scale(images.shape[-2], images.shape[-1], rows * columns)
    height, width = (max(1, round(edge * scale)) for edge in images.shape[-2:])
    texts = [_wrapped(label, width if num_views == 1 else None) for label in labels or []]
    left, below = _label_room(texts, beside=num_views > 1)
    step_x, step_y = width + GAP, height + GAP + below
    sheet = Image.new("RGB", (left + columns * step_x + GAP, rows * step_y + GAP), PAPER)
    for index, cell in enumerate(images.flatten(0, 1)):
        row, column = divmod(index, columns)
        sheet.paste(
            to_image(cell).resize((width, height), _filter(scale)), cell_corner(row, column, left, step_x, step_y)
        )
    pen = ImageDraw.Draw(sheet)
    for index, text in enumerate(texts):
        row, column = divmod(index, columns) if num_views == 1 else (index, 0)
        x, y = cell_corner(row, column, left, step_x, step_y)
        where = (x, y + height + 1) if num_views == 1 else (GAP + 3, y + 3)
        pen.multiline_text(where, text, fill=TEXT, font=_font(), spacing=2)
    return sheet


def cell_corner(row: int, column: int, left: int, step_x: int, step_y: int) -> tuple[int, int]:
    """Pixel of the upper left corner of a cell of a sheet."""
    return left + GAP + column * step_x, GAP + row * step_y


def cell_scale(height: int, width: int, num_cells: int) -> float:
    """How much the cells of a sheet are enlarged: a whole factor for small images, a fraction for large ones."""
    edge = max(height, width)
    if edge > LARGE_CELL:
        return LARGE_CELL / edge
    return float(max(1, SMALL_CELL // edge)) if num_cells <= FEW_CELLS else 1.0


def to_image(image: Tensor) -> Image:
    """An 8-bit picture of one image `[3, H, W]` in [0, 1]; pixels that are not finite become magenta."""
    from PIL import Image

    broken = ~image.isfinite().all(0)
    shown = torch.where(broken, torch.tensor([1.0, 0.0, 1.0])[:, None, None], image.detach().float().cpu().nan_to_num())
    return Image.fromarray((shown.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def save_png(image: Image, root: Path, name: str) -> Path:
    """Writes a PNG, making the folders of its name below `root`; returns the path. Raises RunError, see
    `runtime.inside`."""
    with inside.replacing(root, name) as stream:
        image.save(stream, format="PNG")
    return root / name


def mosaic(images: Tensor, edge: int = 2 * VIDEO_EDGE) -> Tensor:
    """Images `[P, F, 3, H, W]` side by side as frames `[F, 3, h, w]`, a square grid about `edge` pixels wide or
    less."""
    count, frames, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    filler = images.new_zeros(rows * columns - count, frames, channels, height, width)
    tiles = torch.cat((images, filler)).reshape(rows, columns, frames, channels, height, width)
    grid = tiles.permute(2, 3, 0, 4, 1, 5).reshape(frames, channels, rows * height, columns * width)
    shrink = edge / grid.shape[-1]
    if shrink >= 1:
        return grid
    size = (round(rows * height * shrink), edge)
    return torch.nn.functional.interpolate(grid, size, mode="bilinear", antialias=True, align_corners=False)


def turntable(frames: Tensor, root: Path, name: str) -> Path:
    """Writes frames `[F, 3, H, W]` in [0, 1] as an H.264 MP4 of even size, small frames enlarged, making the folders of
    its name below `root`; returns the path.

    Raises BackendError where imageio's ffmpeg is not installed, and RunError where the file cannot be written.
    """
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        program = get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise BackendError(f"turntables need ffmpeg ({error}); pip install 'imageio[ffmpeg]'") from error
    scale = max(1, VIDEO_EDGE // max(frames.shape[-2:]))
    width, height = (edge * scale // 2 * 2 for edge in (frames.shape[-1], frames.shape[-2]))
    pixels = b"".join(to_image(frame).resize((width, height), _filter(scale)).tobytes() for frame in frames)
    given = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {FRAMES_PER_SECOND} -i -"
    with inside.replacing(root, name) as stream:
        # imageio's own calls of ffmpeg would open a path, and hide whether ffmpeg could write all of the file.
        wanted = f"-an -c:v libx264 -crf 10 -pix_fmt yuv420p -f mp4 /dev/fd/{stream.fileno()}"
        done = subprocess.run(
            [program, "-y", "-v", "error", *given.split(), *wanted.split()],
            input=pixels,
            capture_output=True,
            pass_fds=[stream.fileno()],
        )
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").split("\n")[0] or f"exit code {done.returncode}"
            raise RunError(f"{root / name} cannot be written: ffmpeg failed ({said:.300}); free space, or try again")
    return root / name


def _filter(scale: float) -> int:
    from PIL import Image

    return Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX


def _font() -> ImageFont | FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.load_default(FONT_SIZE)


def _wrapped(label: str, width: int | None) -> str:
    """The label in a few short lines, cut off where it is longer; `width`: pixels it must fit in."""
    characters = LINE_CHARACTERS if width is None else max(4, int(width / (0.56 * FONT_SIZE)))
    lines = [line for part in label.splitlines() for line in textwrap.wrap(part, characters)]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1][: characters - 3] + "..."]
    return "\n".join(lines)


def _label_room(texts: Sequence[str], beside: bool) -> tuple[int, int]:
    """Pixels that the labels take: left of all rows, and below every cell."""
    from PIL import Image, ImageDraw

    if not texts:
        return 0, 0
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [pen.multiline_textbbox((0, 0), text, font=_font(), spacing=2) for text in texts]
    if beside:
        return math.ceil(max(box[2] for box in boxes)) + 10, 0
    return 0, math.ceil(max(box[3] for box in boxes)) + 4
