"""Copies of a state in host memory, which can be written while the caller changes the state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopies:
    """Host memory for one snapshot at a time, reused from save to save.

    Copies of CUDA tensors are in pinned memory, which transfers fast but is slow to allocate; hence the reuse.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def take(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies of the tensors, contiguous on the CPU; waits for their devices.

        Overwrites the copies of the call before, so nobody may still read them. Frees memory of tensors that are gone.
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
