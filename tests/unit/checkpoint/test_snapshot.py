"""A snapshot holds the state of one moment, whatever changes afterwards, and reuses its memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.checkpoint.snapshot import HostCopies
from distvsd.checkpoint.writer import Writer
from distvsd.errors import CheckpointError

FILE = "particles/000000.safetensors"


def places(copies: dict[str, dict[str, Tensor]]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in copies[FILE].items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_a_snapshot_has_every_bit_and_shares_no_memory(dtype: torch.dtype) -> None:
    batch = torch.arange(24).reshape(4, 6).to(dtype)
    tensors = {"row": batch[1], "column": batch[:, 2], "turned": batch.T, "scalar": batch[0, 1], "none": batch[:0]}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    copies = HostCopies().take({FILE: tensors}.items())[FILE]
    batch.zero_()
    assert all(torch.equal(copies[name], expected[name]) for name in tensors)
    assert all(copy.is_contiguous() and copy.dtype == dtype for copy in copies.values())


def test_tensors_that_share_memory_are_copied_apart() -> None:
    values = torch.ones(4)
    copies = HostCopies().take({FILE: {"same": values, "twin": values, "part": values[1:]}}.items())[FILE]
    copies["same"].zero_()
    assert copies["twin"].tolist() == [1.0] * 4 and copies["part"].tolist() == [1.0] * 3


def test_parameters_are_copied_without_their_graph() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    copy = HostCopies().take({FILE: {"param": parameter, "used": parameter * 2}}.items())[FILE]
    assert not copy["param"].requires_grad and copy["used"].tolist() == [2.0, 2.0]


def test_the_next_snapshot_uses_the_same_memory_where_the_shape_is_the_same() -> None:
    copies = HostCopies()
    before = {"kept": torch.zeros(1000), "grown": torch.zeros(10), "gone": torch.zeros(5)}
    first = places(copies.take({FILE: before}.items()))
    second = copies.take({FILE: {"kept": torch.ones(1000), "grown": torch.ones(20)}}.items())
    assert places(second)["kept"] == first["kept"]
    assert second[FILE]["kept"].min() == 1 and second[FILE]["grown"].shape == (20,)


def test_a_stream_may_hand_out_the_same_memory_for_one_file_after_the_other() -> None:
    """A store that keeps its particles off the device may have room there for only one."""
    room = torch.zeros(3)

    def stream() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for value in (1.0, 2.0):
            room.fill_(value)
            yield f"particles/00000{int(value)}.safetensors", {"param/x": room}

    copies = HostCopies().take(stream())
    assert [tensors["param/x"].tolist() for tensors in copies.values()] == [[1.0] * 3, [2.0] * 3]


def test_a_writer_gives_what_its_work_gave() -> None:
    assert Writer(lambda: {"entries": 3}).result() == {"entries": 3}


def test_what_a_writer_met_is_raised_to_who_asks() -> None:
    def work() -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    writer = Writer(work)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            writer.result()
    assert not writer.is_busy


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_writer_that_was_ended_has_no_result() -> None:
    def work() -> dict[str, Any]:
        raise SystemExit(3)  # ends a thread silently

    with pytest.raises(CheckpointError, match="writer"):
        Writer(work).result()
