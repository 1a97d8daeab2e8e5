"""Trains the embedded prior from scratch: draws the images, trains the text encoder and the UNet, then the classifier.

One command (`distvsd prior build`), resumable; deterministic by seed for one machine and number of threads. The result
is a diffusers pipeline.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from distvsd.cameras import Cameras
from distvsd.errors import UsageError
from distvsd.networks.components import load_tokenizer
from distvsd.networks.folder import PipelineFolder, open_folder
from distvsd.networks.patch_codec import PatchCodec
from distvsd.shapes import world
from distvsd.shapes.captions import (
    LEVELS,
    MAX_TOKENS,
    draw_captions,
    draw_levels,
    save_tokenizer,
    tokenize,
)
from distvsd.shapes.train_classifier import train_classifier
from distvsd.shapes.trainer import PriorTrainer, save_atomically
from distvsd.vsd.rng import Purpose, generator, seeded

PATCH = 4
LATENT_SCALE = 1.3  # brings the world's latents to about unit variance
# The detail inside a patch has 0.04 of the variance of the patch's mean; without amplification edges and faces are not
# learnt.
DETAIL_GAIN = 4.0
NOISE_SHIFT = 3.0  # factor on sigma/alpha of the cosine schedule: smooth images need stronger noise
NUM_TIMESTEPS = 1000
# The UNet predicts x_0, because a patch of 48 numbers lies on a low-dimensional manifold. v or eps would need all 48 in
# the last layers, and the part that does not fit would stay in samples as noise. The error is weighted like that of v,
# 1 / sigma^2, up to this.
MAX_WEIGHT = 5.0
# Colour and shape are decided at high noise, edges and faces below; noise hides these at sigma/alpha = DETAIL_GAIN, 0.6
# of the range. So most of a batch is drawn from the upper part. Pairs: start of an interval that ends at 1, share of
# the batch.
TIMESTEP_SHARES = ((0.0, 0.25), (0.3, 0.55), (0.85, 0.2))
# Every turn of the camera changes the view of a cube, so cubes take more images to learn. They are drawn this many
# times as often as another shape if the caption names the shape. Other captions keep their meaning: "an object" is any
# shape.
CUBE_WEIGHT = 4.0


@dataclass(frozen=True)
class BuildConfig:
    """The settings of a build. num_images: size of the drawn data set. steps, batch_size, learning_rate: of the
    training. start: folder of a pipeline of the same architecture with the first weights, "shapes" for the embedded
    one, "" for random weights.
    """

    seed: int = 0
    num_images: int = 30_000
    steps: int = 12_000
    batch_size: int = 32
    learning_rate: float = 8e-4
    channels: tuple[int, ...] = (64, 128, 160)
    text_width: int = 128
    text_layers: int = 2
    start: str = ""


def build(folder: Path, config: BuildConfig, device: str, report: Callable[[str], None], save_every: int = 500) -> None:
    """Trains the pipeline, then the classifier beside it. Call it again with the same arguments to continue."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a name torch does not know, or a device that is not here
        raise UsageError(f"torch has no device {device!r} here: {str(error).splitlines()[0]}") from error
    build_pipeline(folder, config, device, report, save_every)
    train_classifier(folder, config.seed, report=report)
    report(f"written {folder}")


def build_pipeline(
    folder: Path, config: BuildConfig, device: str, report: Callable[[str], None], save_every: int = 500
) -> None:
    """Trains and writes the pipeline to `folder`. `folder/build-state` is needed to resume and can be deleted
    afterwards.

    Raises UsageError if the folder was begun with another configuration or `config.start` has another architecture, and
    PriorError if `config.start` is not the folder of a pipeline.
    """
    start = open_folder(config.start) if config.start else None
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "build-state"
    state.mkdir(exist_ok=True)
    _check_same(state / "config.json", config)
    images, labels, cameras = dataset(state / "images.safetensors", config, report)
    save_tokenizer(folder / "tokenizer")
    _scheduler().save_pretrained(folder / "scheduler")
    PatchCodec(PATCH, LATENT_SCALE, DETAIL_GAIN).save_pretrained(folder / "vae")
    modules = _models(config, folder / "tokenizer")
    if start:
        _begin_with(modules, start, folder / "tokenizer")
    modules.to(device)
    trainer = PriorTrainer(modules, config.learning_rate, config.steps)
    trainer.load(state / "training.safetensors")
    train(trainer, images, labels, cameras, folder, config, report, save_every)
    trainer.write(folder)


