"""Signals are requests: noted once, obeyed after the round; only somebody who insists ends the process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import pytest

from distvsd.runtime.preempt import ECHO_S, SIGNALS, Preemption


class Clock:
    """Seconds that pass only when told to."""

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
    """Slurm warns with SIGUSR1 and sends SIGTERM minutes later, while the state may still be being saved."""
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
