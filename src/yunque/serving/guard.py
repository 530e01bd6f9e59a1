"""A classifier beside a generating model: answers are scored, and held back, flagged or counted."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import replace

from yunque.errors import InputError
from yunque.serving.classifier_engine import ClassifierEngine
from yunque.serving.engine_settings import GuardSettings
from yunque.serving.metrics import EngineMetrics
from yunque.serving.requests import DeadlinePassed, Event, Refused, Stream

_SENTENCE = re.compile(r"[.!?\u3002\uff01\uff1f]['\"\u201d)\]]*\s|\n")


class Guard:
    """Scores texts with a classifier.

    Raises:
        InputError: the classifier has no such label.
    """

    def __init__(self, classifier: ClassifierEngine, settings: GuardSettings) -> None:
        self.classifier = classifier
        self.settings = settings
        labels = classifier.model.labels
        if settings.label and settings.label not in labels:
            raise InputError(f"guard_label: {settings.label!r} is none of the classifier's: {', '.join(labels)}")

    async def score(self, text: str) -> float:
        """Probability that ``text`` is what the guard looks for; of an empty text 0.

        Of a text longer than the classifier reads, it is the highest of its parts'.
        """
        if not text.strip():
            return 0.0
        return max(self._chosen(scores) for scores in await self.classifier.classify(self._parts(text), client="guard"))

    def _parts(self, text: str) -> list[str]:
        most = self.classifier.model.spec.max_positions
        tokens = len(self.classifier.model.tokenizer.encode([text])[0])
        if most is None or tokens <= most:
            return [text]
        words = text.split()
        size = max(1, len(words) * (most - 2) // (2 * tokens))  # half of what fits: words differ in tokens
        return [" ".join(words[begin : begin + size]) for begin in range(0, len(words), size)]

    def _chosen(self, scores: dict[str, float]) -> float:
        if self.settings.label:
            return scores[self.settings.label]
        others = list(scores.values())[1:] or list(scores.values())
        return max(others) if self.classifier.model.spec.independent_labels else min(1.0, sum(others))

    async def watch(self, stream: Stream, metrics: EngineMetrics) -> AsyncIterator[Event]:
        """The stream's events as the settings let them out; last events carry the score.

        ``flag`` and ``pass`` let text out as it comes. ``block`` with release "answer" holds a text until it is whole:
        what scores too high ends with finish reason ``content_filter`` and no text. With release "sentence", text goes
        out up to the end of every sentence once all of it so far has scored low enough; the rest is never shown.
        Tokens and log-probabilities are held back with their text. Where no text is left, the request is cancelled.
        """
        held: dict[int, _Held] = {index: _Held() for index in range(stream.request.n)}
        blocked = 0
        async for event in stream:
            text = held[event.index]
            if text.is_blocked:
                continue
            text.add(event)
            if event.finish_reason is not None or (self._by_sentence and text.ends_sentence()):
                try:
                    text.score = max(text.score, await self.score(text.all))
                except (Refused, DeadlinePassed):
                    if self._holds:  # what cannot be scored is not shown
                        text.is_blocked = True
                        yield Event("", finish_reason="error", index=event.index, error="the guard cannot score now")
                        continue
            elif self._holds:
                continue
            too_high = text.score >= self.settings.threshold
            if self._holds and too_high:
                text.is_blocked = True
                metrics.guarded("blocked")
                yield Event("", finish_reason="content_filter", index=event.index, score=text.score)
                blocked += 1
                if blocked == stream.request.n:
                    stream.cancel()
                    return
                continue
            last = text.release()
            if last.finish_reason is not None:
                metrics.guarded("flagged" if too_high else "passed")
                last = replace(last, score=None if self.settings.action == "pass" else text.score)
            yield last

    @property
    def _by_sentence(self) -> bool:
        return self._holds and self.settings.release == "sentence"

    @property
    def _holds(self) -> bool:
        return self.settings.action == "block"


class _Held:
    """What of one text waits for its score."""

    def __init__(self) -> None:
        self.all = ""
        self.score = 0.0
        self.is_blocked = False
        self._events: list[Event] = []
        self._since = 0  # length of the text when it was last scored

    def add(self, event: Event) -> None:
        self.all += event.text
        self._events.append(event)

    def ends_sentence(self) -> bool:
        """Whether a sentence has ended since the last time, and nothing has begun behind it."""
        new = self.all[self._since :]
        ends = [match.end() for match in _SENTENCE.finditer(new)]
        if not ends:
            return False
        self._since = len(self.all)
        return True

    def release(self) -> Event:
        """All that was held, as one event."""
        events, self._events = self._events, []
        logprobs = [part for event in events for part in event.logprobs or ()]
        return replace(
            events[-1],
            text="".join(event.text for event in events),
            tokens=tuple(token for event in events for token in event.tokens),
            logprobs=tuple(logprobs) if logprobs else None,
        )
