"""The engine of one classifier: texts that arrive within a few milliseconds are scored together."""

from __future__ import annotations

from collections.abc import Sequence

from yunque.runtime.models import Classifier
from yunque.serving.engine_settings import ClassifierSettings
from yunque.serving.metrics import EngineMetrics


class DeadlinePassed(Exception):
    """Not done in time."""


class ClassifierEngine:
    """Scores texts of many requests at once; ``start``, ``drain`` and ``close`` as ``Engine``'s."""

    def __init__(self, model: Classifier, settings: ClassifierSettings, metrics: EngineMetrics) -> None:
        self.model = model
        self.settings = settings
        self.metrics = metrics

    async def classify(
        self, texts: Sequence[str], *, client: str = "", deadline_s: float | None = None
    ) -> list[dict[str, float]]:
        """The probability of every label, for each text; texts that are too long are cut.

        Raises:
            QueueFull: too many texts wait.
            Draining: ``drain`` or ``close`` was called.
            DeadlinePassed: not done in time.
        """
        raise NotImplementedError