def dataset(path: Path, config: BuildConfig, report: Callable[[str], None]) -> tuple[Tensor, world.Labels, Cameras]:
    """The drawn world: images uint8 `[N, 3, 64, 64]`, their labels and cameras; cached in `path`."""
    draw = generator(config.seed, Purpose.BUILD, 0)
    labels = world.sample_labels(config.num_images, draw)
    cameras = world.sample_cameras(labels, draw)
    background = torch.rand(config.num_images, generator=draw)
    if not path.exists():
        chunks, start = [], time.monotonic()
        for first in range(0, config.num_images, 250):
            part = slice(first, first + 250)
            drawn = world.draw(labels[part], cameras[part], background[part], samples=2)
            chunks.append((drawn * 255).round().byte().contiguous())
            if first % 5000 == 0:
                report(f"drawn {first} of {config.num_images} images, {time.monotonic() - start:.0f} s")
        save_atomically({"images": torch.cat(chunks)}, path)
    with safe_open(path, "pt") as file:
        return file.get_tensor("images"), labels, cameras


def alphas_cumprod() -> Tensor:
    """The cosine schedule with its noise-to-signal ratio times NOISE_SHIFT, ending in pure noise; float64 `[T]`."""
    u = (torch.arange(NUM_TIMESTEPS, dtype=torch.float64) + 1) / NUM_TIMESTEPS
    values = 1 / (1 + (NOISE_SHIFT * torch.tan(u * math.pi / 2)) ** 2)
    values[-1] = 0.0
    return values


def train(
    trainer: PriorTrainer,
    images: Tensor,
    labels: world.Labels,
    cameras: Cameras,
    folder: Path,
    config: BuildConfig,
    report: Callable[[str], None],
    save_every: int,
) -> None:
    """Denoising over the data set until `config.steps`; every random draw is keyed by (seed, step)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    codec = PatchCodec(PATCH, LATENT_SCALE, DETAIL_GAIN)
    abar = alphas_cumprod().float()
    losses: list[float] = []
    start, first_step = time.monotonic(), trainer.step
    while trainer.step < config.steps:
        draw = generator(config.seed, Purpose.BUILD, 1, trainer.step)
        levels = draw_levels(config.batch_size, draw)
        pick = draw_images(labels, levels, draw)
        texts = draw_captions(labels[pick], cameras[pick], levels, draw)
        latents = codec.encode(images[pick].float() / 255)
        timesteps = _draw_timesteps(config.batch_size, draw)
        noise = torch.randn(latents.shape, generator=draw)
        alpha, sigma = abar[timesteps].sqrt()[:, None, None, None], (1 - abar[timesteps]).sqrt()[:, None, None, None]
        weight = (1 / sigma.square()).clamp(max=MAX_WEIGHT)
        tokens = tokenize(tokenizer, texts)
        losses.append(trainer.update(alpha * latents + sigma * noise, timesteps, tokens, latents, weight))
        if trainer.step % 100 == 0 or trainer.step == config.steps:
            rate = (trainer.step - first_step) / (time.monotonic() - start)
            report(
                f"step {trainer.step}/{config.steps}  loss {sum(losses) / len(losses):.4f}  {rate:.2f} steps/s"
                f"  left {(config.steps - trainer.step) / rate / 60:.0f} min"
            )
            losses.clear()
        if trainer.step % save_every == 0:
            trainer.save(folder / "build-state" / "training.safetensors")
            trainer.write(folder)


def draw_images(labels: world.Labels, levels: Tensor, draw: torch.Generator) -> Tensor:
    """An image's index for each caption level `[N]`: uniform, or by CUBE_WEIGHT if the caption names the shape."""
    weights = torch.where(labels.shape == world.SHAPES.index("cube"), CUBE_WEIGHT, 1.0)
    names_shape = torch.isin(levels, torch.tensor([LEVELS.index("full"), LEVELS.index("shape")]))
    weighted = torch.multinomial(weights, len(levels), replacement=True, generator=draw)
    return weighted.where(names_shape, torch.randint(len(weights), (len(levels),), generator=draw))


