"""Every exchange of renders trains the same adapter, and sends what the plan says."""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations, product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from distvsd.config import Config
from distvsd.faults import begin_round, injected
from distvsd.parallel.assign import owners
from distvsd.parallel.world import World
from distvsd.plan.exchange import exchanges
from distvsd.run.build import build_run
from distvsd.run.contents import verify
from distvsd.run.planned import plan_run
from distvsd.run.train import train
from distvsd.score.sharing import Mode, share_renders
from distvsd.testing.ranks import run_ranks
from distvsd.vsd.samples import Samples
from tests.small_run import small_config

MODES = get_args(Mode)
ROUNDS = 4
STRUCK = 4  # a particle that does not move in the third round
# Seven particles: uneven shards on two and three ranks. Dealt batches and replayed renders, so that shares are uneven.
DEALT = {
    "particles.count": 7,
    "particles.views": 2,
    "score.steps_per_round": 2,
    "score.batch_size": 8,
    "score.replay_share": 0.25,
    "score.replay_rounds": 2,
    "score.learning_rate": 1e-3,
    "score.warmup": 3,
    "schedule.rounds": ROUNDS,
}
State = Mapping[str, Mapping[str, Tensor]]


def sharing(folder: Path, prior: Path, mode: str, **changes: Any) -> Config:
    return small_config(folder, prior, **(DEALT | {"parallel.exchange": mode} | changes))


def digests(config: Config) -> dict[str, str]:
    lines = verify(Path(config.run.dir), digest=True)
    return dict(line.rsplit(" ", 1) for line in lines if len(line.split()[-1]) == 64)


def struck(config: Config, size: int, resume: Any = "auto") -> None:
    """Trains with a particle whose gradient is not finite in one round."""

    def run(world: World) -> int:
        with injected(f"nan@gradient:particle={STRUCK}:step=2"):
            return train(config, resume=resume)

    assert run_ranks(run, size) == [0] * size


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> dict[str, str]:
    """The digests of a run on one rank, where nothing is exchanged."""
    config = sharing(tmp_path_factory.mktemp("one"), prior, "all_gather")
    struck(config, 1)
    found = digests(config)
    assert len(found) >= 7 + 4
    return found


@pytest.mark.guarantee("G10")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [2, 3])
def test_every_exchange_gives_the_same_bits_in_exact_numerics(
    tmp_path: Path, prior: Path, reference: dict[str, str], mode: str, size: int
) -> None:
    """Particles, adapter, optimisers and replay are those of one rank bit for bit, with uneven shards, dealt batches,
    replayed renders and a particle that is left out of a round."""
    config = sharing(tmp_path, prior, mode)
    struck(config, size)
    assert digests(config) == reference


@pytest.mark.guarantee("G11")
def test_a_run_goes_on_under_another_exchange_and_number_of_ranks(
    tmp_path: Path, prior: Path, reference: dict[str, str]
) -> None:
    """Two rounds without an exchange on three ranks, one of equal shares on two, one of all renders on three."""
    for mode, rounds, size in (("none", 2, 3), ("all_to_all", 3, 2), ("all_gather", 4, 3)):
        config = sharing(tmp_path / "run", prior, mode, **{"schedule.rounds": rounds})
        struck(config, size, resume="must" if rounds > 2 else "never")
    assert digests(config) == reference


def test_ranks_without_particles_take_part(tmp_path: Path, prior: Path) -> None:
    found = []
    for number, (mode, size) in enumerate((("all_gather", 1), ("none", 3), ("all_to_all", 3))):
        config = sharing(tmp_path / str(number), prior, mode, **{"particles.count": 2, "schedule.rounds": 3})
        assert run_ranks(lambda world, c=config: train(c), size) == [0] * size
        found.append(digests(config))
    assert found[0] == found[1] == found[2]


def trained(world: World, config: Config) -> tuple[State, list[float | None]]:
    """The state of the score network after five rounds of given renders, and the lag of each round."""
    run = build_run(config, world, lambda done: False)
    training, lags = run.training, []
    assert training is not None, "the run has a score network"
    for parameter in training.score.trainable.values():  # else the first factor's gradient is zero
        parameter.data += 0.01
    for step in range(5):
        begin_round(step)
        resolution = run.loop.resolution(step)
        drawn = [run.loop.encode(views, resolution).detached() for views in run.ensemble.render(step, resolution)]
        union = run.loop.exchange(Samples.cat(drawn), step)
        union = run.loop.exclude(union, [STRUCK] if step == 2 and STRUCK in run.ensemble.ids else [])
        lags.append(training.lag(union, step))
        training.round(union, step)
    return training.state(), lags


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> tuple[State, list[float | None]]:
    """`trained` on one rank, in fast numerics."""
    config = sharing(tmp_path_factory.mktemp("alone"), prior, "auto", **{"parallel.numerics": "fast"})
    result: tuple[State, list[float | None]] = run_ranks(trained, 1, config)[0]
    return result


