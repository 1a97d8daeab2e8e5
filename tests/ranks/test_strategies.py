"""Every strategy trains the same adapter as `flat`.

The tests cover uneven and empty slices, a round that is not finite, and a resume. Each strategy continues from the same
state with the same unions, so that only the strategy differs. The second rank has no particle, and in one round it has
no row to train on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distvsd.errors import BackendError, ConfigError, RankError
from distvsd.faults import begin_round, injected
from distvsd.parallel.world import World
from distvsd.run.build import build_run
from distvsd.run.train import train
from distvsd.score.strategies.choose import refuse_missing
from distvsd.testing.ranks import run_ranks
from distvsd.vsd.rng import Purpose, normal
from distvsd.vsd.samples import Samples
from tests.small_run import small_config

NAMES = ("ddp", "fsdp2", "deepspeed-1", "deepspeed-2", "deepspeed-3")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ROWS = (3, 3, 1, 4, 3)  # of the union by round; two ranks share 3 as 2 + 1, 1 as 1 + 0, 4 as 2 + 2
MIDDLE, LAST = 2, 5
SPOILED = 3  # the round in which the second rank's gradient is not finite

State = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Result:
    """The results of one rank. states: by the number of finished rounds. moved: the gradients of the particles, by
    round."""

    states: dict[int, State]
    losses: list[float]
    skipped: list[int]
    moved: list[Tensor]


@pytest.fixture(scope="module", autouse=True)
def small_tensors_are_cut_up(request: pytest.FixtureRequest) -> Iterator[None]:
    """Makes ZeRO-3 partition the small tensors of the test network too."""
    if HAS_DEEPSPEED:
        request.getfixturevalue("deepspeed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distvsd.score.strategies.deepspeed.PERSISTENT", 4000)
        yield


def strategy(name: str) -> dict[str, Any]:
    kind, _, stage = name.partition("-")
    return {"parallel.strategy": kind} | ({"parallel.zero_stage": stage} if stage else {})


def unions(shape: tuple[int, ...], step: int) -> Samples:
    count = ROWS[step]
    ids = torch.arange(count) % 2
    latents = normal(3, Purpose.SAMPLE, list(range(count)), step, shape)
    cameras = normal(4, Purpose.SAMPLE, list(range(count)), step, (16,))
    return Samples(latents, cameras, ids, torch.zeros_like(ids), torch.ones(count))


def rounds(world: World, config: Any, first: int, last: int, state: State | None) -> Result:
    """Runs the rounds first to last - 1 from a state. The second rank has no samples for the objective."""
    run = build_run(config, world, lambda done: False)
    shape, training = run.prior.latent_shape(16), run.loop.training
    assert training is not None, "the run has a score network"
    if state is not None:
        training.load_state(state)
    result = Result({}, [], [], [])
    with injected(f"nan@reduce:rank=1:step={SPOILED}"):
        for step in range(first, last):
            begin_round(step)
            union = unions(shape, step)
            result.moved.append(run.loop.objective(union[slice(0, 2 if world.rank == 0 else 0)], step))
            fit = training.round(union, step)
            result.losses.append(fit.loss)
            result.skipped.append(fit.skipped)
            result.states[step + 1] = training.state()
    return result


@dataclass(frozen=True)
class Case:
    """The reference of all tests: five rounds of `flat`. Every strategy repeats the last three."""

    prior: Path
    folder: Path
    flat: Result

    def ranks(self, name: str, first: int, last: int, state: State | None) -> list[Result]:
        if name.startswith("deepspeed") and not HAS_DEEPSPEED:
            pytest.skip("deepspeed is not installed")
        return run_ranks(rounds, 2, configured(self.folder, self.prior, name), first, last, state, timeout_s=120.0)


def configured(folder: Path, prior: Path, name: str) -> Any:
    settings = {
        "parallel.numerics": "fast",
        "particles.count": 2,
        "score.warmup": 3,
        "score.max_grad_norm": 0.5,
        "score.learning_rate": 1e-3,
        "score.replay_share": 0,
    }
    return small_config(folder, prior, **settings, **strategy(name))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> Case:
    folder = tmp_path_factory.mktemp("strategies")
    flat = run_ranks(rounds, 2, configured(folder, prior, "flat"), 0, LAST, None)[0]
    return Case(prior, folder, flat)


@pytest.fixture(scope="module")
def repeated(case: Case) -> Callable[[str], list[Result]]:
    """Returns the last three rounds under a strategy, from the state of `flat` after two rounds. Each strategy runs
    once."""
    results: dict[str, list[Result]] = {}

    def repeat(name: str) -> list[Result]:
        if name not in results:
            results[name] = case.ranks(name, MIDDLE, LAST, case.flat.states[MIDDLE])
        return results[name]

    return repeat


def distance(one: State, other: State) -> float:
    """The largest difference between two states, which must have the same names. Moments are not rescaled."""
    assert {file: set(tensors) for file, tensors in one.items()} == {file: set(t) for file, t in other.items()}
    pairs = [(one[file][name], other[file][name]) for file in one for name in one[file]]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


@pytest.mark.guarantee("G13")
@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_is_that_of_flat(case: Case, repeated: Any, name: str, figure: Callable[[str], None]) -> None:
    """Under every strategy, the adapter, the camera, the moments and the number of steps equal those of `flat` to 1e-6
    on every rank. The rounds include uneven and empty shares and a skipped step."""
    found = [distance(result.states[LAST], case.flat.states[LAST]) for result in repeated(name)]
    assert max(found) < 1e-6
    begun, ended = (trained(case.flat.states[step]) for step in (MIDDLE, LAST))
    assert distance(begun, ended) > 1e-4  # training has changed it
    figure(f"{name}: {max(found):.1e} from flat")


@pytest.mark.guarantee("G17")
@pytest.mark.parametrize("name", NAMES)
def test_a_round_that_is_not_finite_on_one_rank_is_left_out_on_all(case: Case, repeated: Any, name: str) -> None:
    """Under every strategy, a gradient that is not finite on one rank makes all ranks skip the step."""
    for result in repeated(name):
        assert result.skipped == case.flat.skipped[MIDDLE:] == [0, 1, 0]
        before, after = (trained(result.states[step]) for step in (SPOILED, SPOILED + 1))
        assert distance(before, after) == 0
        assert int(result.states[SPOILED + 1]["score/optimizer.safetensors"]["left_out"]) == 1


def trained(state: State) -> State:
    """The part of the state that a skipped step must not change."""
    return {
        file: {name: tensor for name, tensor in tensors.items() if name != "left_out"}
        for file, tensors in state.items()
        if "replay" not in file
    }


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_particles_are_those_of_flat(case: Case, repeated: Any, name: str) -> None:
    """The comparison includes sharded networks, where the rank without particles must take part in every call."""
    first, second = repeated(name)
    for result in (first, second):
        assert result.losses[0] == pytest.approx(case.flat.losses[MIDDLE], abs=1e-6)
        assert result.losses[2] == pytest.approx(case.flat.losses[LAST - 1], abs=1e-6)
    for moved, expected in zip(first.moved, case.flat.moved[MIDDLE:], strict=True):
        assert float((moved - expected).abs().max()) < 1e-5
    assert all(len(moved) == 0 for moved in second.moved)


@pytest.mark.parametrize(("name", "after"), [*((name, "flat") for name in NAMES), ("deepspeed-3", "fsdp2")])
def test_a_run_saved_under_one_strategy_resumes_under_another(case: Case, repeated: Any, name: str, after: str) -> None:
    saved = repeated(name)[0].states[SPOILED + 1]
    resumed = case.ranks(after, SPOILED + 1, LAST, saved)
    assert distance(resumed[0].states[LAST], case.flat.states[LAST]) < 1e-6


def test_a_whole_run_under_two_strategies_leaves_a_folder_that_peft_loads_alone(tmp_path: Path, prior: Path) -> None:
    """One particle on two ranks. The first round partitions the network (ZeRO-3, if DeepSpeed is installed), the second
    one uses FSDP2."""
    from diffusers import UNet2DConditionModel
    from peft import PeftModel

    names = ("deepspeed-3" if HAS_DEEPSPEED else "ddp", "fsdp2")
    for name, last, resume in zip(names, (1, 2), ("never", "must"), strict=True):
        settings = {"parallel.numerics": "fast", "particles.count": 1, "schedule.rounds": last, **strategy(name)}
        config = small_config(tmp_path / "run", prior, **settings)
        assert run_ranks(lambda world, c=config, r=resume: train(c, r), 2, timeout_s=120.0) == [0, 0]
    score = tmp_path / "run/checkpoints/step-00000002/score"
    loaded = PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(prior / "unet"), str(score))
    saved = load_file(score / "adapter_model.safetensors")
    assert any(bool(value.any()) for name, value in saved.items() if "lora_B" in name)
    adapter = {name.replace(".default.", "."): value for name, value in loaded.named_parameters() if "lora_" in name}
    assert adapter.keys() == saved.keys() and all(torch.equal(adapter[name], saved[name]) for name in saved)
    assert int(load_file(score / "optimizer.safetensors")["num_steps"]) == 2


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_rank_that_is_lost_is_told_from_an_error_of_the_library(case: Case, name: str) -> None:
    def second_leaves(world: World) -> None:
        run = build_run(configured(case.folder, case.prior, name), world, lambda done: False)
        union = unions(run.prior.latent_shape(16), 0)
        for step in range(3):
            if step == 2 and world.rank == 1:
                raise ValueError("the second rank has had enough")
            run.loop.objective(union[slice(0, 1)], step)
            assert run.loop.training is not None, "the run has a score network"
            run.loop.training.round(union, step)

    with pytest.raises(RankError, match=r"has had enough(.|\n)*RankError: rank 0 of 2 "):
        run_ranks(second_leaves, 2)


def test_exact_numerics_refuse_what_cannot_be_exact(tmp_path: Path, prior: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.strategy is ddp.*exact.*flat"):
        small_config(tmp_path, prior, **{"parallel.strategy": "ddp"})


def test_a_missing_library_is_named_before_anything_is_loaded(
    tmp_path: Path, prior: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distvsd.score.strategies.choose.find_spec", lambda name: None)
    config = configured(tmp_path, prior, "deepspeed-2")
    with pytest.raises(BackendError, match=r"deepspeed.*parallel\.strategy=flat"):
        refuse_missing(config.parallel)
