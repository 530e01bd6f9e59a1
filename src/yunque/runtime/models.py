"""Models in ONNX folders: text from prompts, labels from texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from yunque.errors import InputError
from yunque.runtime.batch import REASONS, Batch, Step, new_tokens, sizes
from yunque.runtime.beams import beam_search
from yunque.runtime.options import GenerationOptions
from yunque.runtime.rows import Rows, whole
from yunque.runtime.session import Bound, Verify, check_files, open_sessions
from yunque.runtime.spec import ModelSpec, read_spec
from yunque.runtime.tokenizer import Tokenizer

Prompt = str | Sequence[int]

_PREFILL_TOKENS = 1024
"""Prompts are read in groups of about so many tokens, of similar lengths: what a layer writes stays in the caches."""


@dataclass(frozen=True)
class Answer:
    """A finished text; ``tokens`` ends with the end-of-text token when that is the reason."""

    text: str
    tokens: list[int]
    finish_reason: Literal["eos", "length", "stop"]
    logprobs: list[float] | None = None
    score: float | None = None  # of the best beam


def load(
    folder: str | Path, *, threads: int | None = None, verify: Verify = "sha256"
) -> Seq2SeqModel | CausalModel | Classifier:
    """Open a folder of ``compress/to_onnx.py``; ``threads`` computes with all cores when None.

    Raises:
        InputError: no such folder, a file that is missing or altered, graphs that need a newer ONNX Runtime.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    spec = read_spec(folder)
    kinds: dict[str, type[Seq2SeqModel | CausalModel | Classifier]] = {
        "seq2seq": Seq2SeqModel, "causal": CausalModel, "classifier": Classifier,
    }  # fmt: skip
    return kinds[spec.kind](folder, spec, _open(folder, spec, threads, verify))


def _open(folder: Path, spec: ModelSpec, threads: int | None, verify: Verify) -> dict[str, ort.InferenceSession]:
    """The sessions; content is compared with the manifest meanwhile, by another core."""
    check_files(folder, "none" if verify == "none" else "size")  # what is cut short must not be mapped
    with ThreadPoolExecutor(1) as worker:
        checked = worker.submit(check_files, folder, verify)
        try:
            sessions = open_sessions(folder, spec, threads)
        except InputError:
            checked.result()  # says more of an altered file
            raise
        checked.result()
    return sessions


