"""Every change of a manifest is found, a hostile manifest is refused, and digests depend on content only."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import pytest
import torch

from distvsd.checkpoint.format import (
    FORMAT,
    FileEntry,
    Manifest,
    NewerFormatError,
    ParticleEntry,
    component,
    content_digest,
    decode_manifest,
    decode_tensors,
    encode_tensors,
    folder_name,
    is_file_name,
    particle_file,
    particle_of,
    step_of,
    whole_digest,
)
from distvsd.errors import CheckpointError

MANIFEST = Manifest(
    step=12,
    config_digest="d",
    config={"t_max": {0: 0.98, 10: 0.5, 9: 1e-15}, "prompt": "caf\u00e9"},
    world_size=2,
    versions={"torch": "2"},
    prior_identity="i",
    files={"particles/000003.safetensors": FileEntry("a" * 64, 5), "score/adapter_config.json": FileEntry("b" * 64, 0)},
    particles=(ParticleEntry(3, "particles/000003.safetensors", {"bad": 1}),),
    components={"particle/000003": "c" * 64},
    metrics_bytes=0,
    created="2026-01-01T00:00:00Z",
    more={"unknown": [1, None]},
)


def signed(content: dict[str, Any]) -> bytes:
    """A manifest with a valid signature, written here from the documentation and not by the code under test."""

    def spell(value: dict[str, Any]) -> bytes:
        return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()

    return spell({**content, "sha256": hashlib.sha256(spell(content)).hexdigest()})


def content() -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(MANIFEST.encode())
    del plain["sha256"]
    return plain


def test_a_manifest_survives_the_round_trip_and_its_spelling_is_the_documented_one() -> None:
    data = MANIFEST.encode()
    read = decode_manifest(data, "m")
    assert read.encode() == data == signed(content())
    assert read.config == {"t_max": {"0": 0.98, "10": 0.5, "9": 1e-15}, "prompt": "caf\u00e9"}
    assert (read.step, read.particles, read.more) == (12, MANIFEST.particles, MANIFEST.more)


@pytest.mark.guarantee("G3")
def test_every_single_flipped_bit_of_a_manifest_is_found() -> None:
    """Every single flipped bit of a manifest is found."""
    data = MANIFEST.encode()
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(CheckpointError, match=r"^m "):
                decode_manifest(bytes(flipped), "m")


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"[" * 100_000, b'{"step":' * 5000, b"\xff\xfe", b"9" * 9999]
)
def test_what_is_no_manifest_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^run/manifest"):
        decode_manifest(data, "run/manifest.json")


def test_truncated_and_padded_manifests_are_found() -> None:
    data = MANIFEST.encode()
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            decode_manifest(data[:length], "m")
    with pytest.raises(CheckpointError):
        decode_manifest(data + b"\n", "m")


HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "particles/../../x.safetensors",
    "particles/..",
    "particles/000003.safetensors/../../x",
    "./particles/000003.safetensors",
    "particles//000003.safetensors",
    "particles/3.safetensors",
    "particles/0000003.safetensors",
    "particles/-00003.safetensors",
    "particles/\u0663\u0663\u0663\u0663\u0663\u0663.safetensors",
    "particles/000003.safetensors\n",
    "particles/000003.pt",
    "score/adapter_model.bin",
    "score/Adapter.safetensors",
    "score/..safetensors",
    "score/a/b.safetensors",
    "score\\camera.safetensors",
    "manifest.json",
    "~/x.json",
    "C:\\x.json",
    "score/\u0000.json",
    "",
    ".",
]


@pytest.mark.guarantee("G32")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_signed_manifest_cannot_name_a_file_outside_the_layout(name: str) -> None:
    """A signed manifest cannot make a reader open a file outside its checkpoint."""
    plain = content()
    plain["files"][name] = {"sha256": "a" * 64, "bytes": 1}
    with pytest.raises(CheckpointError, match=r"^m names the file"):
        decode_manifest(signed(plain), "m")
    assert not is_file_name(name)


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": True},
        {"step": "12"},
        {"step": 2**53 + 1},
        {"health_bytes": "0"},
        {"health_bytes": None},
        {"health_bytes": -1},
        {"world_size": 1.5},
        {"config": []},
        {"versions": {"torch": 2}},
        {"created": None},
        {"metrics_bytes": -1},
        {"files": []},
        {"files": {"particles/000003.safetensors": {"sha256": "A" * 64, "bytes": 5}}},
        {"files": {"particles/000003.safetensors": {"sha256": "a" * 64, "bytes": -5}}},
        {"files": {"particles/000003.safetensors": {"sha256": "a" * 64, "bytes": True}}},
        {"files": {"particles/000003.safetensors": {"sha256": "a" * 64}}},
        {"particles": []},
        {"particles": [{"id": 4, "file": "particles/000003.safetensors", "health": {}}]},
        {"particles": [{"id": 3, "file": "particles/000003.safetensors", "health": {}}] * 2},
        {"particles": [{"id": 3, "file": "particles/000003.safetensors", "health": []}]},
        {"components": {}},
        {"components": {"particle/000003": "short"}},
        {"components": {"particle/000003": "c" * 64, "score/x": "c" * 64}},
        {"format": 0},
        {"format": True},
        {"format": "1"},
    ],
)
def test_a_signed_manifest_with_wrong_content_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"^m "):
        decode_manifest(signed({**content(), **change}), "m")


def test_what_is_nested_too_deeply_to_be_walked_through_is_refused() -> None:
    deep: Any = 0
    for _ in range(300):
        deep = [deep]
    with pytest.raises(CheckpointError, match=r"^m is nested"):
        decode_manifest(signed({**content(), "unknown": deep}), "m")


@pytest.mark.guarantee("G36")
def test_a_newer_format_is_refused_with_what_to_do() -> None:
    """A manifest of a newer format is refused, whatever else it says."""
    with pytest.raises(NewerFormatError, match=f"format {FORMAT + 1}.*upgrade"):
        decode_manifest(signed({**content(), "format": FORMAT + 1, "files": "told otherwise there"}), "m")


def test_values_that_are_not_json_are_refused_when_saving() -> None:
    for value in (float("nan"), float("inf"), object()):
        with pytest.raises(CheckpointError, match="not JSON"):
            Manifest(**{**vars(MANIFEST), "more": {"x": value}}).encode()
    with pytest.raises(CheckpointError, match="own keys"):
        Manifest(**{**vars(MANIFEST), "more": {"sha256": "x"}}).encode()


def test_names_and_their_inverses() -> None:
    assert folder_name(1200) == "step-00001200" and step_of("step-00001200") == 1200
    assert step_of(folder_name(123456789)) == 123456789
    for name in (
        "step-1200",
        "step-000001200",
        "old-step-00001200",
        "step-00001200.bak",
        ".staged-step-00001200-ab",
        "step-",
    ):
        assert step_of(name) is None
    assert particle_file(3) == "particles/000003.safetensors" and particle_of(particle_file(1234567)) == 1234567
    assert component("score/adapter_model.safetensors") == "score/adapter"
    assert component("score/camera.safetensors") == "score/camera"
    assert component(particle_file(7)) == "particle/000007"
    assert component("score/adapter_config.json") is None


def test_the_digest_is_what_its_documentation_says() -> None:
    tensors = {"b": torch.tensor([1.0, -2.0]), "a": torch.tensor(3, dtype=torch.int64)}
    by_hand = (
        b'["a", "int64", []]\n' + struct.pack("<q", 3) + b'["b", "float32", [2]]\n' + struct.pack("<ff", 1.0, -2.0)
    )
    assert content_digest(tensors) == hashlib.sha256(by_hand).hexdigest()
    assert whole_digest({"b": "2", "a": "1"}) == hashlib.sha256(b"a 1\nb 2\n").hexdigest()


def test_the_digest_sees_names_types_shapes_and_bits_and_nothing_else() -> None:
    base = torch.arange(6, dtype=torch.float32)
    digest = content_digest({"x": base, "y": torch.zeros(2)})
    assert digest == content_digest({"y": torch.zeros(2), "x": base.reshape(2, 3).T.contiguous().T.reshape(6)})
    assert content_digest({"x": base.reshape(2, 3).T}) == content_digest({"x": base.reshape(2, 3).T.contiguous()})
    others = [
        {"z": base, "y": torch.zeros(2)},
        {"x": base.reshape(2, 3), "y": torch.zeros(2)},
        {"x": base.to(torch.float64), "y": torch.zeros(2)},
        {"x": base.view(torch.int32), "y": torch.zeros(2)},
        {"x": base, "y": torch.tensor([0.0, -0.0])},
        {"x": base},
    ]
    assert len({digest, *map(content_digest, others)}) == 1 + len(others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensor_files_keep_every_bit_of_views_scalars_and_empty_tensors(dtype: torch.dtype) -> None:
    batch = torch.arange(24).reshape(4, 6).to(dtype)
    tensors = {
        "row": batch[1],
        "column": batch[:, 2],
        "scalar": batch[0, 1],
        "none": batch[:0],
        "same": batch,
        "twin": batch,
    }
    read = decode_tensors(encode_tensors(tensors, "f"), "f")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == dtype for name in tensors)
    assert content_digest(read) == content_digest(tensors)


def test_a_file_that_is_not_safetensors_is_refused_by_name() -> None:
    sound = encode_tensors({"x": torch.ones(3)}, "f")
    for data in (b"", b"\x80\x04pickle", sound[:-1], sound + b"\0", b"\xff" * 64):
        with pytest.raises(CheckpointError, match=r"^run/f "):
            decode_tensors(data, "run/f")


def test_parameters_that_require_gradients_are_saved_as_plain_values() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    assert torch.equal(decode_tensors(encode_tensors({"p": parameter}, "f"), "f")["p"], torch.ones(2))
    assert content_digest({"p": parameter}) == content_digest({"p": torch.ones(2)})
