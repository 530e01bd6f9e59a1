import signal

import pytest
from accelerate import Accelerator

from yunque.distributed.stopping import StopSignal

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_noted_and_former_handlers_come_back(number):
    accelerator, former = Accelerator(cpu=True), signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.agreed(accelerator)
        signal.raise_signal(number)
        assert stop.agreed(accelerator)
    assert signal.getsignal(number) is former


def test_repeated_sigterm_is_patient_and_a_second_interrupt_is_not():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed(Accelerator(cpu=True))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_after_the_last_question_reaches_the_former_handler(number):
    seen = []
    former = signal.signal(number, lambda number, frame: seen.append(number))
    try:
        with StopSignal() as stop:
            assert not stop.agreed(Accelerator(cpu=True))
            signal.raise_signal(number)
        assert seen == [number]
    finally:
        signal.signal(number, former)