class _Model:
    """A folder's specification, tokenizer and sessions."""

    def __init__(self, folder: Path, spec: ModelSpec, sessions: Mapping[str, ort.InferenceSession]) -> None:
        self.folder = folder
        self.spec = spec
        self.tokenizer = Tokenizer(folder)
        self._sessions = sessions

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of prompts; those that are token ids already stay."""
        texts = [number for number, prompt in enumerate(prompts) if isinstance(prompt, str)]
        encoded = self.tokenizer.encode([str(prompts[number]) for number in texts])
        ids: list[Any] = list(prompts)
        for number, tokens in zip(texts, encoded, strict=True):
            ids[number] = tokens
        return [list(tokens) for tokens in ids]


class _Generator(_Model):
    """What encoder-decoder and decoder-only models share."""

    def __init__(self, folder: Path, spec: ModelSpec, sessions: Mapping[str, ort.InferenceSession]) -> None:
        super().__init__(folder, spec, sessions)
        self._idle: list[Rows] = []  # of the last call: memory that the system need not give and clear again

    def generate(
        self,
        prompts: Sequence[Prompt],
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        *,
        batch_size: int = 32,
        **values: Any,
    ) -> list[Answer]:
        """Answer ``prompts``, ``batch_size`` at a time; a finished text makes room for the next prompt.

        ``options`` are for all prompts, or one per prompt; ``values`` are fields of one ``GenerationOptions`` instead.

        Raises:
            InputError: an impossible option, a prompt that is empty or too long.
        """
        wanted = self._options(options, values, len(prompts))
        ids = self.encode(prompts)
        beams = [number for number, option in enumerate(wanted) if option.num_beams > 1]
        if beams:
            answers = dict(zip(beams, self._search(beams, ids, wanted, batch_size), strict=True))
            rest = [number for number in range(len(ids)) if number not in answers]
            written = self._write([ids[number] for number in rest], [wanted[number] for number in rest], batch_size)
            answers |= dict(zip(rest, written, strict=True))
            return [answers[number] for number in range(len(ids))]
        return self._write(ids, wanted, batch_size)

    def _search(
        self, numbers: Sequence[int], ids: Sequence[Sequence[int]], options: Sequence[GenerationOptions], size: int
    ) -> list[Answer]:
        """Beam search for some of the prompts."""

        def begin(prompts: Sequence[Sequence[int]], room: Sequence[int]) -> tuple[Rows, list[list[int]]]:
            rows = self.new_rows()
            return rows, self.begin(rows, prompts, room)

        chosen = [options[number] for number in numbers]
        prompts = [ids[number] for number in numbers]
        limits = [new_tokens(self.spec, prompt, option) for prompt, option in zip(prompts, chosen, strict=True)]
        answers = []
        for found, option in zip(beam_search(self.spec, begin, prompts, chosen, limits, size), chosen, strict=True):
            eos = self.spec.eos_token_ids if option.eos_token_ids is None else option.eos_token_ids
            reason: Literal["eos", "length"] = "eos" if found.tokens[-1] in eos else "length"
            text = self.tokenizer.decode(found.tokens)
            answers.append(Answer(text, found.tokens, reason, score=found.score))
        return answers

    def _write(
        self, ids: Sequence[Sequence[int]], wanted: Sequence[GenerationOptions], batch_size: int
    ) -> list[Answer]:
        """Greedy search or sampling for all prompts."""
        tokens: list[list[int]] = [[] for _ in ids]
        logprobs: list[list[float]] = [[] for _ in ids]
        reasons: list[int] = [0] * len(ids)
        for step in self.stream(ids, wanted, batch_size=batch_size):
            for request, token, reason in zip(
                step.requests.tolist(), step.tokens.tolist(), step.reasons.tolist(), strict=True
            ):
                tokens[request].append(token)
                reasons[request] = reason
            if step.logprobs is not None:
                for request, logprob in zip(step.requests.tolist(), step.logprobs.tolist(), strict=True):
                    logprobs[request].append(logprob)
        return [
            self._answer(tokens[number], reasons[number], wanted[number], logprobs[number])
            for number in range(len(ids))
        ]

    def stream(
        self, prompts: Sequence[Sequence[int]], options: Sequence[GenerationOptions], *, batch_size: int = 32
    ) -> Iterator[Step]:
        """Yield every step over ``prompts`` (token ids), whose numbers are the steps' ``requests``."""
        if not prompts:
            return
        limits = [new_tokens(self.spec, prompt, option) for prompt, option in zip(prompts, options, strict=True)]
        needed = [sizes(self.spec, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
        rows = self._idle.pop() if self._idle else self.new_rows()
        rows.restart(min(batch_size, len(prompts)), *map(max, zip(*needed, strict=True)))
        batch = Batch(self.spec, rows, self.begin, self.tokenizer.decode)
        # Long prompts first: they wait for nobody then.
        waiting = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        while waiting or len(batch):
            # Prompts are read together: a few places at a time are not worth the pass.
            free = batch_size - len(batch)
            if waiting and (not len(batch) or free >= min(len(waiting), max(1, batch_size // 8))):
                joining = [waiting.pop() for _ in range(min(free, len(waiting)))]
                batch.add(joining, [prompts[number] for number in joining], [options[number] for number in joining])
            yield batch.step()
        self._idle[:] = [rows]

    def new_batch(self) -> Batch:
        """An empty batch, for callers that let requests join and leave as they come."""
        return Batch(self.spec, self.new_rows(), self.begin, self.tokenizer.decode)

    def new_rows(self) -> Rows:
        """Empty rows of the decoder."""
        return Rows(self._sessions["decoder"], self.spec.vocab_size)

    def begin(self, rows: Rows, prompts: Sequence[Sequence[int]], room: Sequence[int]) -> list[list[int]]:
        """Append rows for ``prompts`` with ``room`` for new tokens each, and compute the logits of their first.

        Returns what the decoder has read of each: its prompt, or the start token.
        """
        raise NotImplementedError

    def _options(
        self,
        options: GenerationOptions | Sequence[GenerationOptions] | None,
        values: Mapping[str, Any],
        count: int,
    ) -> list[GenerationOptions]:
        if options is None:
            try:
                options = GenerationOptions(**values)
            except TypeError as error:
                raise InputError(f"generate: {error}") from error
        elif values:
            raise InputError("generate: give options or their fields by name, not both")
        wanted = [options] * count if isinstance(options, GenerationOptions) else list(options)
        if len(wanted) != count:
            raise InputError(f"generate: {len(wanted)} options for {count} prompts; give one for each, or one")
        return wanted

    def _answer(self, tokens: list[int], reason: int, options: GenerationOptions, logprobs: list[float]) -> Answer:
        name: Any = REASONS[reason]
        text = self.tokenizer.decode(tokens)
        if name == "stop":
            text = text[: min(text.find(ending) for ending in options.stop if ending in text)]
        return Answer(text, tokens, name, logprobs if options.logprobs else None)


class CausalModel(_Generator):
    """A decoder-only model."""

    def begin(self, rows: Rows, prompts: Sequence[Sequence[int]], room: Sequence[int]) -> list[list[int]]:
        """As ``_Generator.begin``; the decoder has read the prompts."""
        needed = max(len(prompt) + more for prompt, more in zip(prompts, room, strict=True))
        first = rows.append(len(prompts), needed).start
        for group in _groups(prompts):
            tokens, lengths = _padded([prompts[number] for number in group], self.spec.max_positions)
            rows.forward(first + group.start, tokens, lengths)
        return [list(prompt) for prompt in prompts]

    def logits(self, prompts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Logits [length, vocabulary] at every position of every prompt."""
        found: list[NDArray[np.float32]] = []
        for prompt in prompts:
            rows = self.new_rows()
            rows.append(1, len(prompt))
            found.append(rows.all_logits(0, np.array([prompt], np.int64))[0])
        return found


class Seq2SeqModel(_Generator):
    """An encoder-decoder model."""

    def begin(self, rows: Rows, prompts: Sequence[Sequence[int]], room: Sequence[int]) -> list[list[int]]:
        """As ``_Generator.begin``; the decoder has read its start token."""
        first = rows.append(len(prompts), 1 + max(room), max(map(len, prompts))).start
        for group in _groups(prompts):
            self._read(rows, first + group.start, [prompts[number] for number in group])
        start = self.spec.decoder_start_token_id
        count = len(prompts)
        rows.forward(first, np.full((count, 1), start, np.int64), np.ones(count, np.int64))
        return [[int(start or 0)] for _ in prompts]

    def _read(self, rows: Rows, first: int, prompts: Sequence[Sequence[int]]) -> None:
        """Give rows from ``first`` on the encoder's keys and values of ``prompts``."""
        tokens, lengths = _padded(prompts, self.spec.max_positions)
        mask = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int64)
        cross = rows.source(first, *tokens.shape)
        Bound(self._sessions["encoder"], {"input_ids": tokens, "attention_mask": mask}, cross).run()
        rows.set_source(first, cross, lengths)

    def logits(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Logits [length + 1, vocabulary] after the start token and after every token of every answer."""
        found: list[NDArray[np.float32]] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            rows = self.new_rows()
            rows.append(1, len(answer) + 1, len(prompt))
            self._read(rows, 0, [prompt])
            found.append(rows.all_logits(0, np.array([[self.spec.decoder_start_token_id, *answer]], np.int64))[0])
        return found


class Classifier(_Model):
    """A sequence classifier."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the columns."""
        return self.spec.labels

    def logits(
        self, texts: Sequence[Prompt], *, max_length: int | None = None, batch_size: int = 32
    ) -> NDArray[np.float32]:
        """Logits [texts, labels]; longer texts are cut to ``max_length`` tokens, the model's limit when None."""
        most = min(max_length or 1 << 30, self.spec.max_positions or 1 << 30)
        ids = [prompt if isinstance(prompt, str) else list(prompt)[:most] for prompt in texts]
        strings = [number for number, prompt in enumerate(ids) if isinstance(prompt, str)]
        cut = self.tokenizer.encode_truncated([str(ids[number]) for number in strings], most)
        for number, tokens in zip(strings, cut, strict=True):
            ids[number] = tokens
        session = self._sessions["classifier"]
        logits = np.empty((len(ids), len(self.labels)), np.float32)
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))  # little padding
        for begin in range(0, len(order), batch_size):
            numbers = order[begin : begin + batch_size]
            rows = [[int(token) for token in ids[number]] for number in numbers]
            padded, lengths = _padded(rows, self.spec.max_positions)
            mask = (np.arange(padded.shape[1]) < lengths[:, None]).astype(np.int64)
            logits[numbers] = session.run(["logits"], {"input_ids": padded, "attention_mask": mask})[0]
        return logits

    def classify(
        self, texts: Sequence[Prompt], *, max_length: int | None = None, batch_size: int = 32
    ) -> list[dict[str, float]]:
        """Probability of every label, for each text; of each label by itself when the model was trained so."""
        logits = self.logits(texts, max_length=max_length, batch_size=batch_size).astype(np.float64)
        if self.spec.independent_labels:
            apart = 1 / (1 + np.exp(-logits))
            return [dict(zip(self.labels, row, strict=True)) for row in apart.tolist()]
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = weights / weights.sum(axis=1, keepdims=True)
        return [dict(zip(self.labels, row, strict=True)) for row in probabilities.tolist()]


def _groups(prompts: Sequence[Sequence[int]]) -> Iterator[range]:
    """Consecutive prompts of at most ``_PREFILL_TOKENS`` tokens with their padding."""
    begin = longest = 0
    for number, prompt in enumerate(prompts):
        longest = max(longest, len(prompt))
        if number > begin and longest * (number + 1 - begin) > _PREFILL_TOKENS:
            yield range(begin, number)
            begin, longest = number, len(prompt)
    yield range(begin, len(prompts))


def _padded(prompts: Sequence[Sequence[int]], max_positions: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids [rows, longest, to whole vectors], filled up with 0 on the right, and their lengths.

    Not beyond ``max_positions``: where that is no whole number of vectors, the last few positions are the one place
    where last bits may depend on the other rows.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    width = min(whole(int(lengths.max())), max_positions or 1 << 30)
    tokens = np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, lengths
