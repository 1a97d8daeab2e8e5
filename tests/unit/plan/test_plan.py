"""The plan's numbers, worked out by hand and compared with what the program itself makes."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from distvsd.config import Config, Schedule, ScoreConfig, StageConfig
from distvsd.errors import ConfigError
from distvsd.networks.base import LatentSpace
from distvsd.networks.unet import UNet
from distvsd.parallel.assign import owners
from distvsd.particles.base import Cost
from distvsd.particles.good import most_copies
from distvsd.plan.plan import make_plan
from distvsd.plan.prior import prior_sizes
from distvsd.plan.text import amount, draw
from distvsd.run.parts import make_ensemble
from distvsd.run.planned import plan_run
from distvsd.vsd.objectives import VSD
from distvsd.vsd.process import Diffusion
from distvsd.vsd.samples import Samples

UNET = {
    "sample_size": 16,
    "in_channels": 48,
    "out_channels": 48,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


ROOT = Path(__file__).parents[3]
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@cache
def unet_weights(depths: Any) -> bytes:
    """The weight file of a UNet of that configuration; its values are zeros, which a plan must not read."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET, transformer_layers_per_block=depths)
    return save({name: torch.zeros(value.shape) for name, value in unet.state_dict().items()})


@pytest.fixture
def prior(tmp_path: Path) -> str:
    """A pipeline's configuration and weight files; of the latter a plan must read only the headers."""
    files: dict[str, Any] = {
        "model_index.json": {"text_encoder": ["transformers", "CLIPTextModel"]},
        "unet/config.json": {"_class_name": "UNet2DConditionModel", **UNET},
        "vae/config.json": {"_class_name": "PatchCodec", "patch_size": 4, "scaling_factor": 1.0},
        "text_encoder/config.json": {},
        "scheduler/scheduler_config.json": {},
        "tokenizer/tokenizer.json": {},
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / UNET_FILE).write_bytes(unet_weights(1))
    (tmp_path / "text_encoder" / "model.safetensors").write_bytes(b"x" * 24)
    return str(tmp_path)


def config(prior: str, **sections: dict[str, Any]) -> Config:
    default = Config()
    changed = {name: replace(getattr(default, name), **values) for name, values in sections.items()}
    return replace(default, **{"prior": replace(default.prior, path=prior), **changed})


def test_particles_go_to_ranks_contiguously_and_the_first_get_one_more(prior: str) -> None:
    plan = plan_run(config(prior, particles={"count": 7}), nodes=3, gpus_per_node=1)
    assert plan["owners"] == [{"ranks": [0, 0], "first": 0, "each": 3}, {"ranks": [1, 2], "first": 3, "each": 2}]


@pytest.mark.parametrize(("particles", "world"), [(1, 1), (7, 3), (6, 3), (2, 5), (16, 16), (17, 16), (100, 30)])
def test_the_rows_of_owners_are_the_owners(prior: str, particles: int, world: int) -> None:
    rows = plan_run(config(prior, particles={"count": particles}), nodes=world)["owners"]
    expected = owners(particles, world)
    told = [
        list(range(row["first"] + offset * row["each"], row["first"] + (offset + 1) * row["each"]))
        for row in rows
        for offset in range(row["ranks"][1] - row["ranks"][0] + 1)
    ]
    assert told == expected


@pytest.mark.parametrize("nodes", [1, 10**6, 10**30])
def test_a_plan_of_any_size_takes_the_time_and_the_room_of_a_small_one(prior: str, nodes: int) -> None:
    points = tuple((round, 64.0 + 8 * (round % 3)) for round in range(1000))
    run = config(
        prior,
        particles={"count": 2**31 - 1, "views": 10**9},
        schedule={"rounds": 10**9},
        checkpoint={"every": 1},
        score={"replay_rounds": 10**9, "replay_share": 0.99, "steps_per_round": 10**9},
        render={"resolution": Schedule(points)},
    )
    tracemalloc.start()
    try:
        plan = plan_run(run, nodes, 1024)
        text = draw(plan)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
    assert plan["idle_ranks"] == max(0, 1024 * nodes - (2**31 - 1))
    assert len(text.splitlines()) < 80 and max(map(len, text.splitlines())) < 400
    assert "more, the last from round 999" in text
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan


