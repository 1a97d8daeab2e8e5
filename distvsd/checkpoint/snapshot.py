"""Copies of a state in host memory, so that it can be written while the caller goes on changing it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopies:
    """Host memory for one snapshot at a time, kept from save to save: what is saved again has a place already.

    Copies of CUDA tensors lie in pinned memory, so that they come over at the speed of the bus; allocating that is
    slow, which is the reason to keep it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def take(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The tensors as they are now, contiguous on the CPU; waits for the devices they are on.

        The copies taken before are overwritten, so nobody may be reading them any more. Memory of tensors that are not
        there any more is given back.
        """
        buffers = {
            (file, name): self._copy((file, name), tensor)
            for file, tensors in files.items()
            for name, tensor in tensors.items()
        }
        for device in {tensor.device for tensors in files.values() for tensor in tensors.values()}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self._buffers = buffers
        return {file: {name: buffers[file, name] for name in tensors} for file, tensors in files.items()}

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        source = tensor.detach()
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        return buffer.copy_(source, non_blocking=True)
