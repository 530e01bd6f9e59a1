"""The engine of one generating model: a worker thread that steps a batch which requests join and leave."""

from __future__ import annotations

from yunque.runtime.models import CausalModel, Seq2SeqModel
from yunque.serving.engine_settings import EngineSettings
from yunque.serving.metrics import EngineMetrics
from yunque.serving.requests import Request, Stream


class Engine:
    """Makes texts for many requests at once. ``submit`` from an event loop; everything else from any thread."""

    def __init__(self, model: Seq2SeqModel | CausalModel, settings: EngineSettings, metrics: EngineMetrics) -> None:
        self.model = model
        self.settings = settings
        self.metrics = metrics

    @property
    def running(self) -> int:
        """Texts in the batch."""
        raise NotImplementedError

    @property
    def queued(self) -> int:
        """Texts that wait."""
        raise NotImplementedError

    def start(self) -> None:
        """Measure, warm up and begin to work; returns when ready.

        Raises:
            InputError: not even one text fits the memory budget.
        """
        raise NotImplementedError

    def submit(self, request: Request) -> Stream:
        """Queue a request; its events come in the calling event loop.

        Raises:
            QueueFull: too many texts wait; holds the seconds after which to try again.
            Draining: ``drain`` or ``close`` was called.
            InputError: a prompt or options that the model cannot serve.
        """
        raise NotImplementedError

    def drain(self, timeout_s: float) -> bool:
        """Take nothing new, wait until all that was accepted is finished; False when time ran out (blocking)."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop at once: what is unfinished ends with ``cancelled``; frees the model."""
        raise NotImplementedError
