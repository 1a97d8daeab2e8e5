"""Ellipses with a Gaussian fall-off, blended from front to back in plain torch: sparse, exact, and without tiles.

Only the (ellipse, pixel) pairs exist whose alpha is at least `CUT`. They are sorted by pixel and depth, and the
transmittance is a running product inside each pixel. The product is taken in steps of doubled length that never leave
a pixel, so that no number of one image reaches another image.

Shape legend: I images of H x W pixels, N ellipses an image, S spans (the pixels of one ellipse in one row of pixels),
M pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CUT = 1 / 255  # the least alpha that is drawn, as in 3-D Gaussian splatting
MOST_ALPHA = 0.999  # of one ellipse in one pixel, as gsplat has it; keeps 1 - alpha away from 0
MOST_PAIRS = 1 << 21  # that exist at once; each takes some hundred bytes
_SLACK = 1e-3  # by which the enumerated ellipse is larger, so that rounding loses no pixel whose alpha is CUT


@dataclass(frozen=True)
class Ellipses:
    """N ellipses of each of I images; every field is `[I, N]`, in pixels. (0, 0) is the upper left corner of the
    image, so that the centre of its first pixel is at (0.5, 0.5).

    alpha at distance (dx, dy) from the centre (x, y) is opacity exp(-(xx dx^2 + yy dy^2) / 2 - xy dx dy), at most
    MOST_ALPHA. depth orders the ellipses. visible: the others are not drawn.
    """

    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor
    opacity: Tensor
    red: Tensor
    green: Tensor
    blue: Tensor
    depth: Tensor
    visible: Tensor


def blend(ellipses: Ellipses, height: int, width: int, most_pairs: int = MOST_PAIRS) -> Tensor:
    """Colour times opacity, and opacity, `[I, 4, height, width]`; differentiable in all fields but depth and visible.

    The memory is that of `most_pairs` pairs: a batch with more of them is drawn in bands of rows, whose pairs are made
    again in the backward pass. In exact arithmetic the result does not depend on it.
    """
    images = ellipses.x.shape[0]
    values = torch.stack([getattr(ellipses, name) for name in _VALUES]).flatten(1)  # [9, I N]
    with torch.no_grad():
        spans = _spans(ellipses, height, width)
        per_line = torch.zeros(images * height, dtype=torch.int64, device=values.device)
        per_line.index_add_(0, spans.line, spans.count)
        total = int(per_line.sum())
    pixels = images * height * width
    drawn: Tensor
    if total <= most_pairs:
        drawn = _Blended.apply(values, spans, pixels, (height, width), True)
    else:
        band_of_line = (per_line.cumsum(0) - 1).clamp_min(0) // most_pairs
        bands = [spans.where(band_of_line[spans.line] == band) for band in band_of_line.unique().tolist()]
        drawn = sum(_Blended.apply(values, band, pixels, (height, width), False) for band in bands)
    return drawn.reshape(4, images, height, width).transpose(0, 1)


_VALUES = ("x", "y", "xx", "xy", "yy", "opacity", "red", "green", "blue")


@dataclass(frozen=True)
class _Spans:
    """Pixels `first` to `first + count - 1` of a line; a line is one row of pixels of one image. Every field is `[S]`
    int64. ellipse: its number in the flattened `[I N]`. Spans of one line are in the order of depth."""

    line: Tensor
    ellipse: Tensor
    first: Tensor
    count: Tensor

    def where(self, chosen: Tensor) -> _Spans:
        return _Spans(self.line[chosen], self.ellipse[chosen], self.first[chosen], self.count[chosen])


def _spans(ellipses: Ellipses, height: int, width: int) -> _Spans:
    """The rows of pixels that each visible ellipse crosses where its alpha is at least CUT, and where."""
    images, count = ellipses.x.shape
    order = torch.where(ellipses.visible, ellipses.depth, torch.inf).argsort(dim=1, stable=True)
    order = (order + count * torch.arange(images, device=order.device)[:, None]).flatten()
    order = order[ellipses.visible.flatten()[order]]
    x, y, xx, xy, yy = (getattr(ellipses, name).flatten()[order].double() for name in _VALUES[:5])
    # alpha >= CUT inside the ellipse xx dx^2 + 2 xy dx dy + yy dy^2 = level.
    level = 2 * (ellipses.opacity.flatten()[order].double() / CUT).log().clamp_min(0) * (1 + _SLACK) + _SLACK
    reach = (level * xx / (xx * yy - xy * xy)).sqrt()
    top = (y - reach - 0.5).ceil().clamp(0, height).long()
    rows = ((y + reach - 0.5).floor().clamp(-1, height - 1).long() + 1 - top).clamp_min(0)
    own, row = _runs(rows)
    row = row + top[own]
    dy = row + 0.5 - y[own]
    middle = x[own] - xy[own] * dy / xx[own]
    inside = level[own] * xx[own] - (xx[own] * yy[own] - xy[own] ** 2) * dy * dy
    reach = inside.clamp_min(0).sqrt() / xx[own]
    first = (middle - reach - 0.5).ceil().clamp(0, width).long()
    last = (middle + reach - 0.5).floor().clamp(-1, width - 1).long()
    found = order[own]
    spans = _Spans(found // count * height + row, found, first, (last + 1 - first).clamp_min(0))
    return spans.where(spans.count > 0)


def _runs(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For counts `[K]`: the number k of a run, and the place in it, of every element of all runs in a row."""
    own = torch.repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    return own, torch.arange(len(own), device=counts.device) - starts[own]


