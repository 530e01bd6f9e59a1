"""A running batch of texts: requests join, steps give each its next token, finished ones leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yunque.errors import InputError
from yunque.runtime import sampling
from yunque.runtime.options import GenerationOptions
from yunque.runtime.pieces import PromptReader
from yunque.runtime.rows import Rows
from yunque.runtime.spec import ModelSpec

RUNNING, EOS, LENGTH, STOP = range(4)
REASONS = (None, "eos", "length", "stop")
"""Why a text ended, by the codes of ``Step.reasons``."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """What one step gave, one entry per request that got a token."""

    requests: Ints  # ids that ``add`` was given
    tokens: Ints
    reasons: NDArray[np.int8]  # codes into REASONS; all but RUNNING have left the batch
    logprobs: NDArray[np.float32] | None  # when any request asked for them
    top: tuple[Ints, NDArray[np.float32]] | None = None  # most probable tokens and their log-probabilities [rows, most]

    def only(self, kept: NDArray[np.bool_]) -> Step:
        """The entries of some requests."""
        logprobs = None if self.logprobs is None else self.logprobs[kept]
        top = None if self.top is None else (self.top[0][kept], self.top[1][kept])
        return Step(self.requests[kept], self.tokens[kept], self.reasons[kept], logprobs, top)


@dataclass
class _Row:
    request: int
    options: GenerationOptions
    prompt_length: int
    limit: int  # new tokens
    cancelled: bool = False


@dataclass(frozen=True)
class _Plan:
    """The options of all rows as arrays; made when rows join or leave."""

    requests: Ints
    begins: Ints  # first generated position
    limits: Ints
    min_new: Ints
    eos: Ints  # [rows, most], filled up with -1
    penalty: NDArray[np.float32]
    ngram: Ints
    sampled: NDArray[np.bool_]
    temperature: NDArray[np.float32]
    top_k: Ints
    top_p: NDArray[np.float32]
    seeds: NDArray[np.uint64]
    logprobs: bool
    top_logprobs: int
    stops: list[int]  # rows with stop strings

    @classmethod
    def of(cls, rows: Sequence[_Row], eos: Sequence[tuple[int, ...]]) -> _Plan:
        options = [row.options for row in rows]
        most = max((len(ids) for ids in eos), default=0)

        def column(name: str, dtype: Any) -> NDArray[Any]:
            return np.array([getattr(option, name) for option in options], dtype)

        return cls(
            requests=np.array([row.request for row in rows], np.int64),
            begins=np.array([row.prompt_length for row in rows], np.int64),
            limits=np.array([row.limit for row in rows], np.int64),
            min_new=column("min_new_tokens", np.int64),
            eos=np.array([[*ids, *[-1] * (most - len(ids))] for ids in eos], np.int64).reshape(len(rows), most),
            penalty=column("repetition_penalty", np.float32),
            ngram=column("no_repeat_ngram_size", np.int64),
            sampled=column("do_sample", np.bool_),
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int64),
            top_p=column("top_p", np.float32),
            seeds=column("seed", np.uint64),
            logprobs=any(option.logprobs for option in options),
            top_logprobs=max((option.top_logprobs for option in options), default=0),
            stops=[number for number, option in enumerate(options) if option.stop],
        )


def new_tokens(spec: ModelSpec, prompt: Sequence[int], options: GenerationOptions) -> int:
    """How many new tokens a request may get.

    Raises:
        InputError: an empty prompt, or one that leaves no room for a new token.
    """
    if not len(prompt):
        raise InputError("prompt: is empty; give at least one token")
    most = spec.max_positions
    if most is None:
        return options.max_new_tokens
    if spec.kind == "seq2seq":
        if len(prompt) > most:
            raise InputError(f"prompt: has {len(prompt)} tokens, the model reads {most} at most; shorten it")
        return min(options.max_new_tokens, most - 1)
    if len(prompt) >= most:
        raise InputError(f"prompt: has {len(prompt)} tokens of the model's {most} positions; shorten it")
    return min(options.max_new_tokens, most - len(prompt))


def sizes(spec: ModelSpec, prompt: Sequence[int], new: int) -> tuple[int, int]:
    """Positions of the decoder and of the encoder that a text with ``new`` tokens takes."""
    return (1 + new, len(prompt)) if spec.kind == "seq2seq" else (len(prompt) + new, 0)


class Batch:
    """Texts in the making, whatever their lengths and options.

    ``begin`` puts prompts into empty rows of the decoder and leaves the logits of their first new token there.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rows: Rows,
        begin: Callable[[Rows, Sequence[Sequence[int]], Sequence[int]], list[list[int]]],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._spec = spec
        self._decoder = rows
        self._begin = begin
        self._decode = decode
        self._rows: list[_Row] = []
        self._context: Ints = np.zeros((0, 0), np.int64)  # decoder prompt and new tokens
        self._fresh = 0  # last rows, whose logits are there already
        self._plan: _Plan | None = None

    def __len__(self) -> int:
        """Number of running texts."""
        return len(self._rows)

    def add(
        self, requests: Sequence[int], prompts: Sequence[Sequence[int]], options: Sequence[GenerationOptions]
    ) -> None:
        """Let requests join, whose prompts are token ids; their first tokens come with the next ``step``.

        A prompt of several requests is read once.

        Raises:
            InputError: an empty prompt, or one that leaves no room for a new token.
        """
        room = [new_tokens(self._spec, prompt, option) for prompt, option in zip(prompts, options, strict=True)]
        if not requests:
            return
        same: dict[tuple[int, ...], list[int]] = {}
        for number, prompt in enumerate(prompts):
            same.setdefault(tuple(prompt), []).append(number)
        before = self._decoder.count
        copies = [(before + place, number) for place, numbers in enumerate(same.values()) for number in numbers[1:]]
        try:
            needed = [sizes(self._spec, prompt, more) for prompt, more in zip(prompts, room, strict=True)]
            self._decoder.reserve(before + len(requests), *map(max, zip(*needed, strict=True)))
            most = [max(room[number] for number in numbers) for numbers in same.values()]
            contexts = self._begin(self._decoder, list(same), most)
            if copies:
                self._decoder.copy(self._decoder, [row for row, _ in copies])
        except BaseException:
            self._decoder.truncate(before)  # those that run go on
            raise
        contexts += [contexts[row - before] for row, _ in copies]
        order = [numbers[0] for numbers in same.values()] + [number for _, number in copies]
        rows = [
            _Row(requests[number], options[number], len(context), room[number])
            for number, context in zip(order, contexts, strict=True)
        ]
        self._put(rows, contexts)

    def join(self, requests: Sequence[int], reader: PromptReader, options: Sequence[GenerationOptions]) -> None:
        """As ``add``, for requests whose one prompt has been read piece by piece.

        Raises:
            InputError: as ``add``.
        """
        assert not reader.left, "the prompt is read to its end first"
        prompt = reader.prompt
        room = [new_tokens(self._spec, prompt, option) for option in options]
        self._decoder.copy(reader.rows, [0] * len(requests), len(prompt) + max(room))
        rows = [
            _Row(request, option, len(prompt), limit)
            for request, option, limit in zip(requests, options, room, strict=True)
        ]
        self._put(rows, [prompt] * len(requests))

    def _put(self, rows: list[_Row], contexts: Sequence[Sequence[int]]) -> None:
        """Take in requests whose rows of the decoder are there."""
        first = len(self._rows)
        self._widen(first + len(rows), max(row.prompt_length + row.limit for row in rows))
        for number, context in enumerate(contexts, start=first):
            self._context[number, : len(context)] = context
        self._rows += rows
        self._fresh += len(rows)
        self._plan = None

    def _widen(self, rows: int, width: int) -> None:
        former = self._context
        if rows > former.shape[0] or width > former.shape[1]:
            shape = (max(rows, former.shape[0]), max(width, former.shape[1]))
            self._context = np.zeros(shape, np.int64)
            self._context[: former.shape[0], : former.shape[1]] = former

    def cancel(self, requests: Iterable[int]) -> None:
        """Let requests leave at the next step, which does not mention them any more."""
        gone = set(requests)
        for row in self._rows:
            row.cancelled |= row.request in gone

    def remove(self, requests: Iterable[int]) -> None:
        """Let requests leave at once; not between ``add`` and ``step``."""
        assert not self._fresh, "those that have just joined lie last, and would move"
        gone = set(requests)
        self._drop([number for number, row in enumerate(self._rows) if row.request in gone])

    @property
    def rows(self) -> Rows:
        """The rows of the decoder."""
        return self._decoder

    # --- a step -------------------------------------------------------------------------------------------------------

    def step(self) -> Step:
        """Give those that have just joined their first tokens, or else every request its next; finished ones leave.

        First tokens are there when the prompts are read: they need not wait for a pass over all rows.
        """
        count, plan = len(self._rows), self._plan
        first = count - self._fresh if self._fresh else 0
        if self._fresh:
            plan = self._planned(first)
            self._fresh = 0
        else:
            self._decoder.step(self._context[np.arange(count), self._decoder.lengths[:count]])
            plan = self._plan = plan or self._planned(0)
        # The cache lacks the newest token of every row: its length is the number of tokens before that.
        places = self._decoder.lengths[first:count].astype(np.int64)
        logits, made = self._decoder.logits[first:count], places - plan.begins
        tokens = self._choose(plan, logits, self._context[first:count], places)
        logprobs = sampling.log_probabilities(logits, tokens) if plan.logprobs else None
        top = sampling.top_log_probabilities(logits, plan.top_logprobs) if plan.top_logprobs else None
        self._context[np.arange(first, count), places] = tokens
        reasons = np.zeros(count - first, np.int8)
        reasons[made + 1 >= plan.limits] = LENGTH
        reasons[(tokens[:, None] == plan.eos).any(axis=1)] = EOS
        for row in plan.stops:
            if reasons[row] != EOS and self._hits_stop(first + row, int(places[row]) + 1):
                reasons[row] = STOP
        cancelled = np.array([row.cancelled for row in self._rows[first:]])
        step = Step(plan.requests, tokens, reasons, logprobs, top)
        if cancelled.any():
            step = step.only(~cancelled)
        self._drop((first + np.flatnonzero((reasons != RUNNING) | cancelled)).tolist())
        return step

    def _planned(self, first: int) -> _Plan:
        rows = self._rows[first:]
        return _Plan.of(rows, [self._eos(row.options) for row in rows])

    def _eos(self, options: GenerationOptions) -> tuple[int, ...]:
        return self._spec.eos_token_ids if options.eos_token_ids is None else options.eos_token_ids

    def _choose(self, plan: _Plan, logits: NDArray[np.float32], context: Ints, places: Ints) -> Ints:
        """The next tokens [rows] from ``logits`` [rows, vocabulary], which stay as they are."""
        raw, made = logits, places - plan.begins
        if (plan.penalty != 1).any() or plan.ngram.any():
            logits = logits.copy()
            sampling.penalize_repetition(logits, context, places, plan.penalty)
            sampling.forbid_repeated_ngrams(logits, context, places, plan.ngram)
        early = made < plan.min_new
        if early.any() and plan.eos.shape[1]:
            logits = logits.copy() if logits is raw else logits
            rows, columns = np.nonzero((plan.eos >= 0) & early[:, None])
            logits[rows, plan.eos[rows, columns]] = -np.inf
        if plan.sampled.any():
            rows = np.flatnonzero(plan.sampled)
            tokens = logits.argmax(axis=1) if len(rows) < len(logits) else np.zeros(len(logits), np.int64)
            tokens[rows] = sampling.sample(
                logits[rows], plan.temperature[rows], plan.top_k[rows], plan.top_p[rows],
                sampling.uniform(plan.seeds[rows], made[rows]),
            )  # fmt: skip
        else:
            tokens = logits.argmax(axis=1)
        self._force(plan, tokens, made)
        return np.asarray(tokens, np.int64)

    def _force(self, plan: _Plan, tokens: Ints, made: Ints) -> None:
        """Put in the tokens that the model always begins or ends with."""
        if self._spec.forced_bos_token_id is not None:
            tokens[made == 0] = self._spec.forced_bos_token_id
        if self._spec.forced_eos_token_id is not None and plan.eos.shape[1]:
            tokens[(made + 1 == plan.limits) & (plan.eos >= 0).any(axis=1)] = self._spec.forced_eos_token_id

    def _hits_stop(self, row: int, end: int) -> bool:
        begin = self._rows[row].prompt_length
        stop = self._rows[row].options.stop
        # A token may be a byte of a character: as many tokens as the longest string has bytes cover it.
        reach = max(len(text.encode()) for text in stop) + 4
        text = self._decode(self._context[row, max(begin, end - reach) : end].tolist())
        return any(ending in text for ending in stop)

    def _drop(self, rows: list[int]) -> None:
        if not rows:
            return
        for source, target in self._decoder.remove(rows):
            self._rows[target] = self._rows[source]
            self._context[target] = self._context[source]
        del self._rows[len(self._rows) - len(rows) :]
        self._plan = None
