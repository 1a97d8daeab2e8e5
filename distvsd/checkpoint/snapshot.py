"""Copies of a state in host memory, which can be written while the caller changes the state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor


class OnDemand(Mapping[str, Mapping[str, Tensor]]):
    """Files of a checkpoint by name, whose tensors are fetched when they are asked for and not kept here."""

    def __init__(self, fetch: Mapping[str, Callable[[], Mapping[str, Tensor]]]) -> None:
        self._fetch = dict(fetch)

    def __getitem__(self, file: str) -> Mapping[str, Tensor]:
        return self._fetch[file]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._fetch)

    def __len__(self) -> int:
        return len(self._fetch)


class HostCopies:
    """Host memory for one snapshot at a time, reused from save to save.

    Copies of CUDA tensors are in pinned memory, which transfers fast but is slow to allocate; hence the reuse.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def take(self, files: Iterable[tuple[str, Mapping[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
        """Copies of each file's tensors, contiguous on the CPU; waits for their devices.

        Overwrites the copies of the call before, so nobody may still read them. Frees memory of tensors that are gone.
        """
        copies: dict[str, dict[str, Tensor]] = {}
        devices = set()
        for file, tensors in files:
            copies[file] = {name: self._copy((file, name), tensor) for name, tensor in tensors.items()}
            devices |= {tensor.device for tensor in tensors.values()}
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self._buffers = {(file, name): copy for file, tensors in copies.items() for name, copy in tensors.items()}
        return copies

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        source = tensor.detach()
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        return buffer.copy_(source, non_blocking=True)
