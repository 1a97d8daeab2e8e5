"""`verify --digest` depends on the state alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from distvsd.checkpoint import Saver, content_digest, verify_run
from distvsd.checkpoint.format import whole_digest
from distvsd.errors import CheckpointError
from distvsd.parallel.world import World

Save = Callable[..., Path]


def test_the_digest_names_each_component_and_ends_with_the_whole(
    save: Save, tmp_path: Path, state: Callable[..., dict[str, dict[str, Tensor]]]
) -> None:
    save(4, 5)
    files = state(3, 5)
    expected = {
        "particle/000000": content_digest(files["particles/000000.safetensors"]),
        "particle/000001": content_digest(files["particles/000001.safetensors"]),
        "particle/000002": content_digest(files["particles/000002.safetensors"]),
        "score/adapter": content_digest(files["score/adapter_model.safetensors"]),
        "score/camera": content_digest(files["score/camera.safetensors"]),
        "score/optimizer": content_digest(files["score/optimizer.safetensors"]),
        "score/replay": content_digest(files["score/replay.safetensors"]),
    }
    lines = verify_run(tmp_path, digest=True)
    assert lines == [f"{name} {digest}" for name, digest in expected.items()] + [f"all {whole_digest(expected)}"]
    assert all(re.fullmatch(r"[a-z]+(/[a-z0-9]+)? [0-9a-f]{64}", line) for line in lines)


def test_equal_states_have_equal_digests_whatever_the_run_was_called_or_configured(
    world: World, tmp_path: Path, state: Callable[..., dict[str, dict[str, Tensor]]], metadata: dict[str, Any]
) -> None:
    for name in ("first", "second"):
        changed = {**metadata, "config": {"run": {"dir": name}}, "config_digest": name, "metrics_bytes": len(name)}
        Saver(tmp_path / name / "checkpoints", world).begin(5, state(2, 5), {}, changed)
    assert verify_run(tmp_path / "first", digest=True) == verify_run(tmp_path / "second", digest=True)


def test_one_changed_bit_of_a_tensor_changes_its_component_and_the_whole_only(
    world: World, tmp_path: Path, state: Callable[..., dict[str, dict[str, Tensor]]], metadata: dict[str, Any]
) -> None:
    files = state(2, 5)
    Saver(tmp_path / "a" / "checkpoints", world).begin(5, files, {}, metadata)
    files["particles/000001.safetensors"]["param/grid0"][0, 0] *= -1
    Saver(tmp_path / "b" / "checkpoints", world).begin(5, files, {}, metadata)
    pairs = zip(verify_run(tmp_path / "a", digest=True), verify_run(tmp_path / "b", digest=True), strict=True)
    assert [one.split()[0] for one, other in pairs if one != other] == ["particle/000001", "all"]


def test_a_digest_the_files_do_not_have_is_refused_even_when_signed(save: Save, tmp_path: Path) -> None:
    import hashlib

    path = save(5) / "manifest.json"
    content = json.loads(path.read_bytes())
    del content["sha256"]
    content["components"]["score/camera"] = "0" * 64
    spelled = json.dumps(content, sort_keys=True, indent=1) + "\n"
    content["sha256"] = hashlib.sha256(spelled.encode()).hexdigest()
    path.write_text(json.dumps(content, sort_keys=True, indent=1) + "\n")
    with pytest.raises(CheckpointError, match="score/camera"):
        verify_run(tmp_path, digest=True)


def test_the_manifest_says_where_the_state_came_from(save: Save) -> None:
    content = json.loads((save(5) / "manifest.json").read_text())
    assert (content["format"], content["step"], content["world_size"], content["metrics_bytes"]) == (1, 5, 1, 17)
    assert content["config"]["objective"] == {"t_max": {"0": 0.98, "5000": 0.5}}
    assert content["particles"][1] == {"id": 1, "file": "particles/000001.safetensors", "health": {"bad_steps": 2}}
    assert content["tool"] == "kept, though the format does not know it"
    assert {"python", "torch", "safetensors"} <= content["versions"].keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", content["created"])
