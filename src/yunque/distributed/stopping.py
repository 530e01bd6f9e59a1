"""Signals that ask a run to save and stop."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator


class StopSignal:
    """While entered, SIGINT, SIGTERM and SIGUSR1 only leave a note; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.noted = False
        self._answered = False
        self._number = signal.SIGTERM
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self.noted and not self._answered and kind is None:
            signal.raise_signal(self._number)  # it came after the last question: whoever is next shall have it

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any rank has been asked to stop; every rank must ask at the same point."""
        noted = torch.tensor(int(self.noted), device=accelerator.device)
        self._answered = bool(accelerator.reduce(noted, reduction="sum").item())
        return self._answered

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted, self._number = True, signal.Signals(number)
