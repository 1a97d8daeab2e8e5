"""How different particles are from each other: modes, total variation, cosine of features, Vendi score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distvsd.shapes.world import COLORS, SHAPES

MODES = tuple((color, shape) for color in range(len(COLORS)) for shape in range(len(SHAPES)))  # of `an object`


def mode_counts(labels: Sequence[Mapping[str, int]]) -> Tensor:
    """How many have each colour and shape: int64 `[30]` in the order of MODES; those without both are not counted."""
    counts = torch.zeros(len(MODES), dtype=torch.int64)
    for found in labels:
        if "color" in found and "shape" in found:
            counts[found["color"] * len(SHAPES) + found["shape"]] += 1
    return counts


def mode_names(counts: Tensor) -> dict[str, int]:
    """The modes that are present, commonest first: `{"red cube": 3, ...}`."""
    order = counts.argsort(descending=True, stable=True).tolist()
    return {f"{COLORS[MODES[i][0]]} {SHAPES[MODES[i][1]]}": int(counts[i]) for i in order if counts[i] > 0}


def room_names(labels: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The rooms that are present, commonest first: `{"red walls, blue floor": 3, ...}`."""
    rooms = [
        f"{COLORS[found['wall']]} walls, {COLORS[found['floor']]} floor"
        for found in labels
        if "wall" in found and "floor" in found
    ]
    return dict(Counter(rooms).most_common())


def total_variation(counts: Tensor, target: Tensor | None = None) -> float:
    """Half the summed absolute difference of the shares `counts / sum` `[K]` from `target` `[K]` (uniform unless
    given).

    0 is equal, 1 is disjoint; nothing counted is 1. Few samples alone keep it above 0: n samples of K equal modes
    differ by about sqrt(K / (2 pi n)).
    """
    if counts.sum() == 0:
        return 1.0
    shares = counts.double() / counts.sum()
    goal = torch.full_like(shares, 1 / len(shares)) if target is None else target.double() / target.sum()
    return float((shares - goal).abs().sum() / 2)


def mean_cosine(features: Tensor) -> float:
    """Mean cosine between the features `[P, V, F]` of two particles at the same view, over all pairs; lower is more
    diverse.

    1.0 for a single particle.
    """
    count = features.shape[0]
    if count < 2:
        return 1.0
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    # The squared length of the sum holds every ordered pair and every particle with itself (cosine 1 unless zero).
    own = unit.square().sum(-1).sum(0)
    pairs = unit.sum(0).square().sum(-1) - own
    return float((pairs / (count * (count - 1))).mean())


def vendi_score(features: Tensor) -> float:
    """Effective number of particles, 1..P: exp of the entropy of the eigenvalues of the cosine matrix of `[P, F]`
    over P.

    Friedman and Dieng, "The Vendi Score", TMLR 2023. Identical particles give 1, orthogonal ones P.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    # Both Gram matrices have the same positive eigenvalues; the smaller one is taken.
    gram = unit @ unit.T if unit.shape[0] <= unit.shape[1] else unit.T @ unit
    eigenvalues = torch.linalg.eigvalsh(gram / len(unit)).clamp_min(0)
    eigenvalues = eigenvalues / eigenvalues.sum().clamp_min(1e-300)
    return float(torch.special.entr(eigenvalues).sum().exp())
