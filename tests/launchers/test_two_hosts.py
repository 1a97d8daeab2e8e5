"""The lines of launch/README.md for several machines, on two hosts that only a cable connects.

Each test starts a launcher and a rank on both hosts and takes at least twenty seconds of processor time.
test_cluster_life.py has more cases on one host.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distvsd.config import load_config
from distvsd.run.contents import verify as verify_run
from distvsd.run.train import train
from tests.launchers.two_hosts import CABLE, ROOT, Host, missing, two_hosts
from tests.small_run import SMOKE, overrides

ROUNDS = 8
PATIENCE_S = 240.0  # for imports on a busy machine
TIMEOUT_S = 5
# Makes rounds long enough for a fault in the middle of a run.
SLOWLY = {"DISTVSD_FAULTS": "sleep@round:ms=400"}

Figure = Callable[[str], None]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these tests train on two CPU ranks")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    if problem := missing():
        pytest.skip(problem)
    with two_hosts(tmp_path) as both:
        yield both


def settings(run: Path, prior: Path) -> list[str]:
    more = {"schedule.rounds": ROUNDS, "checkpoint.every": 1, "log.every": 1, "parallel.timeout_s": TIMEOUT_S}
    return overrides(run, prior, **more)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> list[str]:
    """The digest of the same run, trained in this process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(load_config(SMOKE, settings(run, prior))) == 0
    return verify_run(run, digest=True)


def documented(*words: str) -> str:
    """The line of launch/README.md with these words, for the smoke configuration and the host `one`."""
    lines = (ROOT / "launch/README.md").read_text().splitlines()
    (line,) = (line for line in lines if all(word in line for word in words))
    return re.sub(r"configs/\S+\.yaml", "configs/smoke.yaml", line).replace("HOST", "one")


def torchrun() -> str:
    return documented("torchrun --nnodes 2", "configs/smoke.yaml")


def elastic() -> str:
    """The elastic script for one or two hosts."""
    return documented("launch/torchrun/elastic.sh", "DISTVSD_HEAD").replace("DISTVSD_NODES=2:4", "DISTVSD_NODES=1:2")


def accelerate(machine: int) -> str:
    """The line for one CPU rank per host instead of eight GPUs."""
    line = documented("accelerate launch", "launch/accelerate/nodes.yaml", "--machine_rank 0")
    return line.replace("--machine_rank 0", f"--num_processes 2 --machine_rank {machine}")


def start(host: Host, line: str, run: Path, prior: Path, **environment: str) -> subprocess.Popen[bytes]:
    return host.start(f"{line} {shlex.join(settings(run, prior))}", **environment)


def end_of(process: subprocess.Popen[bytes], host: Host) -> int:
    try:
        return process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the job on host {host.name} does not end:\n{host.log}") from None


def rounds(run: Path) -> list[int]:
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]  # the last one may be incomplete
    except FileNotFoundError:
        return []
    return [json.loads(line)["round"] for line in lines]


def until_trained(run: Path, hosts: tuple[Host, Host]) -> None:
    """Waits for the second round of a world with a rank on each host."""
    deadline = time.monotonic() + PATIENCE_S
    while len(rounds(run)) < 2 or {beat["host"] for beat in beats(run)} != {"one", "two"}:
        assert time.monotonic() < deadline, "round 2 was not reached:\n" + "\n".join(host.log for host in hosts)
        time.sleep(0.05)


def beats(run: Path) -> list[dict[str, Any]]:
    found = []
    for path in (run / "heartbeats").glob("rank-*.json"):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):  # it is being written
            continue
    return found


def is_done_as_alone(run: Path, alone: list[str], world_size: int) -> None:
    assert json.loads((run / "STATUS.json").read_text())["state"] == "done"
    assert verify_run(run, digest=True) == alone
    assert rounds(run) == list(range(1, ROUNDS + 1))
    manifest = json.loads((run / f"checkpoints/step-{ROUNDS:08d}/manifest.json").read_text())
    assert manifest["world_size"] == world_size


