"""Beam search, with the scores and the stopping rules of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from yunque.runtime import sampling
from yunque.runtime.options import GenerationOptions
from yunque.runtime.rows import Rows
from yunque.runtime.spec import ModelSpec

Ints = NDArray[np.int64]
_NEVER = -1e9


class Hypothesis(NamedTuple):
    """A finished text: its tokens, and its log-probability / length ** length_penalty."""

    score: float
    tokens: list[int]


@dataclass
class _Search:
    """One request: what its beams have finished."""

    request: int
    options: GenerationOptions
    limit: int  # new tokens
    eos: tuple[int, ...]
    finished: list[Hypothesis] = field(default_factory=list)

    def finish(self, log_probability: float, tokens: list[int]) -> None:
        """Keep a finished text while it is among the best; none joins a full list under ``early_stopping``."""
        beams = self.options.num_beams
        if self.options.early_stopping is True and len(self.finished) == beams:
            return
        self.finished.append(Hypothesis(log_probability / len(tokens) ** self.options.length_penalty, tokens))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[beams:]

    def is_over(self, best: float, made: int) -> bool:
        """Whether no running beam, the best with log-probability ``best`` after ``made`` tokens, can still win."""
        options = self.options
        if made >= self.limit:
            return True
        if len(self.finished) < options.num_beams:
            return False
        if options.early_stopping is True:
            return True
        length = self.limit if options.early_stopping == "never" and options.length_penalty > 0 else made
        return best / length**options.length_penalty <= self.finished[-1].score


class BeamSearch:
    """Requests with the same number of beams, all begun at once; request i's beams are rows i * beams and on."""

    def __init__(
        self,
        spec: ModelSpec,
        rows: Rows,
        contexts: Sequence[Sequence[int]],
        searches: Sequence[_Search],
    ) -> None:
        """Take over ``rows``, one for each request, which have read ``contexts``."""
        self._spec = spec
        self._searches = list(searches)
        self._beams = searches[0].options.num_beams
        self._rows = rows
        rows.repeat(self._beams)
        width = max(len(context) + search.limit for context, search in zip(contexts, searches, strict=True))
        self._context: Ints = np.zeros((len(contexts), width), np.int64)
        for row, context in enumerate(contexts):
            self._context[row, : len(context)] = context
        self._context = np.repeat(self._context, self._beams, axis=0)
        self._begins = np.repeat([len(context) for context in contexts], self._beams)
        self._scores = np.full((len(contexts), self._beams), _NEVER, np.float32)
        self._scores[:, 0] = 0  # all beams are equal at first: only one may continue
        self._made = 0

    def run(self) -> dict[int, Hypothesis]:
        """The best text of every request."""
        best: dict[int, Hypothesis] = {}
        while True:
            for search in self._step():
                best[search.request] = search.finished[0]
            if not self._searches:
                return best
            rows = np.arange(len(self._context))
            self._rows.step(self._context[rows, self._begins + self._made - 1])

    def _step(self) -> list[_Search]:
        """Continue every beam by one token; return the requests that are over, which leave."""
        count, beams = len(self._searches), self._beams
        scores, parents, tokens = self._candidates()
        made = self._made + 1
        ended = np.array([np.isin(tokens[i], search.eos) | (made >= search.limit) for i, search in self._enumerated()])
        for request, place in np.argwhere(ended[:, :beams]).tolist():
            parent = request * beams + parents[request, place]
            begin = self._begins[parent]
            text = [*self._context[parent, begin : begin + self._made].tolist(), int(tokens[request, place])]
            self._searches[request].finish(float(scores[request, place]), text)
        going = np.argsort(ended, axis=1, kind="stable")[:, :beams]  # candidates come best first
        self._scores = np.take_along_axis(np.where(ended, scores + np.float32(_NEVER), scores), going, axis=1)
        index = (np.take_along_axis(parents, going, axis=1) + np.arange(count)[:, None] * beams).reshape(-1)
        self._rows.reorder(index)
        self._context = self._context[index]
        newest = np.take_along_axis(tokens, going, axis=1).reshape(-1)
        self._context[np.arange(len(index)), np.minimum(self._begins + self._made, self._context.shape[1] - 1)] = newest
        self._made = made
        return self._leave([i for i, search in self._enumerated() if search.is_over(float(self._scores[i, 0]), made)])

    def _enumerated(self) -> list[tuple[int, _Search]]:
        return list(enumerate(self._searches))

    def _candidates(self) -> tuple[NDArray[np.float32], Ints, Ints]:
        """The best continuations of every request, best first: scores, beams and tokens [requests, candidates]."""
        count, beams = len(self._searches), self._beams
        logits = self._rows.logits[: count * beams]
        scores = logits - logits.max(axis=1, keepdims=True)
        scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
        self._process(scores)
        totals = (scores.reshape(count, beams, -1) + self._scores[:, :, None]).reshape(count, -1)
        most = max(len(search.eos) for search in self._searches)
        width = min(max(2, 1 + most) * beams, totals.shape[1])
        best = np.argpartition(totals, -width, axis=1)[:, -width:]
        order = np.argsort(-np.take_along_axis(totals, best, axis=1), axis=1, kind="stable")
        best = np.take_along_axis(best, order, axis=1)
        size = scores.shape[1]
        return np.take_along_axis(totals, best, axis=1), best // size, best % size

    def _process(self, scores: NDArray[np.float32]) -> None:
        """Penalties of repetition, shortest length and the tokens a text must begin or end with, in place."""
        penalties = np.array([search.options.repetition_penalty for search in self._searches], np.float32)
        if (penalties != 1).any():
            penalty = np.repeat(penalties, self._beams)
            sampling.penalize_repetition(scores, self._context, self._begins + self._made, penalty)
        sizes = np.array([search.options.no_repeat_ngram_size for search in self._searches], np.int64)
        if sizes.any():
            sizes = np.repeat(sizes, self._beams)
            sampling.forbid_repeated_ngrams(scores, self._context, self._begins + self._made, sizes)
        for request, search in self._enumerated():
            rows = slice(request * self._beams, (request + 1) * self._beams)
            if self._made < search.options.min_new_tokens:
                scores[rows, list(search.eos)] = -np.inf
            if self._made == 0 and self._spec.forced_bos_token_id is not None:
                _force(scores[rows], self._spec.forced_bos_token_id)
            if self._made + 1 == search.limit and self._spec.forced_eos_token_id is not None and search.eos:
                _force(scores[rows], self._spec.forced_eos_token_id)

    def _leave(self, over: list[int]) -> list[_Search]:
        if not over:
            return []
        beams = self._beams
        gone = [self._searches[request] for request in over]
        leaving = [request * beams + beam for request in over for beam in range(beams)]
        for source, target in self._rows.remove(leaving):  # whole requests move, since all have as many rows
            self._context[target] = self._context[source]
            self._begins[target] = self._begins[source]
            if source % beams == 0:
                self._searches[target // beams] = self._searches[source // beams]
                self._scores[target // beams] = self._scores[source // beams]
        left = len(self._searches) - len(over)
        del self._searches[left:]
        self._scores = self._scores[:left]
        self._context, self._begins = self._context[: left * beams], self._begins[: left * beams]
        return gone


def _force(scores: NDArray[np.float32], token: int) -> None:
    scores[:] = -np.inf
    scores[:, token] = 0


def beam_search(
    spec: ModelSpec,
    begin: Callable[[Sequence[Sequence[int]], Sequence[int]], tuple[Rows, list[list[int]]]],
    prompts: Sequence[Sequence[int]],
    options: Sequence[GenerationOptions],
    limits: Sequence[int],
    batch_size: int,
) -> list[Hypothesis]:
    """The best text for each of ``prompts``, about ``batch_size`` beams at a time.

    ``begin`` reads prompts into new rows, as ``_Generator.begin`` does.
    """
    found: dict[int, Hypothesis] = {}
    for beams in {option.num_beams for option in options}:
        numbers = [number for number, option in enumerate(options) if option.num_beams == beams]
        numbers.sort(key=lambda number: len(prompts[number]))
        size = max(1, batch_size // beams)
        for first in range(0, len(numbers), size):
            chosen = numbers[first : first + size]
            rows, contexts = begin([prompts[number] for number in chosen], [limits[number] for number in chosen])
            searches = []
            for number in chosen:
                eos = options[number].eos_token_ids
                eos = spec.eos_token_ids if eos is None else eos
                searches.append(_Search(number, options[number], limits[number], eos))
            found |= BeamSearch(spec, rows, contexts, searches).run()
    return [found[number] for number in range(len(prompts))]
