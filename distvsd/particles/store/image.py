"""The page of a particle: its tensors in one piece of memory, which is byte for byte a safetensors file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Layout:
    """Where each tensor of a page lies. size: bytes of a page, the header of the file among them."""

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        """like: tensors of the names, dtypes and shapes of a page, without values."""
        # The widest first, so that every tensor begins at a multiple of its element; the format orders them so too.
        ordered = sorted(like.items(), key=lambda item: (-item[1].element_size(), item[0]))
        entries, self._places, end = {}, {}, 0
        for name, tensor in ordered:
            begin, end = end, end + math.prod(tensor.shape) * tensor.element_size()
            entries[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            self._places[name] = (slice(begin, end), tensor.dtype, tuple(tensor.shape))
        text = json.dumps(entries, separators=(",", ":")).encode("ascii")
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self.size = len(self._header) + end

    def blank(self, pinned: bool = False) -> Tensor:
        """A new page `[size]` uint8 in host memory, whose tensors have no values yet. pinned: for copies of a GPU."""
        page = torch.empty(self.size, dtype=torch.uint8, pin_memory=pinned)
        page[: len(self._header)] = torch.frombuffer(bytearray(self._header), dtype=torch.uint8)
        return page

    def views(self, page: Tensor) -> dict[str, Tensor]:
        """The tensors of a page by name; they share its memory."""
        data = page[len(self._header) :]
        return {name: data[rows].view(dtype).reshape(shape) for name, (rows, dtype, shape) in self._places.items()}

    def filled(self, page: Tensor, tensors: Mapping[str, Tensor], non_blocking: bool = False) -> Tensor:
        """The page, with the values of these tensors; those that are missing become zeros. Reads only what it holds."""
        for name, place in self.views(page).items():
            if name in tensors:
                place.copy_(tensors[name], non_blocking=non_blocking)
            else:
                place.zero_()
        return page
