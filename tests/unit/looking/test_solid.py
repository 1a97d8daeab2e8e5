"""Meshes on their way to a file: what a reader of glTF insists on."""

from __future__ import annotations

import pytest
import torch

from distvsd.looking.solid import vertex_normals


@pytest.mark.parametrize("edge", [1e-8, 3e-7, 1e-6, 3e-6, 1e-3, 1.0])
def test_normals_have_length_one_however_small_the_triangle(edge: float) -> None:
    vertices = torch.tensor([[0.0, 0.0, 0.0], [0.0, edge, 0.0], [0.0, 0.0, edge]])
    normals = vertex_normals(vertices, torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
    if edge >= 3e-6:
        torch.testing.assert_close(normals, torch.tensor([[1.0, 0.0, 0.0]]).expand(3, 3), rtol=0, atol=1e-6)
