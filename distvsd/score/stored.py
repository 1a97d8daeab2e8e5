"""What a checkpoint must hold of the score network for a resume: one definition, for reading it and for verifying it.

Other tensors are ignored: a run whose network reads no cameras resumes from a checkpoint that holds a camera embedding
and its moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distvsd.errors import PriorError
from distvsd.networks.unet import TIME_EMBEDDING, UNet
from distvsd.score.camera import CAMERA_FEATURES
from distvsd.vsd.wanted import MOST, Wanted, refuse_misfits

ADAPTER_FILE = "score/adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "score/adapter_config.json"
CAMERA_FILE = "score/camera.safetensors"
OPTIMIZER_FILE = "score/optimizer.safetensors"
REPLAY_FILE = "score/replay.safetensors"

Shapes = Mapping[str, Sequence[int]]

_EXACT_STEPS = 2**24  # AdamW counts its steps in float32, where adding 1 has no effect from here on
_PREFIX = "base_model.model."  # of peft, before the name of the module
_NAMES = {ADAPTER_FILE: "the adapter", CAMERA_FILE: "the camera embedding", OPTIMIZER_FILE: "the optimiser"}
_ADVICE = (
    "the checkpoint was altered, or written with another prior or score.rank: resume with the configuration that it "
    "was saved with, or delete this checkpoint to go on from an older one"
)


def place(name: str) -> tuple[str, str]:
    """The file a trainable parameter is saved in, and its name there."""
    if name.startswith("camera."):
        return CAMERA_FILE, name.removeprefix("camera.")
    return ADAPTER_FILE, name


def network_files(trainable: Shapes) -> list[str]:
    """The files that hold a network with these trainable parameters, and its optimiser."""
    return sorted({place(name)[0] for name in trainable} | {OPTIMIZER_FILE})


def files_of(trainable: Shapes) -> list[str]:
    """The files of `score/` that a resume reads: none where no score network is trained."""
    return sorted([*network_files(trainable), REPLAY_FILE]) if trainable else []


def refuse_unfit(file: str, trainable: Shapes, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError where adapter, camera embedding or optimiser do not fit the network.

    trainable: shapes by name, see `Score.trainable`; all float32. Parameters and first moments must be finite: a run
    leaves out every step that would make them non-finite, and with non-finite parameters it would leave out all steps.
    """
    if file == OPTIMIZER_FILE:
        _refuse_optimizer(trainable, tensors)
        return
    places = {name: place(name) for name in trainable}
    wanted = {
        stored_as: Wanted(torch.float32, tuple(trainable[name]), finite=True)
        for name, (home, stored_as) in places.items()
        if home == file
    }
    refuse_misfits(_NAMES[file], wanted, tensors, _ADVICE)


def _refuse_optimizer(trainable: Shapes, tensors: Mapping[str, Tensor]) -> None:
    counts = {"num_steps": Wanted(torch.int64, (), 0, MOST)}
    if "left_out" in tensors:  # older checkpoints lack it
        counts["left_out"] = Wanted(torch.int64, (), 0, MOST)
    refuse_misfits(_NAMES[OPTIMIZER_FILE], counts, tensors, _ADVICE)
    steps = int(tensors["num_steps"])
    if not steps:
        return  # no moments yet
    most = float(torch.tensor(float(steps), dtype=torch.float32))
    wanted = {}
    for name, shape in trainable.items():
        wanted[f"{name}.step"] = Wanted(torch.float32, (), min(steps, _EXACT_STEPS), most)
        wanted[f"{name}.exp_avg"] = Wanted(torch.float32, tuple(shape), finite=True)
        wanted[f"{name}.exp_avg_sq"] = Wanted(torch.float32, tuple(shape), low=0)
    refuse_misfits(_NAMES[OPTIMIZER_FILE], wanted, tensors, _ADVICE)


def trainable_of(unet: Shapes, rank: int, reads_cameras: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of what `LoraScore` trains for a UNet whose tensors have the shapes `unet`.

    Raises PriorError for tensors that are not those of such a UNet.
    """
    if not unet.get(TIME_EMBEDDING):
        raise PriorError(f"the UNet's files hold no {TIME_EMBEDDING}; fetch or save the prior again")
    shapes: dict[str, tuple[int, ...]] = {}
    for module, (rows, columns) in sorted(_adapted(unet).items()):
        shapes[f"{_PREFIX}{module}.lora_A.weight"] = (rank, columns)
        shapes[f"{_PREFIX}{module}.lora_B.weight"] = (rows, rank)
    if reads_cameras:
        width = unet[TIME_EMBEDDING][0]
        shapes |= {"camera.first.weight": (width, CAMERA_FEATURES), "camera.first.bias": (width,)}
        shapes |= {"camera.last.weight": (width, width), "camera.last.bias": (width,)}
    return shapes


def _adapted(unet: Shapes) -> dict[str, tuple[int, int]]:
    """The linear layers that get an adapter, as peft finds them: by the end of their names."""
    names = tuple(f".{target}.weight" for target in UNet.lora_targets)
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in unet.items()
        if name.endswith(names) and len(shape) == 2
    }


def unet_like(adapter: Mapping[str, Tensor], camera: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the UNet that these files would fit, for use without the prior.

    With `trainable_of` it checks the files against each other: every layer has both factors, of the configured rank.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in adapter:
        module, lora, _ = name.removeprefix(_PREFIX).rpartition(".lora_")
        if lora:
            down, up = (adapter.get(f"{_PREFIX}{module}.lora_{factor}.weight") for factor in "AB")
            columns = down.shape[-1] if down is not None and down.ndim else 1
            shapes[f"{module}.weight"] = (up.shape[0] if up is not None and up.ndim else 1, columns)
    bias = camera.get("first.bias")
    shapes[TIME_EMBEDDING] = (bias.shape[0] if bias is not None and bias.ndim else 1, 1)
    return shapes
