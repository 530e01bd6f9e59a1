"""Which of two answers is better by the constitution: asked in both orders, so that a liking for one place cancels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from yunque.rl.constitution import Constitution, Principle, fill
from yunque.rl.writing import Writer

FIRST, SECOND = "a", "b"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    prompt: str
    first: str
    second: str


@dataclass(frozen=True)
class Verdict:
    """Who is preferred, "a" or "b", or None for an abstention; by what margin, and by which principles.

    margin: log-odds (votes of an endpoint) for the first answer, averaged over both orders and over the principles.
    unreadable: comparisons without a result, since the judge answered neither A nor B or could not read the prompt.
    """

    preferred: str | None
    margin: float
    principles: tuple[str, ...]
    unreadable: int


def judge(
    pairs: Sequence[Pair], constitution: Constitution, writer: Writer, *, min_margin: float, max_new_tokens: int
) -> list[Verdict]:
    """Judge each pair by the principles of first priority; only what they leave open goes on to the next priority.

    With x(A, B) the judge's log-odds of A against B, the margin of answer a against b is (x(a, b) - x(b, a)) / 2: a
    judge that always says A has 0. Where it is at most ``min_margin`` at every priority, the verdict is an abstention.
    """
    verdicts = [Verdict(None, 0.0, (), 0) for _ in pairs]
    open_places = list(range(len(pairs)))
    for level in constitution.levels:
        if not open_places:
            break
        prompts = [text for place in open_places for one in level for text in _both(constitution, one, pairs[place])]
        odds = writer.log_odds(prompts, max_new_tokens)
        for number, place in enumerate(open_places):
            first = number * len(level) * 2
            own = odds[first : first + len(level) * 2]
            verdicts[place] = _verdict(own, level, min_margin, verdicts[place].unreadable)
        open_places = [place for place in open_places if verdicts[place].preferred is None]
    return verdicts


def _both(constitution: Constitution, principle: Principle, pair: Pair) -> list[str]:
    question = {"prompt": pair.prompt, "question": principle.preference_question}
    frame = constitution.frames.preference
    return [
        fill(frame, first=pair.first, second=pair.second, **question),
        fill(frame, first=pair.second, second=pair.first, **question),
    ]


def _verdict(odds: Sequence[float | None], level: Sequence[Principle], min_margin: float, unreadable: int) -> Verdict:
    margins = []
    for forwards, backwards in zip(odds[::2], odds[1::2], strict=True):
        unreadable += (forwards is None) + (backwards is None)
        # one order alone would carry its position bias into the pair
        margins.append(0.0 if forwards is None or backwards is None else (forwards - backwards) / 2)
    margin = sum(margins) / len(margins)
    preferred = None if abs(margin) <= min_margin else FIRST if margin > 0 else SECOND
    return Verdict(preferred, margin, tuple(principle.id for principle in level), unreadable)