@given(st.integers(1, 400), st.integers(0, 120))
def test_a_checkpoint_holds_a_particle_twice_where_a_save_falls_between_two_good_states(
    rounds: int, every: int
) -> None:
    """Compared with a simulation: good states after every 50 rounds, saves after every `every` and at the end."""
    saves = [done for done in range(1, rounds + 1) if done == rounds or (every and done % every == 0)]
    between = [done for done in saves if done > 50 and done % 50]
    assert most_copies(rounds, every, 50) == (2 if between else 1)


def test_the_copies_of_a_run_of_any_length_are_counted_at_once() -> None:
    assert (most_copies(10**30, 1, 50), most_copies(10**30, 50, 50), most_copies(10**30 + 1, 50, 50)) == (2, 1, 2)


def test_ranks_without_particles_are_counted(prior: str) -> None:
    plan = plan_run(config(prior, particles={"count": 2}), nodes=1, gpus_per_node=4)
    assert plan["idle_ranks"] == 2
    assert "2 ranks own no particle" in draw(plan)


def test_many_ranks_are_shown_by_node(prior: str) -> None:
    text = draw(plan_run(config(prior, particles={"count": 100}), nodes=16, gpus_per_node=8))
    lines = [line.split() for line in text.splitlines() if line.startswith("  node ")]
    # 128 ranks, the first 100 with a particle each: 12 full nodes, 4 particles on the next, none on the last three.
    assert len(lines) == 16
    assert lines[1] == ["node", "1", "ranks", "8-15", "particles", "8-15", "(8)"]
    assert lines[12] == ["node", "12", "ranks", "96-103", "particles", "96-99", "(4)"]
    assert lines[15] == ["node", "15", "ranks", "120-127", "particles", "none", "(0)"]
    many = draw(plan_run(config(prior, particles={"count": 100}), nodes=20, gpus_per_node=8))
    assert "... and 4 more nodes, the last with 0 particles" in many


@pytest.mark.parametrize("background", ["learned", "none"])
def test_the_count_is_what_a_radiance_field_really_has(background: Literal["learned", "none"]) -> None:
    nerf = replace(
        Config().particles.nerf,
        levels=3,
        base_resolution=4,
        max_resolution=19,
        log2_table_size=10,
        background=background,
    )
    run = replace(Config(), particles=replace(Config().particles, nerf=nerf))
    ensemble = make_ensemble(run, None, [0], "cpu")
    made = sum(parameter.numel() for parameter in ensemble.parameters_of(0).values())
    assert plan_run(run)["particle"]["parameters"] == made


@pytest.mark.parametrize(("space", "parameters"), [("pixel", 3 * 64 * 64), ("latent", 48 * 16 * 16)])
def test_an_image_has_its_pixels_or_its_latents(prior: str, space: Literal["pixel", "latent"], parameters: int) -> None:
    image = replace(Config().particles.image, space=space)
    plan = plan_run(config(prior, particles={"kind": "image", "image": image}))
    assert plan["particle"]["parameters"] == parameters


def test_a_particle_in_training_is_its_values_gradient_and_two_moments(prior: str) -> None:
    particle = plan_run(config(prior, particles={"kind": "image"}))["particle"]
    size = 3 * 64 * 64 * 4
    assert (particle["values"], particle["gradient"], particle["moments"]) == (size, size, 2 * size)
    assert particle["training"] == 4 * size


def test_the_adapter_is_counted_layer_by_layer(prior: str) -> None:
    # Transformer blocks, all of width 64: one in the down block, two in the up block (one more than layers), one in
    # the middle. Each: self-attention 4 layers 64 -> 64; cross-attention q and out 64 -> 64, k and v 24 -> 64.
    one = 4 * (64 + 64) + 2 * (64 + 64) + 2 * (24 + 64)
    assert plan_run(config(prior, score={"rank": 3}))["prior"]["adapter_parameters"] == 4 * 3 * one


def test_a_network_whose_file_cannot_be_read_is_told_and_not_guessed(prior: str) -> None:
    (Path(prior) / UNET_FILE).write_bytes(b"x" * 1000)
    plan = plan_run(config(prior))
    assert "safetensors" in plan["prior"]["problem"] and plan["prior"]["adapter_parameters"] is None


