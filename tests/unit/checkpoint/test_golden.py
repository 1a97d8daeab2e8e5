"""A checkpoint that an earlier version wrote, kept as a file: the current version must read it bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from distvsd.checkpoint import Saver, newest, verify_run
from distvsd.parallel.world import World

GOLDEN = Path(__file__).parent / "golden"
# Printed by `distvsd verify --digest` of the version that wrote it.
DIGEST = """\
particle/000000 8d9e8dad359528da85b11a6c91d3cabd33cc23641762229c289973c0a1d3e8b4
particle/000003 1473a326abba5f676d65d48982e7a6c1277e9881af1c2d4917725a1fe3bc5cf6
score/adapter 26c1a7aff1a50085e6535128773f2c1ce62dac7ef72103e1ab55c48e7f1a611a
score/camera a0b185c03c833f22ccd93af8bb12f74bcce1cd7ad9dea32e24ebb51c51a5870a
score/optimizer 0a7aea9d0ac16a82e92475edeb5549d70e9e940235efe352aabcb79a0fae6f92
score/replay 4d0e504a9e33dedc49032c9a5f5a9d7e2d94567736a801cc2e12d802818f281b
all d93b36e09dec4f5223cecc68276eb70311757bd1dbd28e9d15cbf3d655466580
"""


@pytest.mark.guarantee("G36")
def test_a_checkpoint_of_format_1_from_an_earlier_program_is_read_bit_for_bit() -> None:
    """A checkpoint of format 1 written by an earlier version is verified and read, every bit of it."""
    assert "\n".join(verify_run(GOLDEN, digest=True)) + "\n" == DIGEST
    checkpoint = newest(GOLDEN / "checkpoints")
    assert checkpoint is not None
    manifest = checkpoint.manifest
    assert (manifest.step, manifest.world_size, manifest.metrics_bytes, manifest.created) == (
        12,
        1,
        1234,
        "2026-11-23T19:08:10Z",
    )
    assert manifest.config["objective"] == {"t_max": {"0": 0.98, "5000": 0.5}}
    assert manifest.config["prompt"] == "caf\u00e9"
    assert manifest.more == {"health_bytes": 56, "a_key_of_later": [1, None]}
    assert [(entry.id, entry.health) for entry in manifest.particles] == [
        (0, {}),
        (3, {"bad": 1, "total": 4, "restores": 0, "quarantined": False}),
    ]
    state = checkpoint.read("particles/000003.safetensors")
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7 + 3
    assert torch.equal(state["param/grid0"], values) and torch.equal(state["adam_v/grid0"], values.square())
    assert state["adam_step"].item() == 12 and state["occupancy"].tolist() == [True, False]
    assert checkpoint.read("score/camera.safetensors")["0.weight"].dtype == torch.bfloat16
    assert (checkpoint.folder / "score/adapter_config.json").read_text() == '{"r": 2, "lora_alpha": 2}'


def test_a_run_goes_on_from_the_golden_checkpoint_and_leaves_it_as_it_is(tmp_path: Path, world: World) -> None:
    """Opening it for a run, saving beside it and pruning do not touch its bytes."""
    shutil.copytree(GOLDEN, tmp_path / "run")
    saver = Saver(tmp_path / "run/checkpoints", world)
    loaded = saver.load()
    assert loaded is not None
    files = {file: loaded.read(file) for file in loaded.manifest.files if file.endswith(".safetensors")}
    metadata = {"config": loaded.manifest.config, "config_digest": "c", "prior_identity": "p", "metrics_bytes": 0}
    saver.begin(13, files, {"score/adapter_config.json": "{}"}, metadata)
    assert verify_run(tmp_path / "run", digest=True) == DIGEST.splitlines()
    for path in sorted(path for path in GOLDEN.rglob("*") if path.is_file()):
        assert (tmp_path / "run" / path.relative_to(GOLDEN)).read_bytes() == path.read_bytes()
