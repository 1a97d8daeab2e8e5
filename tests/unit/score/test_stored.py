"""The trained tensors derived from the headers of a prior's files are those that a score network trains."""

from __future__ import annotations

import pytest
import torch

from distvsd.errors import PriorError
from distvsd.networks.folder import open_folder
from distvsd.prior.load import load_prior
from distvsd.score.stored import ADAPTER_FILE, CAMERA_FILE, trainable_of, unet_like
from distvsd.testing.pipelines import tiny_pipeline


@pytest.mark.parametrize("layout", ["sd15", "sd21", "shapes"])
def test_the_headers_of_a_prior_tell_what_its_score_network_trains(layout, make_score, tmp_path):
    folder = tiny_pipeline(tmp_path, layout)
    score = make_score(load_prior(str(folder), ["a cube"]).denoiser.module, rank=3)
    trained = {name: tuple(parameter.shape) for name, parameter in score.trainable.items()}
    assert all(parameter.dtype == torch.float32 for parameter in score.trainable.values())
    headers = open_folder(str(folder)).weights["unet"].headers
    unet = {name: header.shape for name, header in headers.items()}
    assert trainable_of(unet, 3, reads_cameras=True) == trained
    without = {name: shape for name, shape in trained.items() if not name.startswith("camera.")}
    assert trainable_of(unet, 3, reads_cameras=False) == without
    state = score.state()
    assert trainable_of(unet_like(state[ADAPTER_FILE], state[CAMERA_FILE]), 3, reads_cameras=True) == trained
    assert trainable_of(unet_like(state[ADAPTER_FILE], {}), 3, reads_cameras=False) == without


def test_tensors_that_are_no_unet_are_refused_by_name():
    with pytest.raises(PriorError, match="time_embedding"):
        trainable_of({"mid.to_q.weight": [4, 4]}, 2, reads_cameras=True)