@pytest.mark.parametrize("depths", [1, (1, 2)])
def test_the_counts_are_what_the_score_network_really_has(prior: str, depths: Any) -> None:
    from diffusers import UNet2DConditionModel

    from distvsd.score.adapter import adapted, adapter_parameters

    (Path(prior) / UNET_FILE).write_bytes(unet_weights(depths))
    process = Diffusion(torch.linspace(0.9, 0.1, 10), "epsilon")
    network = UNet2DConditionModel(**UNET, transformer_layers_per_block=depths)
    base = UNet(network, LatentSpace(4, 8, 64), process, torch.float32)
    model, camera = adapted(base, ScoreConfig(rank=3), 0, True, "cpu")
    counted = plan_run(config(prior, score={"rank": 3}))["prior"]
    assert counted["adapter_parameters"] == sum(value.numel() for value in adapter_parameters(model).values())
    assert counted["camera_parameters"] == sum(value.numel() for value in camera.parameters())


def test_the_bytes_of_a_sample_are_those_of_a_row_of_samples(prior: str) -> None:
    ids = torch.zeros(1, dtype=torch.int64)
    row = Samples(torch.zeros(1, 48, 16, 16), torch.zeros(1, 16), ids, ids, torch.ones(1))
    size = sum(getattr(row, field.name).nbytes for field in fields(Samples))
    assert plan_run(config(prior))["phases"][0]["sample"] == size == (48 * 16 * 16 + 16 + 5) * 4


def test_a_rank_sends_its_padded_rows_to_every_other_rank(prior: str) -> None:
    run = config(prior, particles={"count": 7, "views": 2}, parallel={"exchange": "all_gather"})
    plan = plan_run(run, nodes=1, gpus_per_node=3)
    block = 3 * 2 * (48 * 16 * 16 + 21) * 4
    agreed = 2 * 2 * 14 * 4 // 3  # a ring sum of one float a render: which particles did not move
    assert plan["phases"][0]["sent_a_round"] == plan["phases"][0]["received_a_round"] == 2 * block + agreed


def test_without_an_exchange_ranks_only_tell_each_other_ids_and_weights(prior: str) -> None:
    run = config(prior, particles={"count": 7, "views": 2}, parallel={"exchange": "none"})
    phase = plan_run(run, nodes=1, gpus_per_node=3)["phases"][0]
    # An id of 64 bits and a weight of 32 for each of the padded renders, to both others; and the sum as above.
    assert phase["sent_a_round"] == 2 * (3 * 2 * 12) + 2 * 2 * 14 * 4 // 3


def test_the_wire_carries_renders_at_their_largest_and_gradients(prior: str) -> None:
    render = {"resolution": Schedule(((0, 64.0), (100, 128.0))), "encode_resolution": "render"}
    run = config(prior, render=render, particles={"count": 4}, parallel={"exchange": "all_gather"})
    plan = plan_run(run, nodes=2, gpus_per_node=2)
    each = 3 * (48 * 32 * 32 + 21) * 4 + 2 * 3 * 4 * 4 // 4 + 2 * 3 * plan["score"]["gradient"] // 4
    assert plan["wire"] == {"rank": each, "all": 4 * each}


def test_each_resolution_of_the_schedule_has_its_own_bytes(prior: str) -> None:
    render = {"resolution": Schedule(((0, 64.0), (100, 128.0))), "encode_resolution": "render"}
    phases = plan_run(config(prior, render=render, parallel={"exchange": "all_gather"}), nodes=2)["phases"]
    assert [(phase["round"], phase["latent_shape"]) for phase in phases] == [(0, [48, 16, 16]), (100, [48, 32, 32])]
    assert phases[1]["sent_a_round"] == 4 * (48 * 32 * 32 + 21) * 4 + 8 * 4


