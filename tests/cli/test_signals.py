"""The relay of signals, where Python alone would lose one."""

import signal
import threading

import pytest

from nonroot.cli.signals import FATAL, InterruptedBySignal, SignalRelay
from tests.waiting import PATIENCE


def signal_beside_the_main_thread(number: signal.Signals, begin: threading.Event) -> threading.Thread:
    """A thread that takes a signal itself: Python notes it, and nothing ends the main thread's sleep on a lock."""

    def take() -> None:
        begin.wait()
        signal.pthread_kill(threading.get_ident(), number)
        signal.pthread_sigmask(signal.SIG_BLOCK, FATAL)  # a call, so that the signal has come

    thread = threading.Thread(target=take)
    thread.start()
    return thread


def test_a_signal_that_did_not_wake_the_main_thread_is_forwarded() -> None:
    forwarded = threading.Event()
    numbers: list[int] = []

    def forward(number: int) -> None:
        numbers.append(number)
        forwarded.set()

    begin = threading.Event()
    with SignalRelay(lambda: None) as relay:
        relay.forward_to(forward)
        thread = signal_beside_the_main_thread(signal.SIGINT, begin)
        begin.set()
        assert forwarded.wait(PATIENCE)
        thread.join()
    assert numbers == [signal.SIGINT]


def test_a_signal_that_did_not_wake_the_main_thread_interrupts_it() -> None:
    begin = threading.Event()
    with SignalRelay(lambda: None) as relay:
        thread = signal_beside_the_main_thread(signal.SIGTERM, begin)
        lock = threading.Lock()
        lock.acquire()
        begin.set()
        with pytest.raises(InterruptedBySignal) as caught:
            lock.acquire(timeout=PATIENCE)
        thread.join()
    assert caught.value.number == relay.killed_by == signal.SIGTERM


def test_a_terminal_that_changed_before_anybody_heard_of_it_is_looked_at() -> None:
    looked = threading.Event()
    with SignalRelay(lambda: None) as relay:
        signal.raise_signal(signal.SIGWINCH)
        relay.forward_to(None, looked.set)
        assert looked.wait(PATIENCE)


def test_what_was_set_before_is_set_again() -> None:
    host_handlers = [signal.getsignal(number) for number in (*FATAL, signal.SIGWINCH, signal.SIGURG)]
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with SignalRelay(lambda: None):
        assert signal.getsignal(signal.SIGTERM) != host_handlers[1]
    assert [signal.getsignal(number) for number in (*FATAL, signal.SIGWINCH, signal.SIGURG)] == host_handlers
    assert signal.set_wakeup_fd(before) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "nonroot-poke"]
