from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from rkd_deploy.signals import StopRequest

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def noted() -> Iterator[list[int]]:
    """Signals that reach the handlers which were there before."""
    signals: list[int] = []
    before = {number: signal.signal(number, lambda n, _: signals.append(n)) for number in SIGNALS}
    yield signals
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_the_second_acts_as_usual(number: signal.Signals, noted: list[int]) -> None:
    with StopRequest() as stop:
        assert stop.signal_name is None
        signal.raise_signal(number)
        assert (stop.signal_name, noted) == (number.name, [])
        signal.raise_signal(number)
        assert (stop.signal_name, noted) == (number.name, [number])


def test_after_the_block_signals_act_as_before(noted: list[int]) -> None:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as stop:
        assert all(signal.getsignal(number) not in handlers for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    signal.raise_signal(signal.SIGTERM)
    assert (stop.signal_name, noted) == (None, [signal.SIGTERM])


def test_also_after_an_exception() -> None:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_in_another_thread_nothing_is_caught_and_nothing_fails() -> None:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    names: list[str | None] = []

    def work() -> None:
        with StopRequest() as stop:
            names.append(stop.signal_name)
            assert [signal.getsignal(number) for number in SIGNALS] == handlers

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert names == [None]
