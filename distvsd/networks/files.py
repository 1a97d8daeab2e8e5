"""Reads the untrusted files of a pipeline: only regular files, JSON of limited size and depth, safetensors weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from distvsd.errors import PriorError

_MAX_TEXT_BYTES = 64 * 2**20  # of a configuration, an index or a tokenizer file
_MAX_DEPTH = 64  # of JSON; later code walks it recursively
_SUFFIX = ".safetensors"
# Without the narrow dtypes of quantised networks, which need special kernels.
_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
# A PEFT adapter beside the weights, which transformers would apply to them.
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


class Header(NamedTuple):
    """A tensor's entry in the header of a weight file. dtype: as safetensors names it ("F16")."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Weights:
    """The weight files of one component, by the names that a library expects.

    index: None for one file; else the name of the index, and the file of each tensor.
    """

    files: dict[str, Path]
    index: tuple[str, dict[str, str]] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values())

    @cached_property
    def headers(self) -> dict[str, Header]:
        """The header of each tensor, by name. Raises PriorError where a file is not a valid safetensors file or has an
        unsupported dtype, where two files hold the same tensor, and where files and index differ."""
        found: dict[str, Header] = {}
        for file in self.files.values():
            for key, header in _headers(file):
                if header.dtype not in _DTYPES:
                    raise PriorError(
                        f"{file} holds {shown(key)} as {header.dtype}, which is not supported; use a pipeline in full "
                        "or half precision"
                    )
                if key in found:
                    raise PriorError(f"{file} holds {shown(key)}, as another file beside it does; remove one")
                found[key] = header
        # A library counts every tensor in the index as loaded; one that no file holds would stay random.
        unlike = [] if self.index is None else sorted(self.index[1].keys() ^ found.keys())
        if unlike:
            raise PriorError(
                f"{', '.join(map(str, self.files.values()))} and their index do not hold the same tensors: "
                f"{shown(unlike[0])} is in only one of them ({len(unlike)} such); fetch or save the pipeline again"
            )
        return found


def is_file(path: Path) -> bool:
    """Whether it is a regular file, or a link to one: the Hugging Face hub's cache consists of links."""
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def is_folder(path: Path) -> bool:
    """Whether it is a folder, or a link to one; False where the path cannot be looked up."""
    try:
        return path.is_dir()
    except OSError:
        return False


def fault_of(path: Path) -> str:
    """What is wrong with a `path` that is not a regular file."""
    return "not a regular file" if os.path.lexists(path) else "missing"


def shown(value: object) -> str:
    """A foreign value for a message: short, ASCII, on one line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({type(value).__name__})"


def check_length(path: Path) -> None:
    """Raises PriorError for a configuration or tokenizer file of more than _MAX_TEXT_BYTES."""
    length = path.stat().st_size
    if length > _MAX_TEXT_BYTES:
        raise PriorError(f"{path} has {length} bytes; a file of its kind has at most {_MAX_TEXT_BYTES}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises PriorError for anything else, and for one that is too large or too deep."""
    try:
        check_length(path)
        value = json.loads(path.read_bytes().decode("utf-8"))
    # ValueError: bytes that are no UTF-8, text that is no JSON, an integer of thousands of digits.
    except (OSError, ValueError, RecursionError) as error:
        raise PriorError(f"{path} cannot be read as JSON ({error}); fetch or save the pipeline again") from error
    if not isinstance(value, dict):
        raise PriorError(f"{path} holds a {type(value).__name__} where an object is expected")
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
    if level:
        raise PriorError(f"{path} is nested more than {_MAX_DEPTH} deep; fetch or save the pipeline again")
    return value


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def find_weights(folder: Path, stem: str) -> Weights:
    """The weights in a component's folder: `stem`.safetensors or its shards, in full precision or the fp16 variant.

    Raises PriorError where they are missing, not safetensors, or where it is not clear which files are meant.
    """
    adapters = [name for name in _ADAPTERS if os.path.lexists(folder / name)]
    if adapters:
        raise PriorError(
            f"{folder} holds an adapter beside its weights ({', '.join(adapters)}), which is not supported; merge it "
            "into the weights and save the pipeline again, or remove it"
        )
    for variant in ("", ".fp16"):
        whole, index = folder / f"{stem}{variant}{_SUFFIX}", folder / f"{stem}{_SUFFIX}.index{variant}.json"
        if os.path.lexists(whole) and os.path.lexists(index):
            raise PriorError(
                f"{folder} holds its weights twice, whole in {whole.name} and in parts by {index.name}, and libraries "
                "differ in which they take; remove one of the two"
            )
        if is_file(whole):
            return Weights({f"{stem}{_SUFFIX}": whole})
        if is_file(index):
            return _shards(index, f"{stem}{_SUFFIX}.index.json")
    whole = folder / f"{stem}{_SUFFIX}"
    pickles = sorted(file.name for pattern in ("*.bin", "*.ckpt", "*.pt") for file in folder.glob(pattern))
    if pickles:
        raise PriorError(
            f"{folder} has its weights only as {', '.join(pickles)}, a pickle, which can run code when it is read; "
            f"convert it to {whole.name} with save_pretrained(..., safe_serialization=True)"
        )
    raise PriorError(f"{whole} is {fault_of(whole)}: {folder.parent} is not a whole pipeline; fetch or save it again")


def _shards(index: Path, name: str) -> Weights:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise PriorError(f"{index} lists no weight files (weight_map); fetch or save the pipeline again")
    for file in places.values():
        if not _is_plain(file):
            raise PriorError(
                f"{index} names {shown(file)} as a weight file; only {_SUFFIX} files in its own folder are read, "
                "because others can run code or lie anywhere; save the pipeline with safe_serialization=True"
            )
    files = {file: index.parent / file for file in sorted(set(places.values()))}
    absent = [f"{file} ({fault_of(path)})" for file, path in files.items() if not is_file(path)]
    if absent:
        raise PriorError(f"{index} lists weight files that are not there: {', '.join(absent)}")
    return Weights(files, (name, places))


def _is_plain(name: object) -> bool:
    """Whether it is the bare name of a safetensors file, without a folder."""
    return isinstance(name, str) and name.isprintable() and Path(name).name == name and name.endswith(_SUFFIX)


def _headers(file: Path) -> list[tuple[str, Header]]:
    try:
        with safe_open(file, "np") as tensors:  # numpy: reads the header and maps nothing
            parts = [(key, tensors.get_slice(key)) for key in tensors.keys()]  # noqa: SIM118 - not a dict
            return [(key, Header(tuple(part.get_shape()), part.get_dtype())) for key, part in parts]
    except (SafetensorError, OSError, MemoryError) as error:  # MemoryError: longer than this process may map
        raise PriorError(
            f"{file} cannot be read as safetensors ({error}); it is damaged, cut short or of another format: fetch or "
            "save the pipeline again"
        ) from error
