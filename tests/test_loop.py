"""Interrupts of a training loop, in the main thread and elsewhere."""

import os
import signal
import threading

import pytest

from deltadiff.loop import catch_interrupt, end_on_sigterm, exit_code

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def handlers():
    """Handlers of the test's own, so that nothing ends the test's process."""
    earlier = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    yield {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_the_handlers_come_back(number, handlers):
    with pytest.raises(KeyError), catch_interrupt() as received:
        os.kill(os.getpid(), number)
        assert received == [number]
        again = signal.SIG_DFL if number == signal.SIGTERM else handlers[number]
        assert signal.getsignal(number) == again  # the second one is not caught
        raise KeyError
    assert {n: signal.getsignal(n) for n in SIGNALS} == handlers


def test_another_thread_runs_without_catching(handlers):
    found = []

    def run():
        with catch_interrupt() as received:
            found.append(received)
            os.kill(os.getpid(), signal.SIGINT)  # which the main thread gets, as before

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [[]] and {n: signal.getsignal(n) for n in SIGNALS} == handlers


def test_a_handler_that_python_does_not_know_stays(handlers, monkeypatch):
    def unknown(number):
        return None if number == signal.SIGTERM else handlers[number]

    monkeypatch.setattr(signal, "getsignal", unknown)
    with catch_interrupt() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
    monkeypatch.undo()
    assert {n: signal.getsignal(n) for n in SIGNALS} == handlers


def test_sigterm_ends_a_command_as_ctrl_c_does(handlers):
    with pytest.raises(KeyboardInterrupt), end_on_sigterm() as received:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:  # a second one ends the process
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert exit_code(received) == 143 and exit_code([]) == 130
    assert signal.getsignal(signal.SIGTERM) is handlers[signal.SIGTERM]
