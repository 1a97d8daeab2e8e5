"""The score network starts equal to the prior, shares the prior's memory, and never changes it."""

from __future__ import annotations

import pytest
import torch

from distvsd.config import ScoreConfig
from distvsd.errors import BackendError
from distvsd.score.lora import LoraScore
from distvsd.vsd.process import Diffusion

from .conftest import denoiser_of, text_of


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("with_camera", [True, False])
def test_at_the_start_the_score_network_is_the_prior_bit_for_bit(
    unet, make_score, make_batch, prediction_type, with_camera
):
    score, batch = make_score(unet, prediction_type), make_batch()
    with torch.no_grad():
        output = unet(batch.noise, batch.times, encoder_hidden_states=text_of(batch.samples.ids).text).sample
    process = Diffusion(torch.linspace(0.99, 0.01, 100), prediction_type)
    expected = process.to_eps(output, batch.noise, batch.times)
    cameras = batch.samples.cameras if with_camera else None
    eps = score.eps(batch.noise, batch.times, batch.samples.ids, cameras)
    assert torch.equal(eps, expected)
    assert eps.dtype == torch.float32 and not eps.requires_grad


def test_the_frozen_tensors_are_shared_and_only_adapter_and_camera_are_new(unet, make_score):
    score = make_score(unet)
    shared = {t.data_ptr() for t in (*unet.parameters(), *unet.buffers())}
    network = score.network
    new = [name for name, t in network.state_dict().items() if t.data_ptr() not in shared]
    assert new and all(".lora_" in name or name.startswith("class_embedding.") for name in new)
    assert shared == {t.data_ptr() for t in (*network.parameters(), *network.buffers())} & shared
    assert not any(p.requires_grad for p in unet.parameters())


def test_training_the_score_network_leaves_the_prior_as_it_was(unet, make_score, make_batch):
    batch = make_batch()
    text = text_of(batch.samples.ids).text
    names, before = list(unet.state_dict()), unet(batch.noise, batch.times, text).sample
    score = make_score(unet)
    eps = score.eps(batch.noise, batch.times, batch.samples.ids, batch.samples.cameras)
    for _ in range(3):
        (gradient,), _ = score.gradients(*batch.arguments(), 5.0, [slice(0, 5)])
        score.step(gradient, 1e-1)
    assert list(unet.state_dict()) == names
    assert unet.class_embedding is None
    assert torch.equal(unet(batch.noise, batch.times, text).sample, before)
    after = score.eps(batch.noise, batch.times, batch.samples.ids, batch.samples.cameras)
    assert (after - eps).abs().max() > 1e-2


def test_parameters_of_stable_diffusion_2_1_are_counted_exactly():
    # Rank 4 on q, k, v, out of every attention of the SD 2.1 UNet; camera 16 -> 1280 -> 1280 with biases.
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=96,
            in_channels=4,
            out_channels=4,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=[5, 10, 20, 20],
            cross_attention_dim=1024,
            use_linear_projection=True,
        ).requires_grad_(False)
    config = ScoreConfig(rank=4)
    score = LoraScore(base=denoiser_of(unet), text_of=text_of, config=config, seed=0, device="meta")
    assert score.num_parameters == (829_952, 16 * 1280 + 1280 + 1280 * 1280 + 1280)
    assert score.num_parameters[1] == 1_661_440