def _draw_timesteps(count: int, draw: torch.Generator) -> Tensor:
    """Timesteps by TIMESTEP_SHARES, stratified to lower the variance of the loss."""
    ends = torch.tensor([share for _, share in TIMESTEP_SHARES]).cumsum(0).mul(count).round().long().tolist()
    parts = [
        first + (1 - first) * _stratified(end - begin, draw)
        for (first, _), begin, end in zip(TIMESTEP_SHARES, [0, *ends], ends, strict=False)
    ]
    return (torch.cat(parts) * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)


def _stratified(count: int, draw: torch.Generator) -> Tensor:
    """A uniform number in each of `count` equal parts of [0, 1)."""
    return (torch.arange(count) + torch.rand(count, generator=draw)) / count


def _models(config: BuildConfig, tokenizer_folder: Path) -> torch.nn.ModuleDict:
    from diffusers import UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    with seeded(config.seed, Purpose.BUILD, 2):
        unet = UNet2DConditionModel(
            sample_size=world.RESOLUTION // PATCH,
            in_channels=3 * PATCH**2,
            out_channels=3 * PATCH**2,
            block_out_channels=config.channels,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (len(config.channels) - 1),
            up_block_types=("CrossAttnUpBlock2D",) * (len(config.channels) - 1) + ("UpBlock2D",),
            layers_per_block=1,
            cross_attention_dim=config.text_width,
            attention_head_dim=4,
            norm_num_groups=16,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.text_width,
                intermediate_size=4 * config.text_width,
                num_hidden_layers=config.text_layers,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    return torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})


def _begin_with(modules: torch.nn.ModuleDict, start: PipelineFolder, tokenizer_folder: Path) -> None:
    """Loads the weights of the pipeline `start`. Word embeddings move to the word's id in this build's tokenizer; new
    words keep their random embedding."""
    from transformers import AutoTokenizer

    old = load_tokenizer(start).get_vocab()
    new = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True).get_vocab()
    kept = [(number, old[word]) for word, number in new.items() if word in old]
    to, origin = torch.tensor(kept).unbind(1)
    for part, module in modules.items():
        mine = module.state_dict()
        weights = {
            name: value for file in start.weights[part].files.values() for name, value in load_file(file).items()
        }
        for name in weights:
            if name.endswith("token_embedding.weight"):
                weights[name] = mine[name].index_copy(0, to, weights[name][origin].to(mine[name].dtype))
        try:
            module.load_state_dict(weights)
        except RuntimeError as problem:
            raise UsageError(f"{start.path / part} is of another architecture than this build: {problem}") from problem


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    values = alphas_cumprod()
    betas = 1 - values / torch.cat((torch.ones(1, dtype=torch.float64), values[:-1]))
    return DDIMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        trained_betas=betas.tolist(),
        prediction_type="sample",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def _check_same(path: Path, config: BuildConfig) -> None:
    current = json.loads(json.dumps(asdict(config)))
    if path.exists() and json.loads(path.read_text()) != current:
        raise UsageError(f"{path} was begun with another configuration; give the same one or another folder")
    path.write_text(json.dumps(current, indent=2) + "\n")