@dataclass(frozen=True)
class _Pairs:
    """Sorted by pixel, then depth. ellipse, pixel: numbers in `[I N]` and `[I H W]`, int32. place: in its pixel, from
    0. longest: the most pairs of a pixel. All `[M]`."""

    ellipse: Tensor
    pixel: Tensor
    place: Tensor
    longest: int

    @staticmethod
    def of(spans: _Spans, pixels: int, width: int) -> _Pairs:
        own, place = _runs(spans.count)
        start = spans.line * width + spans.first
        # Spans of one pixel come in the order of depth, so a stable sort by pixel keeps it. int32 is sorted faster.
        small = torch.int32 if pixels < 2**31 else torch.int64
        pixel, order = (start[own] + place).to(small).sort(stable=True)
        counts = torch.bincount(pixel, minlength=pixels)
        starts = (counts.cumsum(0) - counts).to(small)
        place = torch.arange(len(own), device=own.device, dtype=small) - starts.index_select(0, pixel)
        longest = int(counts.max()) if len(own) else 0
        return _Pairs(spans.ellipse.to(small)[own].index_select(0, order), pixel, place, longest)


class _Blended(torch.autograd.Function):
    """Values `[9, I N]` in the order of `_VALUES` to `[4, I H W]`: red, green, blue times opacity, and opacity.

    size: (height, width). keep: keeps what the backward pass needs; otherwise it is computed again there.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, spans: _Spans, pixels: int, size: tuple[int, int], keep: bool) -> Tensor:
        pairs = _Pairs.of(spans, pixels, size[1])
        raw, light = _light(values, pairs, size)
        weight = _alpha(raw) * light
        drawn = values.new_zeros(4, pixels)
        for channel in range(3):
            colour = values[6 + channel].index_select(0, pairs.ellipse)
            drawn[channel].index_add_(0, pairs.pixel, weight * colour)
        drawn[3].index_add_(0, pairs.pixel, weight)
        made_from = () if keep else (spans.line, spans.ellipse, spans.first, spans.count)
        kept = (pairs.ellipse, pairs.pixel, pairs.place, raw, light) if keep else ()
        ctx.save_for_backward(values, *made_from, *kept)
        ctx.keep, ctx.longest, ctx.pixels, ctx.size = keep, pairs.longest, pixels, size
        return drawn

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drawn: Tensor) -> tuple[Tensor | None, ...]:
        values, *saved = ctx.saved_tensors
        size = ctx.size
        if ctx.keep:
            ellipse, pixel, place, raw, light = saved
            pairs = _Pairs(ellipse, pixel, place, ctx.longest)
        else:
            pairs = _Pairs.of(_Spans(*saved), ctx.pixels, size[1])
            raw, light = _light(values, pairs, size)
        gradient = torch.zeros_like(values)

        def add(row: int, of_pairs: Tensor) -> None:
            gradient[row].index_add_(0, pairs.ellipse, of_pairs)

        alpha = _alpha(raw)
        weight = alpha * light
        of_weight = drawn[3].index_select(0, pairs.pixel)
        for channel in range(3):
            of_colour = drawn[channel].index_select(0, pairs.pixel)
            add(6 + channel, weight * of_colour)
            of_weight = of_weight + of_colour * values[6 + channel].index_select(0, pairs.ellipse)
        # An ellipse has a weight of its own, and takes light from those behind it in the same pixel.
        of_alpha = of_weight * light - _sum_behind(of_weight * weight, pairs) / (1 - alpha)
        of_power = torch.where((raw >= CUT) & (raw < MOST_ALPHA), of_alpha * raw, torch.zeros_like(raw))
        add(5, of_power / values[5].index_select(0, pairs.ellipse))
        dx, dy, xx, xy, yy = _from_centres(values, pairs, size)
        add(0, of_power * (xx * dx + xy * dy))
        add(1, of_power * (xy * dx + yy * dy))
        add(2, of_power * dx * dx * -0.5)
        add(3, of_power * dx * -dy)
        add(4, of_power * dy * dy * -0.5)
        return gradient, None, None, None, None


def _from_centres(values: Tensor, pairs: _Pairs, size: tuple[int, int]) -> list[Tensor]:
    """dx, dy from the centre of the ellipse to that of the pixel, and xx, xy, yy: each `[M]`."""
    x, y, xx, xy, yy = (values[row].index_select(0, pairs.ellipse) for row in range(5))
    height, width = size
    row = pairs.pixel // width % height
    column = pairs.pixel % width
    return [column.to(x.dtype) + 0.5 - x, row.to(y.dtype) + 0.5 - y, xx, xy, yy]


def _light(values: Tensor, pairs: _Pairs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of each pair: alpha before it is limited, and the share of the light that passes those in front; `[M]`."""
    dx, dy, xx, xy, yy = _from_centres(values, pairs, size)
    power = (xx * dx * dx + yy * dy * dy) * -0.5 - xy * dx * dy
    raw = values[5].index_select(0, pairs.ellipse) * power.exp()
    light = 1 - _alpha(raw)
    step = 1
    while step < pairs.longest:
        inside = pairs.place[step:] >= step
        light[step:] *= torch.where(inside, light[:-step], torch.ones_like(light[:-step]))
        step *= 2
    before = torch.ones_like(light)
    before[1:] = torch.where(pairs.place[1:] > 0, light[:-1], before[1:])
    return raw, before


def _alpha(raw: Tensor) -> Tensor:
    return torch.where(raw >= CUT, raw.clamp_max(MOST_ALPHA), torch.zeros_like(raw))


def _sum_behind(values: Tensor, pairs: _Pairs) -> Tensor:
    """Of each pair: the sum of the values of those behind it in its pixel; `[M]`."""
    total = values.clone()
    step = 1
    while step < pairs.longest:
        inside = pairs.place[step:] >= step  # the pair `step` further on is in the same pixel
        total[:-step] += torch.where(inside, total[step:], torch.zeros_like(total[step:]))
        step *= 2
    behind = torch.zeros_like(total)
    behind[:-1] = torch.where(pairs.place[1:] > 0, total[1:], behind[:-1])
    return behind
