"""What the commands `distvsd prior info` and `distvsd prior sample` do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distvsd.errors import PriorError
from distvsd.networks.files import Weights
from distvsd.networks.folder import PipelineFolder, open_folder
from distvsd.networks.identity import Identity
from distvsd.networks.load import build_scheduler, prediction_type_of
from distvsd.prior.load import load_prior


def describe(path: str) -> dict[str, Any]:
    """What the prior at `path` is, as one JSON object; reads headers and hashes files, loads no model.

    Raises PriorError as `load_prior` does.
    """
    folder = open_folder(path)
    folder.check_weights()
    scheduler = build_scheduler(folder)
    schedule = scheduler.alphas_cumprod
    components = {name: _component(folder, name) for name in ("unet", "vae", "text_encoder")}
    side = folder.native_resolution // folder.downscale
    return {
        "path": str(folder.path),
        "pipeline": folder.index.get("_class_name"),
        "identity": Identity(folder).current(),
        "parameters": sum(component["parameters"] for component in components.values()),
        "bytes": sum(component["bytes"] for component in components.values()),
        "components": components,
        "scheduler": type(scheduler).__name__,
        "prediction_type": prediction_type_of(scheduler, folder),
        "timesteps": len(schedule),
        "zero_terminal_snr": bool(schedule[-1] < 1e-6),
        "resolution": folder.native_resolution,
        "renders_encoded_at": folder.native_resolution,
        "latent_shape": [folder.latent_channels, side, side],
    }


def sample(
    path: str,
    prompt: str,
    count: int,
    guidance_scale: float,
    steps: int,
    seed: int,
    out: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> Tensor:
    """Draws `count` ancestral samples of `prompt` and writes them to `out` as one PNG, row by row.

    Returns the images `[count, 3, H, W]`, float32 in [0, 1]. Raises PriorError where the prior cannot be loaded, the
    count is not positive, or `out` does not end in .png.
    """
    if count < 1 or out.suffix.lower() != ".png":
        raise PriorError(f"asked for {count} samples in {out}; give at least 1, and a file that ends in .png")
    prior = load_prior(path, [prompt], view_dependent=False, dtype=dtype, device=device)
    images = prior.sample([0], count, guidance_scale, steps, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    _write_grid(images, out)
    return images


def _component(folder: PipelineFolder, name: str) -> dict[str, Any]:
    weights = folder.weights.get(name, Weights({}))
    # Position ids and other integers are no parameters.
    floats = [header for header in weights.headers.values() if header.dtype.startswith(("F", "BF"))]
    named = folder.index.get(name)
    return {
        "class": folder.configs[name].get("_class_name") or (named[1] if isinstance(named, list) else None),
        "parameters": sum(math.prod(header.shape) for header in floats),
        "bytes": weights.num_bytes,
        "dtype": "+".join(sorted({header.dtype for header in floats})) or None,
    }


def _write_grid(images: Tensor, out: Path) -> None:
    """As square a grid as the count allows; cells that stay empty are black."""
    from PIL import Image

    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = torch.zeros(rows * columns, channels, height, width)
    cells[:count] = images.cpu()
    grid = cells.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = (grid.reshape(rows * height, columns * width, channels) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(out)
