"""Reads one model of a pipeline: quietly, from safetensors only, whole, finite, and frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError

from distvsd.errors import PriorError
from distvsd.prior.folder import PipelineFolder


def load_model(
    folder: PipelineFolder, component: str, model_class: Any, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """The model in `folder/component`, in `dtype` on `device`, in eval mode, with no parameter that wants a gradient.

    model_class: a diffusers or transformers model. Raises PriorError for weights that are missing, of another shape, or
    not finite in `dtype`.
    """
    path = folder.path / component
    default = torch.get_default_dtype()
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                path,
                torch_dtype=dtype,  # the name that every supported version of both libraries knows
                local_files_only=True,
                use_safetensors=True,
                variant="fp16" if component in folder.half else None,
                # Both make the libraries list what does not fit instead of stopping with advice for their own callers.
                ignore_mismatched_sizes=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise PriorError(
            f"the {component} in {path} cannot be loaded as a {model_class.__name__}: {_one_line(error)}; "
            "fetch or save the pipeline again"
        ) from error
    finally:
        # diffusers changes torch's default dtype while it builds, and leaves it changed when it fails.
        torch.set_default_dtype(default)
    _check_whole(info, component, folder)
    model = model.to(device).eval().requires_grad_(False)
    _check_finite(model, component, folder, dtype)
    return model  # type: ignore[no-any-return]


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps diffusers and transformers from printing progress bars and advice, once for every rank."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    before = diffusers_log.get_verbosity(), transformers_log.get_verbosity()
    bars = transformers_log.is_progress_bar_enabled()
    diffusers_log.set_verbosity_error()
    transformers_log.set_verbosity(transformers_log.CRITICAL)
    transformers_log.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_log.set_verbosity(before[0])
        transformers_log.set_verbosity(before[1])
        if bars:
            transformers_log.enable_progress_bar()


def _check_whole(info: dict[str, Any], component: str, folder: PipelineFolder) -> None:
    mismatched = [
        f"{name} is {tuple(found)} in the file and {tuple(wanted)} by config.json"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    missing = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    faults = mismatched + missing
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise PriorError(
            f"the weights of the {component} in {folder.path} do not fit its configuration: {', '.join(faults[:3])}"
            f"{more}; config.json and the weights are from different models, or a file was cut short"
        )


def _check_finite(model: torch.nn.Module, component: str, folder: PipelineFolder, dtype: torch.dtype) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinite"
            raise PriorError(
                f"the {component} in {folder.path} has {kind} values in {name}, read as {dtype}; "
                "the file is damaged, or this dtype is too narrow for it (try prior.dtype=float32)"
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