@pytest.mark.guarantee("G13")
@pytest.mark.parametrize(
    ("strategy", "modes", "sizes"),
    [
        ("flat", MODES, (2, 3)),
        ("ddp", ("none",), (3,)),
        ("fsdp2", ("none", "all_to_all"), (3,)),
        ("deepspeed-2", ("none",), (3,)),
        ("deepspeed-3", ("none",), (3,)),
    ],
)
def test_every_exchange_trains_the_same_adapter_in_fast_numerics(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    prior: Path,
    alone: tuple[State, list[float | None]],
    figure: Callable[[str], None],
    strategy: str,
    modes: tuple[str, ...],
    sizes: tuple[int, ...],
) -> None:
    """The adapter and its moments agree to 1e-6 with those of one rank, and so does the lag. Ranks have unequal parts
    of a step, or none, also under strategies whose network calls are collective."""
    kind, _, stage = strategy.partition("-")
    changes: dict[str, Any] = {"parallel.numerics": "fast", "parallel.strategy": kind}
    if stage:
        pytest.importorskip("deepspeed")
        request.getfixturevalue("deepspeed")
        changes["parallel.zero_stage"] = stage
    expected, lags = alone
    far: dict[tuple[str, int], float] = {}
    for mode in modes:
        for size in sizes:
            for state, found in run_ranks(trained, size, sharing(tmp_path, prior, mode, **changes), timeout_s=120.0):
                far[mode, size] = max(far.get((mode, size), 0.0), distance(state, expected))
                assert found[0] is None and found[1:] == pytest.approx(lags[1:], abs=1e-5)
    assert max(far.values()) < 1e-6
    figure(f"{strategy}, " + ", ".join(f"{mode} on {size} ranks: {value:.1e}" for (mode, size), value in far.items()))


def distance(one: State, other: State) -> float:
    """The largest difference between two states, which must have the same names."""
    assert {file: set(tensors) for file, tensors in one.items()} == {file: set(t) for file, t in other.items()}
    pairs = [(one[file][name], other[file][name]) for file in one for name in one[file]]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


def tcp_bytes() -> int:
    """Bytes that this process has sent through all its TCP sockets, as the system counts them."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if not stat.S_ISSOCK(link.stat().st_mode):
                continue
            handle = socket.socket(fileno=os.dup(int(link.name)))
        except OSError:
            continue  # the descriptor of the listing itself
        with handle:
            if handle.family in (socket.AF_INET, socket.AF_INET6) and handle.type == socket.SOCK_STREAM:
                info = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
                sent, again = struct.unpack_from("QQ", info, 200)  # tcpi_bytes_sent, tcpi_bytes_retrans
                total += sent - again
    return total


@contextmanager
def counted(into: list[int]) -> Iterator[None]:
    before = tcp_bytes()
    yield
    into[0] += tcp_bytes() - before


VIEWS = 2


def batches(count: int, dealt: int, replayed: int) -> list[list[int]]:
    """All equally likely batches of a step: every choice of dealt particles with every draw of replayed ones."""
    draws = list(product(range(count), repeat=replayed))
    return [[*fresh, *old] for fresh in combinations(range(count), dealt) for old in draws]


def shared(world: World, mode: Mode, count: int, edge: int, steps: list[list[int]]) -> tuple[int, int]:
    """The bytes that the system and that the exchange counts of a round of `count` particles with these steps."""
    own = owners(count, world.size)
    way, told = share_renders(mode, world, count), [0]
    ids = torch.tensor(own[world.rank]).repeat_interleave(VIEWS)
    samples = Samples(
        torch.randn(len(ids), 4, edge, edge), torch.randn(len(ids), 16), ids, ids % 4, torch.ones(len(ids))
    )
    with counted(told):
        union = way.exclude(way.start(samples, [len(part) * VIEWS for part in own]).wait(), [])
    for step in steps:
        batch = union[(torch.tensor(step)[:, None] * VIEWS + torch.arange(VIEWS)).flatten()]
        with counted(told):
            rows, mine = way.part(batch, VIEWS)
        assert torch.equal(mine.ids, batch.ids[rows])
    return told[0], way.sent


@pytest.mark.parametrize(
    ("mode", "count", "edge", "dealt", "replayed"),
    [
        ("none", 5000, 1, 5000, 0),
        ("all_gather", 50, 64, 50, 0),
        ("all_to_all", 7, 64, 4, 1),
        ("all_to_all", 7, 64, 7, 2),
    ],
)
def test_the_bytes_on_the_wire_are_those_of_the_plan(
    mode: Mode,
    count: int,
    edge: int,
    dealt: int,
    replayed: int,
    prior: Path,
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    """Counted by the system on the TCP sockets of three ranks, to 5 %, with the headers of gloo's messages. Where the
    steps draw their particles, each possible batch comes once, so that the sum is exactly the expectation."""
    steps = batches(count, dealt, replayed)
    changes = {
        "particles.count": count,
        "score.steps_per_round": len(steps),
        "score.batch_size": dealt * VIEWS,
        "score.replay_share": replayed / (dealt + replayed),
        "parallel.numerics": "fast",
    }
    sample = 4 * (4 * edge * edge + 16 + 5)
    config = sharing(tmp_path, prior, mode, **changes)
    planned = next(row["round"] for row in exchanges(config, 3, sample) if row["chosen"])
    found = run_ranks(shared, 3, mode, count, edge, steps, timeout_s=300.0)
    on_wire, told = (sum(column) for column in zip(*found, strict=True))

    figure(f"{mode}, {dealt} of {count}: {on_wire} bytes on the wire, {told} counted, {planned} planned")
    assert told == pytest.approx(planned, abs=10)
    assert on_wire == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("mode", ["none", "all_gather"])
def test_a_run_reports_what_it_exchanges(
    tmp_path: Path, prior: Path, mode: Mode, figure: Callable[[str], None]
) -> None:
    """`exchanged_bytes` of metrics.jsonl against the plan of the same configuration."""
    changes = {"score.batch_size": 0, "score.replay_share": 0, "log.every": 2, "checkpoint.every": 0}
    config = sharing(tmp_path, prior, mode, **changes)
    assert run_ranks(lambda world: train(config), 3) == [0] * 3
    plan = next(row for row in plan_run(config, 3)["exchanges"] if row["chosen"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = plan["round"] + plan["log"] / 2
    assert [line["exchanged_bytes"] for line in lines] == pytest.approx([expected] * 2, rel=0.05)
    figure(f"{mode}: {lines[0]['exchanged_bytes']:.0f} bytes a round, {expected:.0f} planned")