def test_the_unet_sees_its_own_size_whatever_the_render(prior: str) -> None:
    # 16 latents a side of 4 pixels: 64 pixels.
    plan = plan_run(config(prior, render={"resolution": Schedule(((0, 16.0), (100, 128.0)))}), nodes=2)
    seen = [(phase["resolution"], phase["encoded_at"], phase["latent_shape"]) for phase in plan["phases"]]
    assert seen == [(16, 64, [48, 16, 16]), (128, 64, [48, 16, 16])]
    assert "renders of 16 pixels; the UNet sees latents 48 x 16 x 16 of 64 pixels" in draw(plan)


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_a_plan_with_latents_of_less_than_a_quarter_of_the_native_edge_is_refused_unless_asked_for(
    prior: str, space: str
) -> None:
    image = replace(Config().particles.image, space=space)
    kind = {"kind": "image", "image": image, "count": 2}
    for edge, allowed, is_refused in ((8, False, True), (8, True, False), (16, False, False)):
        render = {"resolution": Schedule.constant(edge), "encode_resolution": "render", "small_latents": allowed}
        run = config(prior, render=render, particles=kind)
        if not is_refused:
            assert plan_run(run)["phases"][0]["latent_shape"] == [48, edge // 4, edge // 4]
            continue
        with pytest.raises(ConfigError, match=r"64 pixels.*8 pixels.*small_latents"):
            plan_run(run)


def test_without_cameras_no_camera_network_is_counted(prior: str) -> None:
    with_cameras = plan_run(config(prior))["score"]["parameters"]
    for changed in ({"particles": {"kind": "image"}}, {"score": {"camera_drop": 1.0}}):
        without = plan_run(config(prior, **changed))["score"]["parameters"]
        assert with_cameras - without == 16 * 128 + 128 + 128 * 128 + 128


def test_one_rank_sends_nothing(prior: str) -> None:
    plan = plan_run(config(prior))
    assert plan["phases"][0]["sent_a_round"] == plan["wire"]["all"] == 0
    assert {row["sent_a_round"] for row in plan["strategies"]} == {0}


@pytest.mark.parametrize(("numerics", "width"), [("fast", 4), ("exact", 16)])
def test_the_score_gradient_is_reduced_once_a_step(prior: str, numerics: str, width: int) -> None:
    run = config(prior, parallel={"numerics": numerics}, score={"steps_per_round": 2, "rank": 3})
    plan = plan_run(run, nodes=4)
    score = plan["score"]
    # 16 -> 128 -> 128 with biases for the camera; the adapter as counted above.
    parameters = 4 * 3 * 944 + (16 * 128 + 128 + 128 * 128 + 128)
    assert score["parameters"] == parameters
    assert score["gradient"] == parameters * width
    assert plan["strategies"][0]["sent_a_round"] == 2 * 2 * 3 * parameters * width // 4


def test_every_strategy_has_its_bytes_and_the_configurations_decides(prior: str) -> None:
    run = config(prior, parallel={"strategy": "deepspeed", "zero_stage": 3}, score={"steps_per_round": 2})
    plan = plan_run(run, nodes=2, gpus_per_node=2)
    rows = {row["strategy"]: row for row in plan["strategies"]}
    assert [name for name, row in rows.items() if row["chosen"]] == ["deepspeed-3"]
    values = 4 * plan["score"]["parameters"]
    whole = len(unet_weights(1))
    part = -(-whole // 4)
    # Trained: values, gradient and two moments; ddp and DeepSpeed add a bucket. With DeepSpeed each of the four ranks
    # has a fourth of the moments and of a second copy of the values (stage 1), also of the gradient (stage 2), and
    # also of the values (stage 3).
    assert [row["base"] for row in rows.values()] == [whole, whole, part, whole, whole, part]
    trained = [4, 5, 4, 3 + 3 / 4, 2 + 4 / 4, 1 + 5 / 4]
    assert [row["trained"] for row in rows.values()] == [share * values for share in trained]
    # Each of the two steps sends a ring sum, and with DeepSpeed also the new values. A sharded network is gathered for
    # the prior, for the score, and twice for each step: 6 times what the other three ranks hold.
    once = 2 * 3 * values // 4
    spread = 6 * 3 * whole // 4
    sent = [2 * once, 2 * once, 2 * once + spread, 3 * once, 3 * once, 3 * once + spread]
    assert [row["sent_a_round"] for row in rows.values()] == sent
    # The text encoder's file has 24 bytes.
    memory = plan["rank_memory"]
    assert (memory["prior"], memory["score"]) == (24 + part, rows["deepspeed-3"]["trained"])
    assert memory["total"] == memory["particles"] + memory["prior"] + memory["score"]
    assert "  deepspeed-3 * " in draw(plan)


@pytest.mark.parametrize(
    ("objective", "guidance", "expected"),
    [
        ({"kind": "vsd"}, 7.5, {"prior": 8, "score": 4, "score_training": 4}),
        ({"kind": "vsd"}, 1.0, {"prior": 4, "score": 4, "score_training": 4}),
        ({"kind": "vsd"}, 0.0, {"prior": 4, "score": 4, "score_training": 4}),
        ({"kind": "esd"}, 7.5, {"prior": 8, "score": 8, "score_training": 4}),
        ({"kind": "esd", "esd_lambda": 0.0}, 7.5, {"prior": 8, "score": 4, "score_training": 4}),
        ({"kind": "sds"}, 7.5, {"prior": 8, "score": 0, "score_training": 0}),
    ],
)
def test_no_unet_pass_is_counted_that_is_not_run(
    prior: str, objective: dict[str, Any], guidance: float, expected: dict[str, int]
) -> None:
    run = config(prior, objective=objective, particles={"count": 7})
    run = replace(run, prior=replace(run.prior, guidance_scale=guidance))
    assert plan_run(run, nodes=2)["unet"] == expected


def test_replayed_samples_are_trained_on_too(prior: str) -> None:
    # A share of a half doubles the batch: 16 samples on 2 ranks, twice a round.
    run = config(prior, score={"replay_share": 0.5, "steps_per_round": 2})
    assert plan_run(run, nodes=2)["unet"]["score_training"] == 16


def test_steps_on_a_part_of_a_rounds_renders_cost_that_part(prior: str) -> None:
    # Two steps on two ranks, each with four of eight renders and four replayed samples: the cost of one step on all.
    run = config(prior, score={"batch_size": 4, "replay_share": 0.5, "steps_per_round": 2})
    assert plan_run(run, nodes=2)["unet"]["score_training"] == 8


def test_a_checkpoint_holds_values_and_moments_and_the_replay(prior: str) -> None:
    run = config(prior, particles={"kind": "image", "count": 5}, score={"replay_rounds": 2, "rank": 3})
    checkpoint = plan_run(run)["checkpoint"]
    assert checkpoint["particles"] == 5 * 3 * (3 * 64 * 64) * 4
    assert checkpoint["score"] == 3 * (4 * 3 * 944) * 4  # an image has no camera
    assert checkpoint["replay"] == 2 * 5 * (48 * 16 * 16 + 21) * 4
    # Nothing is replayed, so only 64 samples a round are kept, for the lag.
    many = config(prior, particles={"kind": "image", "count": 500}, score={"replay_rounds": 2})
    assert plan_run(many)["checkpoint"]["replay"] == 2 * 64 * (48 * 16 * 16 + 21) * 4
    assert checkpoint["total"] == checkpoint["particles"] + checkpoint["score"] + checkpoint["replay"]


def test_a_resume_reads_all_for_its_hashes_then_a_particle_once_and_the_score_on_every_rank(prior: str) -> None:
    checkpoint = plan_run(config(prior, particles={"count": 5}), nodes=3, gpus_per_node=2)["checkpoint"]
    shared = checkpoint["score"] + checkpoint["replay"]
    assert checkpoint["loaded"] == checkpoint["total"] + checkpoint["particles"] + 6 * shared


def test_a_prior_that_is_not_here_leaves_its_numbers_open_and_says_why(tmp_path: Path) -> None:
    plan = plan_run(config(str(tmp_path / "nowhere")), nodes=2)
    assert plan["phases"][0]["sent_a_round"] is None
    assert plan["score"]["gradient"] is None
    assert plan["particle"]["parameters"] == plan_run(Config())["particle"]["parameters"]
    text = draw(plan)
    assert "nowhere" in text
    assert "unknown" in text


def test_schedules_are_drawn_over_the_run(prior: str) -> None:
    run = config(prior, objective={"t_max": Schedule(((0, 0.98), (50, 0.5)))}, schedule={"rounds": 100})
    line = next(line for line in draw(plan_run(run)).splitlines() if "t_max" in line)
    # 48 columns for rounds 0 to 99: column 24 is round 50 (24 x 99 // 47 = 50), the first at the lower value.
    assert "0.5 |" + "#" * 24 + "_" * 24 + "| 0.98" in line


def test_the_text_is_ascii_and_the_data_is_json(prior: str) -> None:
    plan = plan_run(config(prior, particles={"count": 100}), nodes=8, gpus_per_node=8)
    assert draw(plan).isascii()
    assert json.loads(json.dumps(plan)) == plan


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (150 * 2**20, "150 MiB"), (None, "unknown")]
)
def test_amounts_are_read_in_binary_units(size: int | None, text: str) -> None:
    assert amount(size) == text