@pytest.mark.guarantee("G10")
def test_accelerate_on_two_hosts_makes_the_particles_of_one(
    tmp_path: Path, prior: Path, alone: list[str], hosts: tuple[Host, Host], figure: Figure
) -> None:
    """`accelerate launch` on two hosts with separate networks gives the bits of one process on one host."""
    run = tmp_path / "run"
    jobs = [start(host, accelerate(machine), run, prior) for machine, host in enumerate(hosts)]
    for job, host in zip(jobs, hosts, strict=True):
        assert end_of(job, host) == 0, host.log
    is_done_as_alone(run, alone, world_size=2)
    figure("accelerate launch on 2 hosts and one process alone: one digest")


@pytest.mark.guarantee("G20", "G11")
def test_a_cut_cable_ends_both_hosts_and_one_of_them_goes_on(
    tmp_path: Path, prior: Path, alone: list[str], hosts: tuple[Host, Host], figure: Figure
) -> None:
    """The network between two hosts of a torchrun job is cut during the run. No connection is closed, so both hosts end
    after parallel.timeout_s, and their errors name the hosts. One host continues alone through the elastic script and
    ends with the bits of an undisturbed run."""
    run = tmp_path / "run"
    one, two = hosts
    # torchrun's timeouts do not apply to a cut connection (torch 2.13). The launcher on the host without the rendezvous
    # waits until the kernel stops retransmitting: a quarter of an hour by default, 25 s with 6 retries.
    two.run("sh", "-c", "echo 6 >/proc/sys/net/ipv4/tcp_retries2")
    jobs = [start(host, torchrun(), run, prior, **SLOWLY) for host in hosts]
    until_trained(run, hosts)
    one.run("ip", "link", "set", CABLE, "down")
    began = time.monotonic()
    assert end_of(jobs[0], one) != 0
    seconds = time.monotonic() - began
    assert TIMEOUT_S - 1 < seconds < 60
    assert end_of(jobs[1], two) != 0
    whole = time.monotonic() - began
    for host, other in ((one, "two"), (two, "one")):
        assert re.search(rf"lost the others in .*(between hosts one, two|host {other}, pid \d+)", host.log), host.log
    status = json.loads((run / "STATUS.json").read_text())
    assert status["state"] == "failed" and re.search(r"between hosts one, two|\(host (one|two), pid", status["message"])
    saved = len(rounds(run))
    assert 2 <= saved < ROUNDS

    again = start(one, elastic(), run, prior, DISTVSD_RANKS="1", PET_RDZV_CONF="last_call_timeout=1")
    assert end_of(again, one) == 0, one.log
    is_done_as_alone(run, alone, world_size=1)
    figure(
        f"timeout {TIMEOUT_S} s: {seconds:.0f} s from the cut to the end of the launcher where the hosts meet, "
        f"{whole:.0f} s to that of the other (tcp_retries2=6)"
    )


@pytest.mark.guarantee("G19", "G21", "G11")
def test_one_of_two_hosts_dies_and_the_other_goes_on_alone_by_itself(
    tmp_path: Path, prior: Path, alone: list[str], hosts: tuple[Host, Host], figure: Figure
) -> None:
    """One of the two hosts of the elastic script is killed during the run, with all its processes. The other host names
    it and restarts by itself as a world of one. It ends with the bits of an undisturbed run."""
    run = tmp_path / "run"
    one, two = hosts
    soon = {"PET_RDZV_CONF": "last_call_timeout=10,keep_alive_interval=1", "DISTVSD_RANKS": "1"}
    job, _ = [start(host, elastic(), run, prior, **SLOWLY, **soon) for host in hosts]
    until_trained(run, hosts)
    reached, began = rounds(run)[-1], time.monotonic()
    two.die()
    deadline = began + PATIENCE_S
    while (rounds(run) or [0])[-1] <= reached + 1:
        assert time.monotonic() < deadline and job.poll() is None, one.log
        time.sleep(0.05)
    seconds = time.monotonic() - began
    assert end_of(job, one) == 0, one.log
    assert re.search(r"rank \d \(host two, pid \d+, last seen in phase '\w+' of round \d+\) does not beat", one.log)
    is_done_as_alone(run, alone, world_size=1)
    figure(f"{seconds:.0f} s from the death of a host to the next round on the other, alone")
