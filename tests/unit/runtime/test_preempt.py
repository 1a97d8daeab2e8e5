"""A signal is a request, noted once and obeyed after the round; the same signal sent again later ends the process."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distvsd.runtime.preempt import ECHO_S, SIGNALS, NothingBegun, Preemption

ROOT = Path(__file__).parents[3]
SMOKE = str(ROOT / "configs/smoke.yaml")


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_noted_and_the_work_goes_on(number: signal.Signals) -> None:
    with Preemption() as preemption:
        assert preemption.requested is None
        send(number)
        assert preemption.requested == number.name


def test_the_same_signal_forwarded_by_a_launcher_a_moment_later_is_one_request() -> None:
    """A terminal and Slurm signal launcher and workers, and the launcher forwards it: every worker gets it twice."""
    clock = Clock()
    with Preemption(clock) as preemption:
        for number in SIGNALS:
            clock.now = 0.0
            send(number)
            clock.now = ECHO_S
            send(number)
        assert preemption.requested == "SIGTERM"


def test_signals_of_different_kinds_are_not_somebody_insisting() -> None:
    """Slurm warns with SIGUSR1 and sends SIGTERM minutes later, when the save may still be running."""
    clock = Clock()
    with Preemption(clock) as preemption:
        send(signal.SIGUSR1)
        clock.now = 300.0
        send(signal.SIGTERM)
        assert preemption.requested == "SIGUSR1"


def test_a_second_interrupt_from_the_keyboard_interrupts() -> None:
    clock = Clock()
    with Preemption(clock):
        send(signal.SIGINT)
        clock.now = ECHO_S + 1
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_second_signal_ends_the_process_with_its_number(number: signal.Signals) -> None:
    def insist() -> None:
        clock = Clock()
        with Preemption(clock):
            send(number)
            clock.now = ECHO_S + 1
            send(number)

    process = multiprocessing.get_context("fork").Process(target=insist)
    process.start()
    process.join(20)
    assert process.exitcode == 128 + number


def test_leaving_puts_the_handlers_back_that_were_there() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ValueError, match="any"), Preemption():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise ValueError("any")
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_on_another_thread_it_leaves_signals_alone_and_takes_requests() -> None:
    seen: list[object] = []

    def run() -> None:
        with Preemption() as preemption:
            seen.append([signal.getsignal(number) for number in SIGNALS])
            preemption.request("the launcher died")
            preemption.request("SIGTERM")
            seen.append(preemption.requested)

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before, "the launcher died"]


def said_and_ended(process: subprocess.Popen[str], name: str) -> None:
    """The error output is one line with the signal and the advice to use the same command; the exit code is 3."""
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert re.fullmatch(rf"distvsd: .*{name}.* the same command .*\n", errors), errors


@pytest.mark.guarantee("G24")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_before_training_has_begun_ends_with_3_and_one_line(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM, SIGUSR1 or SIGINT while a rank still imports: it ends at once with code 3 and one line, and leaves no
    run directory."""
    command = [sys.executable, "-m", "distvsd.train", SMOKE, f"run.dir={tmp_path / 'run'}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while process.poll() is None and not catches(process.pid, signal.SIGUSR1):  # Python itself catches SIGINT earlier
        time.sleep(0.005)
    time.sleep(0.05)
    process.send_signal(number)
    said_and_ended(process, number.name)
    assert not (tmp_path / "run").exists()


def catches(pid: int, number: int) -> bool:
    masks = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "Sig" in line)
    return bool(int(masks["SigCgt"], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("order", ["during", "before"])
def test_a_process_that_waits_for_the_others_is_ended_at_once(order: str) -> None:
    """While the main thread waits in a lock, as in torch, no Python handler runs. A request just before counts too."""
    wait = "print('in', flush=True); threading.Lock().acquire() and lock.acquire()"
    program = (
        "import os, signal, threading\nfrom distvsd.runtime.preempt import Preemption\n"
        "lock = threading.Lock()\nlock.acquire()\n"
        "with Preemption() as preemption:\n"
        f"    if {order == 'before'}: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"    with preemption.nothing_begun(): {wait}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    if order == "during":
        assert process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGTERM)
    said_and_ended(process, "SIGTERM")


def test_what_surrounds_it_hears_of_signals_again() -> None:
    """Handlers and an event loop's wakeup pipe are restored; on another thread neither is changed."""
    heard: list[int] = []

    async def surround() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.append, signal.SIGUSR1)
        before = [signal.getsignal(number) for number in SIGNALS]
        with Preemption() as preemption, preemption.nothing_begun():
            assert [signal.getsignal(number) for number in SIGNALS] != before
        thread = threading.Thread(target=lambda: NothingBegun().__enter__())
        thread.start()
        thread.join()
        assert [signal.getsignal(number) for number in SIGNALS] == before
        send(signal.SIGUSR1)
        await asyncio.sleep(0.05)

    asyncio.run(surround())
    assert heard == [signal.SIGUSR1]
