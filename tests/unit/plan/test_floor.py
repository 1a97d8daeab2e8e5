"""The least time of a round: counts by hand, the two bounds, what was measured, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distvsd.cli import main
from distvsd.config import Config, load_config, to_yaml
from distvsd.plan.ceilings import measure_ceilings
from distvsd.plan.floor import PHASE_OF, Ceilings, Work, floor
from distvsd.plan.text import draw
from distvsd.run.planned import plan_run

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
CEILINGS = Ceilings(100.0, 10.0, "given")


def planned(*overrides: str, ceilings: Ceilings = CEILINGS, **more: Any) -> dict[str, Any]:
    return plan_run(load_config(QUICKSTART, overrides), ceilings=ceilings, **more)["floor"]


def work_of(*overrides: str) -> dict[str, dict[str, float]]:
    row: dict[str, dict[str, float]] = planned(*overrides)["rounds"][-1]["work"]
    return row


def test_a_part_takes_the_longer_of_its_operations_and_its_bytes() -> None:
    assert Work(200e9, 1e9).seconds(CEILINGS) == 2.0
    assert Work(1e9, 50e9).seconds(CEILINGS) == 5.0


def test_a_phase_is_the_sum_of_its_parts_and_a_round_that_of_all() -> None:
    found = floor({name: Work(100e9 * (place + 1)) for place, name in enumerate(PHASE_OF)}, CEILINGS)
    assert found["phases"] == {"render": 1, "encode": 2, "exchange": 3, "objective": 4 + 5, "update": 6, "score": 7}
    assert found["seconds"] == 28
    unknown = floor(dict.fromkeys(PHASE_OF, Work()) | {"score": None}, CEILINGS)
    assert unknown["phases"]["objective"] is None and unknown["seconds"] is None


def test_the_render_of_the_quickstart_is_counted_by_hand() -> None:
    # 8 fields, one view of 64 x 64 rays with 28 samples. A sample reads 8 corners of 2 levels of 3 features, and writes
    # and reads density and colour; the decoder makes 4 numbers of 6 features.
    samples, fields = 64 * 64 * 28, 8
    work = work_of()["render"]
    assert work == {"flops": fields * samples * 2 * 4 * 6, "bytes": fields * samples * (8 * 6 + 2 * 4) * 4}


def test_the_update_is_the_backward_pass_and_adam() -> None:
    work, trained = work_of(), 99_868
    assert work["update"]["flops"] == 2 * work["render"]["flops"]
    adam, codec = 8 * 4 * trained * 8, work["encode"]["bytes"]
    assert work["update"]["bytes"] == 2 * work["render"]["bytes"] + codec + adam
    again = work_of("particles.recompute=true")["update"]
    assert again["flops"] == 3 * work["render"]["flops"]


def test_the_networks_are_counted_by_their_calls() -> None:
    work = work_of()
    unguided = work_of("prior.guidance_scale=1")
    assert work["prior"]["flops"] == 2 * unguided["prior"]["flops"]
    # The score network is the prior's with an adapter; its training adds the gradients of the layers' inputs.
    assert 1.0 < work["score"]["flops"] / unguided["prior"]["flops"] < 1.05
    assert 1.9 < work["score training"]["flops"] / work["score"]["flops"] < 2.1
    assert work_of("score.steps_per_round=3")["score training"]["flops"] == 3 * work["score training"]["flops"]
    without = work_of("objective.kind=sds")
    assert without["score"] == without["score training"] == {"flops": 0, "bytes": 0}


def test_more_ranks_have_less_work_and_send_something() -> None:
    config = load_config(QUICKSTART, ["parallel.exchange=all_gather"])
    one, four = (plan_run(config, nodes, ceilings=CEILINGS)["floor"]["rounds"][0]["work"] for nodes in (1, 4))
    assert four["prior"]["flops"] == one["prior"]["flops"] / 4
    # Two samples to three others, and its part of the sum that tells which of eight did not move; sent and received.
    sent = 2 * 3 * (48 * 16 * 16 + 21) * 4 + 2 * 3 * 8 * 4 // 4
    assert one["exchange"]["bytes"] == 0 and four["exchange"]["bytes"] == 2 * sent


def test_a_prior_that_is_not_here_leaves_its_parts_open(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, [f"prior.path={tmp_path}/nowhere"])
    plan = plan_run(config, ceilings=CEILINGS)
    row = plan["floor"]["rounds"][0]
    assert row["work"]["prior"] is None and row["seconds"] is None and row["parts"]["render"] > 0
    assert "a round takes at least unknown" in draw(plan)


def test_without_ceilings_there_is_no_floor() -> None:
    assert "floor" not in plan_run(Config())


def run_of(folder: Path, config: Config, *seconds: float) -> None:
    """A run directory with one line of metrics for each number: seconds of the render and of the score."""
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    lines = [{"resolution": 64, "phase_s": {"render": value, "score": 2 * value}} for value in seconds]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_rounds_of_the_run_directory_are_compared_without_the_first_line(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, [f"run.dir={tmp_path / 'run'}"])
    run_of(tmp_path / "run", config, 90.0, 3.0, 1.0, 2.0)
    plan = plan_run(config, ceilings=CEILINGS)
    row = plan["floor"]["rounds"][0]
    assert row["measured"]["phases"] == {"render": 2.0, "score": 4.0} and row["measured"]["seconds"] == 6.0
    assert row["measured"]["ratio"] == pytest.approx(6.0 / row["seconds"])
    assert row["measured"]["ratios"]["render"] == pytest.approx(2.0 / row["phases"]["render"])
    assert "run.dir measured 6 s" in draw(plan)


@pytest.mark.parametrize("metrics", [None, "", "{}\n", "[1]\n", "no json", '{"resolution": 64, "phase_s": 3}\n'])
def test_a_run_directory_that_tells_nothing_is_passed_over(tmp_path: Path, metrics: str | None) -> None:
    config = load_config(QUICKSTART, [f"run.dir={tmp_path / 'run'}"])
    run_of(tmp_path / "run", config, 1.0)
    (tmp_path / "run/metrics.jsonl").unlink() if metrics is None else (tmp_path / "run/metrics.jsonl").write_text(
        metrics
    )
    assert plan_run(config, ceilings=CEILINGS)["floor"]["rounds"][0]["measured"] is None


def test_a_run_of_another_configuration_is_not_compared(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, [f"run.dir={tmp_path / 'run'}"])
    run_of(tmp_path / "run", config, 1.0)
    other = replace(config, particles=replace(config.particles, count=9))
    assert plan_run(other, ceilings=CEILINGS)["floor"]["rounds"][0]["measured"] is None


def test_ceilings_are_measured_on_this_machine() -> None:
    found = measure_ceilings("float32", torch.device("cpu"))
    assert found.gflops > 0 and found.gbps > 0 and "float32" in found.what


def test_the_command_takes_the_ceilings_that_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(QUICKSTART), "--gflops", "100", "--gbps", "10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["floor"]["ceilings"] == {"gflops": 100, "gbps": 10, "what": "given"}
    assert main(["plan", str(QUICKSTART), "--gbps", "10"]) == 0
    text = capsys.readouterr().out
    assert "floor        busiest rank at" in text and "and 10 GB/s" in text and "score training" in text
