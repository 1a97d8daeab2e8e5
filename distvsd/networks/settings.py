"""Checks the configurations of a pipeline before any library builds from them: their types, ranges and sizes.

A configuration is untrusted: a library that builds from a wrong one may raise any error, or use up all memory. Settings
that this program reads are checked by name. Settings that only a library reads are limited by the size of the weights
(`refuse_larger_than`), and `foreign` catches the remaining errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from distvsd.errors import DistvsdError, PriorError
from distvsd.networks.files import Weights, shown
from distvsd.networks.patch_codec import CLASS_NAME as PATCH_CODEC

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]

_MAX_LATENT_SIDE = 1024  # latent pixels
_MAX_PATCH = 64
_MAX_TIMESTEPS = 100_000
_MAX_FACTOR = 1e6  # of latents, and its inverse
# These make a library store weights, or build layers, in ways that are not checked here.
_UNSUPPORTED = ("quantization_config", "compression_config", "per_layer_config")
# Allowed for buffers that no file holds, such as position ids.
_SPARE_NUMBERS = 2**20


def check_settings(configs: Mapping[str, Config], where: str) -> None:
    """Raises PriorError unless every setting that this program reads has the right type and is in range.

    configs: by component. where: the pipeline's folder, for the messages.
    """
    for component, config in configs.items():
        found = [name for name in _UNSUPPORTED if config.get(name) is not None]
        if found:
            raise PriorError(
                f"the configuration of the {component} in {where} has {found[0]}, which is not supported; use the "
                "original pipeline, in full or half precision"
            )
    _check_unet(_Reader(configs["unet"], f"{where}/unet/config.json"))
    _check_vae(_Reader(configs["vae"], f"{where}/vae/config.json"))
    _check_scheduler(_Reader(configs["scheduler"], f"{where}/scheduler/scheduler_config.json"))


def refuse_larger_than(weights: Weights, config: Config, where: str) -> None:
    """Raises PriorError where a network's configuration has more layers or blocks than its weights have tensors, or a
    negative number of them.

    Building modules takes time and memory even where their tensors take none.
    """
    most = len(weights.headers)
    waiting: list[tuple[str, Any, bool]] = [("", config, False)]
    while waiting:
        key, value, counts = waiting.pop()
        counts = counts or "layer" in key or "depth" in key
        if isinstance(value, Mapping):
            waiting += [(inner, of, counts) for inner, of in value.items()]
        elif isinstance(value, list):
            if len(value) > max(most, 16):
                raise PriorError(f"{where}: {key} has {len(value)} entries, more than there are tensors in the weights")
            waiting += [(key, of, counts) for of in value]
        elif counts and isinstance(value, int) and not 0 <= value <= most:
            raise PriorError(f"{where}: {key} is {shown(value)}; allowed: 0 to {most}, the tensors in its weights")


def check_size(network: torch.nn.Module, weights: Weights, where: str) -> None:
    """Raises PriorError where a network on the meta device is much larger than its weights, before it is allocated."""
    tensors = [*network.parameters(), *network.buffers()]
    wanted = sum(tensor.numel() for tensor in tensors)
    held = sum(math.prod(header.shape) for header in weights.headers.values())
    # Twice: a tensor that two modules share is in the file once.
    if wanted > 2 * held + _SPARE_NUMBERS:
        raise PriorError(
            f"{where} describes a network of {wanted} numbers, but the weights beside it hold {held}; they are from "
            "different models"
        )


@contextmanager
def foreign(what: str, advice: str = "fetch or save the pipeline again") -> Iterator[None]:
    """Turns whatever a library raises in the block into a PriorError: "WHAT: the library's words; ADVICE".

    It catches any Exception, because the libraries do not document what they raise for wrong input. Out of memory and
    device errors are raised unchanged: once `check_size` has passed they are not the pipeline's fault.
    """
    import torch

    # torch before 2.8 has no class for errors of a device.
    device_error = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)
    try:
        yield
    except (DistvsdError, MemoryError, torch.OutOfMemoryError, device_error):
        raise
    except Exception as error:
        raise PriorError(f"{what}: {_one_line(error)}; {advice}") from error
    except BaseException as error:
        # A panic in a library written in Rust: its class cannot be imported, and is not a subclass of Exception.
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise PriorError(f"{what}: {_one_line(error)}; {advice}") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 600 else f"{text[:600]} ..."


class _Reader:
    """Checks the values of one configuration: each method raises PriorError for a wrong type or range."""

    def __init__(self, config: Config, where: str) -> None:
        self.config, self.where = config, where

    def integer(self, key: str, default: int, high: int = 2**31 - 1) -> int:
        value = self.config.get(key, default)
        if not _is_integer(value) or not 1 <= value <= high:
            self.refuse(key, value, f"an integer from 1 to {high}")
        return int(value)

    def integers(self, key: str, default: int | None, high: int = 2**31 - 1) -> None:
        """One integer or a list of them; null where `default` is None."""
        value = self.config.get(key, default)
        if value is None and default is None:
            return
        found = value if isinstance(value, list) and value else [value]
        if not all(_is_integer(one) and 1 <= one <= high for one in found):
            self.refuse(key, value, f"an integer from 1 to {high}, or a list of them")

    def number(self, key: str, default: float | None, low: float = 1 / _MAX_FACTOR) -> None:
        value = self.config.get(key, default)
        if value is None and default is None:
            return
        if not _is_number(value) or not low <= value <= _MAX_FACTOR:
            self.refuse(key, value, f"a number from {low:g} to {_MAX_FACTOR:g}")

    def texts(self, key: str, count: int) -> None:
        value = self.config.get(key)
        if not isinstance(value, list) or len(value) != count or not all(isinstance(one, str) for one in value):
            self.refuse(key, value, f"a list of {count} names, as many as block_out_channels has entries")

    def text(self, key: str) -> None:
        value = self.config.get(key)
        if not isinstance(value, str | None):
            self.refuse(key, value, "a text")

    def blocks(self, key: str) -> int:
        """How many entries a list of integers has."""
        value = self.config.get(key)
        if not isinstance(value, list):
            self.refuse(key, value, "a list with an entry for each block")
        self.integers(key, None)
        return len(value)

    def refuse(self, key: str, value: object, allowed: str) -> NoReturn:
        raise PriorError(f"{self.where}: {key} is {shown(value)}; allowed: {allowed}")


def _check_unet(unet: _Reader) -> None:
    unet.integer("in_channels", 4)
    unet.integer("out_channels", 4)
    unet.integers("sample_size", None, _MAX_LATENT_SIDE)
    unet.integers("time_embedding_dim", None)
    unet.text("mid_block_type")
    blocks = unet.blocks("block_out_channels")
    unet.texts("down_block_types", blocks)
    unet.texts("up_block_types", blocks)
    unet.integers("layers_per_block", 2)
    unet.integers("cross_attention_dim", 1280)
    for key in ("layers_per_block", "cross_attention_dim", "transformer_layers_per_block"):
        value = unet.config.get(key)
        if isinstance(value, list) and len(value) != blocks:
            unet.refuse(key, value, "one integer, or one for each block")


def _check_vae(vae: _Reader) -> None:
    if vae.config.get("_class_name") == PATCH_CODEC:
        vae.integer("patch_size", 0, _MAX_PATCH)
        vae.number("scaling_factor", 0.0)
        vae.number("detail_gain", 1.0)
        return
    vae.integer("latent_channels", 4)
    vae.blocks("block_out_channels")
    vae.number("scaling_factor", 0.18215)
    vae.number("shift_factor", None, -_MAX_FACTOR)


def _check_scheduler(scheduler: _Reader) -> None:
    scheduler.text("_class_name")
    scheduler.text("prediction_type")
    scheduler.integer("num_train_timesteps", 1000, _MAX_TIMESTEPS)
    betas = scheduler.config.get("trained_betas")
    if betas is not None and not (isinstance(betas, list) and betas and all(map(_is_number, betas))):
        scheduler.refuse("trained_betas", betas, "a list of numbers, or null")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
