"""Reads the file of a run that wandb keeps offline, by wandb's own definition of it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def records_of(path: Path) -> Iterator[Any]:
    """The records of an offline run; skips the test where wandb is not installed.

    The file is a log of leveldb after 7 bytes of its own: blocks of 32 KiB, fragments with a header of 7 bytes (sum of
    4, length of 2, kind of 1: whole, first, middle, last).
    """
    definition = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield definition.Record.FromString(whole)
            whole = b""


def history_of(record: Any) -> list[dict[str, Any]]:
    """What one call of `log` sent, by path, if the record is of one."""
    if record.WhichOneof("record_type") != "history":
        return []
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}]
