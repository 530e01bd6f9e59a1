"""A classifier beside a generating model: answers are scored, and held back, flagged or counted."""

from __future__ import annotations

from collections.abc import AsyncIterator

from yunque.serving.classifier_engine import ClassifierEngine
from yunque.serving.engine_settings import GuardSettings
from yunque.serving.metrics import EngineMetrics
from yunque.serving.requests import Event, Stream


class Guard:
    """Scores texts with a classifier."""

    def __init__(self, classifier: ClassifierEngine, settings: GuardSettings) -> None:
        self.classifier = classifier
        self.settings = settings

    async def score(self, text: str) -> float:
        """Probability that ``text`` is what the guard looks for."""
        raise NotImplementedError

    def watch(self, stream: Stream, metrics: EngineMetrics) -> AsyncIterator[Event]:
        """The stream's events as the settings let them out.

        A blocked text ends with finish reason ``content_filter`` and its request is cancelled; last events carry the
        score.
        """
        raise NotImplementedError