def test_trained_parameters_are_sorted_adapter_names_then_the_camera(unet, make_score):
    names = list(make_score(unet).trainable)
    adapter = [name for name in names if not name.startswith("camera.")]
    assert adapter == sorted(adapter) and adapter[0].startswith("base_model.model.")
    assert adapter[0].endswith(".lora_A.weight")
    assert names[len(adapter) :] == [
        "camera.first.weight",
        "camera.first.bias",
        "camera.last.weight",
        "camera.last.bias",
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_is_trained_is_float32_and_starts_the_same_whatever_the_dtype_of_the_prior(make_unet, make_score, dtype):
    reference = make_score(make_unet()).trainable
    trainable = make_score(make_unet().to(dtype)).trainable
    assert list(trainable) == list(reference)
    for name, parameter in trainable.items():
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert torch.equal(parameter, reference[name])


def test_the_adapter_starts_from_its_seed_and_leaves_the_global_generator_alone(unet, make_score):
    state = torch.random.get_rng_state()
    first, again, other = make_score(unet), make_score(unet), make_score(unet, seed=6)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in first.trainable.items():
        assert torch.equal(parameter, again.trainable[name])
    assert any(not torch.equal(p, other.trainable[name]) for name, p in first.trainable.items())


def test_micro_batches_of_eps_agree_with_one_call(unet, make_score, make_batch):
    batch = make_batch()
    arguments = (batch.noise, batch.times, batch.samples.ids, batch.samples.cameras)
    whole = make_score(unet, shaken=True).eps(*arguments)
    assert torch.allclose(make_score(unet, shaken=True, micro_batch=2).eps(*arguments), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"class_embed_type": "identity"}, "class conditioning"),
        ({"num_class_embeds": 3}, "class conditioning"),
        ({"addition_embed_type": "text", "addition_embed_type_num_heads": 2, "cross_attention_dim": 8}, "additional"),
    ],
)
def test_a_prior_with_other_conditions_is_refused(make_unet, make_score, changes, word):
    with pytest.raises(BackendError, match=word):
        make_score(make_unet(**changes))


@pytest.mark.parametrize("rank", [2, 8])
def test_the_first_factor_begins_as_in_the_papers_code_or_as_in_pefts(make_unet, make_score, rank):
    unet = make_unet(block_out_channels=(64, 128), cross_attention_dim=64)
    spread: dict[str, torch.Tensor] = {}
    for init in ("normal", "kaiming"):
        first = {n: p for n, p in make_score(unet, rank=rank, init=init).trainable.items() if ".lora_A." in n}
        # Each value in units of its expected deviation: diffusers' LoRALinearLayer has 1 / rank, peft's kaiming
        # uniform with a = sqrt(5) has 1 / sqrt(3 inputs).
        due = {n: 1 / rank if init == "normal" else (3 * p.shape[1]) ** -0.5 for n, p in first.items()}
        spread[init] = torch.cat([(p / due[n]).flatten() for n, p in first.items()])
        # The deviation of n values has a relative standard error of 1 / sqrt(2 n); five of them are allowed.
        assert abs(spread[init].std().item() - 1) < 5 / (2 * len(spread[init])) ** 0.5
    # A uniform distribution ends at sqrt(3) deviations; of so many normal values some are beyond 3.
    assert spread["kaiming"].abs().max() <= 3**0.5 * (1 + 1e-6) and spread["normal"].abs().max() > 3


def test_without_cameras_there_is_no_camera_network_and_nothing_reads_one(unet, make_score, make_batch):
    score, batch = make_score(unet, shaken=True, reads_cameras=False), make_batch()
    assert all(".lora_" in name for name in score.trainable) and score.num_parameters[1] == 0
    assert "score/camera.safetensors" not in score.state()
    arguments = (batch.noise, batch.times, batch.samples.ids)
    eps = score.eps(*arguments, batch.samples.cameras)
    assert torch.equal(eps, score.eps(*arguments, None))
    # It equals a network whose camera network is still zero.
    other = make_score(unet, reads_cameras=True)
    with torch.no_grad():
        for name, parameter in score.trainable.items():
            other.trainable[name].copy_(parameter)
    assert torch.equal(eps, other.eps(*arguments, batch.samples.cameras))


def test_a_camera_network_of_an_older_checkpoint_is_left_out_where_no_camera_is_read(unet, make_score, make_batch):
    old, new = make_score(unet, shaken=True), make_score(unet, reads_cameras=False)
    new.load_state(old.state())
    for name, parameter in new.trainable.items():
        assert torch.equal(parameter, old.trainable[name])
