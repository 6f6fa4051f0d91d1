"""Signals: the first one is kept, a second SIGINT interrupts, the old handlers come back."""

import os
import signal

import pytest

from experiments.interrupt import StopSignal

pytestmark = pytest.mark.slow

BOTH = [signal.SIGINT, signal.SIGTERM]


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("first", BOTH)
def test_a_second_sigint_interrupts_at_once_and_a_second_sigterm_does_not(first):
    with StopSignal() as stop:
        send(first)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.received is first
        send(signal.SIGTERM)
    assert stop.received is signal.SIGTERM


@pytest.mark.parametrize("number", BOTH)
def test_handlers_come_back_even_after_an_error(number):
    before = signal.getsignal(number)
    with pytest.raises(ZeroDivisionError), StopSignal():
        assert signal.getsignal(number) != before
        raise ZeroDivisionError
    assert signal.getsignal(number) is before
