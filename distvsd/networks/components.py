"""Loads one component of a pipeline, frozen, from the listed files only; its weights must be complete and finite.

A library chooses for itself among the files of a folder: shards before a whole file, an adapter, a variant. So it is
given a temporary folder with only the files that are checked and hashed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distvsd.errors import PriorError, RunError
from distvsd.networks.files import Weights, read_json
from distvsd.networks.folder import PipelineFolder
from distvsd.networks.settings import check_size, foreign

# Settings of transformers that name other files or other code, or how the weights are to be stored.
_NOT_TAKEN = {
    *("dtype", "torch_dtype", "attn_implementation", "experts_implementation", "distributed_config", "fusion_config"),
    *("kernel_config", "use_kernels", "transformers_weights", "configuration_files", "auto_map", "name_or_path"),
}
# Settings files of a tokenizer; they may name further files by any path.
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


def load_model(
    folder: PipelineFolder,
    component: str,
    model_class: Any,
    dtype: torch.dtype,
    device: torch.device,
    trial: Callable[[Any], object] = lambda network: None,
) -> torch.nn.Module:
    """The model in `folder/component`, in `dtype` on `device`, in eval mode, with requires_grad off.

    model_class: a diffusers or transformers model. trial: calls the network once on a small input, on the network's own
    device, to show that its configuration can be run. Raises PriorError for a configuration that cannot be built or
    does not pass the trial, and for weights that are missing, of another shape, or not finite in `dtype`.
    """
    weights, settings = folder.weights[component], folder.settings(component)
    where = f"the {component} in {folder.path / component}"
    library = f"{where} cannot be loaded as a {model_class.__name__}"
    default = torch.get_default_dtype()
    try:
        with (
            foreign(library),
            _staged(weights.files, {"config.json": _taken(settings)} | _index(weights)) as path,
            quiet(),
        ):
            with torch.device("meta"), torch.no_grad():
                network = _skeleton(model_class, path)
                check_size(network, weights, where)
            model, info = model_class.from_pretrained(
                path,
                torch_dtype=dtype,  # the name that every supported version of both libraries accepts
                local_files_only=True,
                use_safetensors=True,
                # With these two, the libraries list what does not fit instead of raising an error of their own.
                ignore_mismatched_sizes=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    finally:
        # diffusers changes torch's default dtype while it builds, and leaves it changed when it fails.
        torch.set_default_dtype(default)
    _check_whole(info, component, folder)
    model = model.to(device).eval().requires_grad_(False)
    _check_finite(model, component, folder, dtype)
    # CPUs compute in half precision slowly or not at all; there the trial runs on the meta device, without weights.
    is_slow = device.type == "cpu" and dtype != torch.float32
    with foreign(library), torch.no_grad():
        trial(network.to(dtype).eval() if is_slow else model)
    return model  # type: ignore[no-any-return]


def load_tokenizer(folder: PipelineFolder) -> Any:
    """The tokenizer, of the class that its files name. Raises PriorError where it cannot be loaded."""
    from transformers import AutoTokenizer

    settings = {name: folder.tokenizer[name] for name in _TOKENIZER_SETTINGS if name in folder.tokenizer}
    others = {name: file for name, file in folder.tokenizer.items() if name not in settings}
    texts = {
        # `init_inputs`: positional arguments, which may also be paths.
        name: {key: value for key, value in read_json(file).items() if "_file" not in key and key != "init_inputs"}
        for name, file in settings.items()
    }
    where = f"the tokenizer in {folder.path / 'tokenizer'} cannot be loaded"
    with foreign(where), _staged(others, texts) as path, quiet():
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps diffusers and transformers from printing progress bars and advice, which every rank would repeat."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    before = diffusers_log.get_verbosity(), transformers_log.get_verbosity()
    barred = [log for log in (diffusers_log, transformers_log) if log.is_progress_bar_enabled()]
    diffusers_log.set_verbosity_error()
    transformers_log.set_verbosity(transformers_log.CRITICAL)
    for log in barred:
        log.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_log.set_verbosity(before[0])
        transformers_log.set_verbosity(before[1])
        for log in barred:
            log.enable_progress_bar()


@contextmanager
def _staged(files: Mapping[str, Path], texts: Mapping[str, Any]) -> Iterator[Path]:
    """A temporary folder for the block: links to `files`, and `texts` written as JSON, both by name."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="distvsd-prior-")
        for name, file in files.items():
            (Path(folder.name) / name).symlink_to(file.resolve())
        for name, value in texts.items():
            (Path(folder.name) / name).write_text(json.dumps(value), encoding="utf-8")
    except OSError as error:
        raise RunError(f"no temporary folder can be made ({error}); set TMPDIR to a folder with room") from error
    with folder:
        yield Path(folder.name)


def _index(weights: Weights) -> dict[str, Any]:
    if weights.index is None:
        return {}
    name, places = weights.index
    return {name: {"metadata": {}, "weight_map": places}}


def _taken(settings: Any) -> Any:
    """The settings without the keys in _NOT_TAKEN, at any depth."""
    if isinstance(settings, dict):
        return {key: _taken(value) for key, value in settings.items() if key not in _NOT_TAKEN}
    return [_taken(value) for value in settings] if isinstance(settings, list) else settings


def _skeleton(model_class: Any, path: Path) -> Any:
    """The network that `path/config.json` describes, without weights, on the current default device."""
    if hasattr(model_class, "load_config"):  # of diffusers
        return model_class.from_config(model_class.load_config(path, local_files_only=True))
    return model_class(model_class.config_class.from_pretrained(path, local_files_only=True))


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