def test_a_plan_of_stages_is_one_of_each(prior: str) -> None:
    stages = (StageConfig("coarse", (("schedule.rounds", 10),)), StageConfig("fine", (("particles.kind", "image"),)))
    run = replace(config(prior), stages=stages)
    plan = plan_run(run, nodes=2)
    assert [(stage["name"], stage["rounds"]) for stage in plan["stages"]] == [("coarse", 10), ("fine", 1000)]
    assert plan["stages"][1]["particle"]["parameters"] == 3 * 64 * 64
    text = draw(plan)
    assert "stage 1 of 2: coarse" in text and "stage 2 of 2: fine" in text
    assert json.loads(json.dumps(plan)) == plan


def test_a_frozen_number_has_no_gradient_and_no_moments_and_is_saved_once(prior: str) -> None:
    run = config(prior, particles={"count": 2}, schedule={"rounds": 100}, checkpoint={"every": 60})
    plan = make_plan(run, HalfFrozen(), prior_sizes(run), VSD.needs)
    particle = plan["particle"]
    assert (particle["values"], particle["gradient"], particle["moments"]) == (4 * 30, 4 * 10, 2 * 4 * 10)
    # A save between two good states holds values and moments of what is trained twice, and what is frozen once.
    assert plan["checkpoint"]["particles"] == 2 * 4 * (2 * 3 * 10 + 20)
    assert plan["rank_memory"]["particles"] == 2 * 4 * (4 * 10 + 20)


