"""What this installation has: versions, devices, the embedded prior; and for everything missing, what to do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A distribution by its name on the index, what it is for, and how to get it. needed: nothing works without it."""

    name: str
    purpose: str
    remedy: str
    needed: bool = False


PACKAGES = (
    Package("torch", "tensors and ranks", "pip install torch", needed=True),
    Package("diffusers", "reads priors", "pip install diffusers", needed=True),
    Package("transformers", "text encoders of priors", "pip install transformers", needed=True),
    Package("peft", "the score network's adapter", "pip install peft", needed=True),
    Package("accelerate", "starts and finds ranks", "pip install accelerate", needed=True),
    Package("safetensors", "checkpoints", "pip install safetensors", needed=True),
    Package("PyYAML", "configurations", "pip install pyyaml", needed=True),
    Package("deepspeed", "parallel.strategy: deepspeed", "pip install 'distvsd[deepspeed]'"),
    Package("wandb", "log.wandb", "pip install 'distvsd[wandb]'"),
    Package("nerfacc", "render.backend: nerfacc", "pip install 'distvsd[cuda]'"),
    Package("triton", "render.grid_backend: triton", "pip install 'distvsd[cuda]'"),
    Package("tinycudann", "render.grid_backend: tinycudann", "from source, github.com/NVlabs/tiny-cuda-nn"),
    Package("xatlas", "textures of distvsd export", "pip install 'distvsd[export]'"),
    Package("gsplat", "render.splat_backend: gsplat", "pip install 'distvsd[cuda]'"),
)


def examine() -> Iterator[str]:
    """Lines of text, one a finding. Imports torch; starts no network, loads no weights."""
    yield f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPU cores"
    yield f"distvsd {_version('distvsd') or 'not installed as a package; `pip install -e .` makes the command'}"
    for package in PACKAGES:
        yield _finding(package)
    yield from _devices()
    yield _embedded_prior()


def _finding(package: Package) -> str:
    version = _version(package.name)
    if version:
        return f"{package.name} {version}"
    kind = "MISSING" if package.needed else "not installed (optional)"
    return f"{package.name} {kind}: for {package.purpose}; {package.remedy}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    if _version("torch") is None:
        yield "devices unknown: torch is missing"
        return
    import torch

    if not torch.cuda.is_available():
        reason = (
            "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device or driver is found"
        )
        yield f"no GPU: {reason}; everything runs on the CPU ({torch.get_num_threads()} threads), slower"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def _embedded_prior() -> str:
    if _version("torch") is None:
        return "embedded prior unknown: torch is missing"
    from distvsd.errors import PriorError
    from distvsd.networks.folder import open_folder

    try:
        folder = open_folder("shapes")
    except PriorError as error:
        return f"embedded prior MISSING: {error}"
    return f"embedded prior: {folder.native_resolution} pixels, {folder.latent_channels} latent channels"