class HalfFrozen:
    """The members of a particle that a plan uses."""

    is_latent = False

    def cost(self, resolution: int) -> Cost:
        return Cost(trained=10, frozen=20, points=0)


def test_planning_loads_no_library_of_networks() -> None:
    """Importing one would take longer than the plan."""
    program = (
        "import sys; from distvsd.cli import main; main(['plan', 'configs/smoke.yaml']);"
        "sys.exit(str(sorted({'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stderr.strip() == "[]" and "particles 0-3 (4)" in done.stdout


def test_a_base_of_the_scores_own_is_a_second_network_in_memory(prior: str) -> None:
    own = plan_run(config(prior))
    other = plan_run(config(prior, score={"base": prior}))
    network = own["prior"]["unet_bytes"]
    assert other["rank_memory"]["prior"] == own["rank_memory"]["prior"] + network
    split = {"parallel": {"strategy": "fsdp2"}}
    shared, apart = (plan_run(config(prior, score={"base": base}, **split), nodes=2) for base in ("", prior))
    # The shared network is held in halves; with a base of its own the teacher's is whole beside that.
    assert apart["rank_memory"]["prior"] == shared["rank_memory"]["prior"] + network


def test_of_particles_that_take_turns_it_says_how_many_updates_each_gets_and_where_they_are(prior: str) -> None:
    """20 of which 6 fit: 4 turns of 5. Of the 10 of a rank 3 are in one turn, and 2 in host memory."""
    run = config(prior, particles={"count": 20, "resident": 6, "host": 5}, schedule={"rounds": 10})
    plan = plan_run(run, gpus_per_node=2)
    paging = plan["paging"]
    assert (paging["turns"], paging["active"], paging["updates"]) == (4, 5, 2.5)
    assert (paging["device"], paging["host"], paging["disk"]) == (3, 2, 8)
    one = plan["particle"]
    assert paging["device_bytes"] == 3 * one["training"] == plan["rank_memory"]["particles"]
    assert paging["disk_bytes"] == 8 * (one["values"] + one["moments"])
    assert plan["unet"]["score"] == 3 * run.particles.views
    assert "one of 4 rounds, 2.5 updates in all; at most 5 particles a round" in draw(plan)
    assert plan_run(config(prior))["paging"] is None
