"""The proof that an exported folder is the model it was made from: same logits, same greedy tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from yunque import artifacts, runtime
from yunque.data.arguments import DataArguments, SourceArguments
from yunque.data.loading import find_split, open_source
from yunque.errors import CheckFailed, InputError
from yunque.export.source import Source

_BUILT_IN = (
    "Summarize the following conversation.\n\n#Person1#: Hello, how are you today?\n#Person2#: I'm fine, thank you. "
    "I have lost my umbrella in the train.\n#Person1#: Oh no. Did you ask at the station?\n\nSummary:",
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "Translate English to German: The house is wonderful and the garden is large.",
    "The committee will meet on Thursday at half past nine to discuss the budget of the coming year.",
    "Yes.",
    "What is the capital of France, and which river runs through it?",
    "He opened the door, looked around the empty room, and slowly put the letter back on the table without a word.",
    "You are the worst player that this team has ever had, and everybody knows it!",
)
"""Where the model's own data is not at hand."""


@dataclass(frozen=True)
class Parity:
    """What the comparison found."""

    prompts: int
    source: str
    max_logit_difference: float
    max_step_difference: float  # of log-probabilities chosen step by step over the cache
    tokens_compared: int
    tokens_equal: int
    ties: int  # unequal tokens whose two logits differ by less than the limit
    logit_scale: float  # spread (root mean square) of torch's logits, which float32's own error grows with

    def __str__(self) -> str:
        """One line for the user."""
        return (
            f"parity on {self.prompts} prompts ({self.source}): largest logit difference "
            f"{self.max_logit_difference:.1e} (spread {self.logit_scale:.1f}), "
            f"{self.tokens_equal:,} of {self.tokens_compared:,} greedy choices equal, "
            f"{self.ties} ties"
        )


# --- prompts ----------------------------------------------------------------------------------------------------------


def find_prompts(
    source: Source, dataset: str | None, split: str, column: str | None, most: int, options: str = "parity"
) -> tuple[list[str], str]:
    """Texts to compare on, and where they come from: ``dataset``, else the model's own data, else a few built in.

    Raises:
        InputError: ``dataset`` cannot be read; the message names the option, ``options``_dataset and its kin.
    """
    manifest = _manifest(source.name)
    template = (manifest.prompt_template if manifest else None) or "{text}"
    known = manifest.config.get("text_column") if manifest else None
    column = column or known or (DataArguments.text_column if template != "{text}" else "text")
    if dataset is not None:
        return [template.replace("{text}", text) for text in _texts(dataset, split, column, most, options)], dataset
    for data in manifest.data if manifest else ():
        name = str(data.get("name"))
        if Path(name).exists():
            try:
                return [template.replace("{text}", text) for text in _texts(name, split, column, most, options)], name
            except InputError:
                continue  # moved, or of another form: the built-in prompts do
    return [_BUILT_IN[index % len(_BUILT_IN)] for index in range(min(most, len(_BUILT_IN)))], "built in"


def _manifest(name: str) -> artifacts.Manifest | None:
    return artifacts.read_manifest(name) if (Path(name) / artifacts.MANIFEST).is_file() else None


def _texts(dataset: str, split: str, column: str, most: int, options: str) -> list[str]:
    try:
        readers = open_source(SourceArguments(dataset_name=dataset))
        only = next(iter(readers)) if len(readers) == 1 else split
        raw = readers[find_split(SourceArguments(dataset_name=dataset, train_split=only), readers, "train_split")]()
    except InputError as error:  # of the loader, which knows its own options only
        raise InputError(_renamed(str(error), options)) from error
    if column not in raw.columns:
        raise InputError(f"{options}_text_column: {dataset} has no column {column}; it has {', '.join(raw.columns)}")
    texts = [str(row[column]) for row in raw.rows if row.get(column)]
    if not texts:
        raise InputError(f"{options}_dataset: {dataset} has no text in column {column}")
    stride = max(1, len(texts) // most)
    return texts[::stride][:most]


def _renamed(message: str, options: str) -> str:
    return message.replace("dataset_name", f"{options}_dataset").replace("train_split", f"{options}_split")


# --- comparison -------------------------------------------------------------------------------------------------------


def check_parity(
    source: Source, folder: Path, prompts: Sequence[str], origin: str, *, tokens: int, tolerance: float
) -> Parity:
    """Compare ``folder`` with the torch model on ``prompts``, an adapter as it was before merging.

    Raises:
        CheckFailed: a logit differs by more than ``tolerance``, or a greedy token without being a tie.
    """
    exported = runtime.load(folder, verify="none")
    with torch.inference_mode():
        if isinstance(exported, runtime.Classifier):
            ids = exported.tokenizer.encode_truncated(prompts, exported.spec.max_positions or 512)
            parity = compare_labels(source, ids, exported.logits(ids), origin)
        else:
            parity = _compare_tokens(source, exported, prompts, origin, tokens, tolerance)
    return passed(parity, tolerance)


def passed(parity: Parity, tolerance: float) -> Parity:
    """``parity``, if it is one.

    Raises:
        CheckFailed: a logit differs by more than ``tolerance`` times the logits' spread (at least 1), or a greedy token
            without being a tie.
    """
    largest = max(parity.max_logit_difference, parity.max_step_difference)
    limit = _limit(tolerance, parity.logit_scale)
    if not largest <= limit:  # a NaN fails too
        raise CheckFailed(
            f"parity: logits differ by up to {largest:.2e} from torch, more than {limit:.1e} (--parity_tolerance "
            f"{tolerance:.0e} times their spread, {parity.logit_scale:.1f}); nothing was written"
        )
    if parity.tokens_equal + parity.ties < parity.tokens_compared:
        wrong = parity.tokens_compared - parity.tokens_equal - parity.ties
        raise CheckFailed(f"parity: {wrong} of {parity.tokens_compared} greedy choices differ from torch's")
    return parity


def compare_labels(source: Source, ids: Sequence[Sequence[int]], ours: NDArray[np.float32], origin: str) -> Parity:
    """``ours`` [texts, labels] against torch's logits of the same texts."""
    theirs = np.concatenate([source.reference(torch.tensor([list(row)])).logits.numpy() for row in ids])
    difference = float(np.abs(ours - theirs).max())
    equal = int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
    return Parity(len(ids), origin, difference, 0.0, len(ids), equal, 0, float(np.sqrt(np.square(theirs).mean())))


def _limit(tolerance: float, scale: float) -> float:
    return tolerance * max(1.0, scale)


@dataclass(frozen=True)
class Written:
    """What an exported model wrote greedily to a prompt; logits are [tokens, vocabulary]."""

    prompt: list[int]
    tokens: list[int]
    logprobs: NDArray[np.float64]
    logits: NDArray[np.float32]


def _compare_tokens(
    source: Source,
    exported: runtime.Seq2SeqModel | runtime.CausalModel,
    prompts: Sequence[str],
    origin: str,
    tokens: int,
    tolerance: float,
) -> Parity:
    most = exported.spec.max_positions
    tokens = min(tokens, most // 2) if most else tokens
    ids = [row[: most - tokens] if most else row for row in exported.encode(prompts) if row]
    if not ids:
        raise InputError("parity_dataset: no prompt has a token; give other texts")
    answers = exported.generate(ids, max_new_tokens=tokens, eos_token_ids=(), logprobs=True)

    def written() -> Iterator[Written]:
        for prompt, answer in zip(ids, answers, strict=True):
            if isinstance(exported, runtime.Seq2SeqModel):
                logits = exported.logits([prompt], [answer.tokens[:-1]])[0]
            else:
                logits = exported.logits([[*prompt, *answer.tokens[:-1]]])[0][len(prompt) - 1 :]
            yield Written(prompt, answer.tokens, np.array(answer.logprobs), logits)

    skipped = int(exported.spec.forced_bos_token_id is not None)
    return against_torch(source, written(), origin, tolerance, exported.spec.decoder_start_token_id, skipped)


def against_torch(
    source: Source, written: Iterable[Written], origin: str, tolerance: float, start: int | None, skipped: int = 0
) -> Parity:
    """Torch reads the answers that were written greedily: where every choice is its own too, so is the answer.

    ``start`` begins an encoder-decoder's answers; the first ``skipped`` tokens are no choices.
    """
    differences, steps, squares, equal, ties, compared, prompts = [0.0], [0.0], [0.0], 0, 0, 0, 0
    for row in written:
        prompts += 1
        theirs = _torch_logits(source, start, row.prompt, row.tokens)
        differences.append(float(np.abs(row.logits - theirs).max()))
        squares.append(float(theirs.var(axis=1).mean()))  # a shift of a whole row is none of its spread
        chosen = np.array(row.tokens)
        places, best = np.arange(len(chosen)), theirs.argmax(axis=1)
        steps.append(float(np.abs(log_softmax(theirs)[places, chosen] - row.logprobs).max()))
        wrong = (best != chosen)[skipped:]
        gaps = (theirs[places, best] - theirs[places, chosen])[skipped:]
        compared += len(wrong)
        equal += int((~wrong).sum())
        ties += int((wrong & (gaps <= _limit(tolerance, squares[-1] ** 0.5))).sum())
    scale = float(np.sqrt(np.mean(squares[1:]))) if prompts else 0.0
    return Parity(prompts, origin, float(np.max(differences)), float(np.max(steps)), compared, equal, ties, scale)


def _torch_logits(source: Source, start: int | None, prompt: list[int], answer: list[int]) -> NDArray[np.float32]:
    """Torch's logits [answer, vocabulary] for every token of ``answer``."""
    if source.kind == "seq2seq":
        output = source.reference(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *answer[:-1]]]), use_cache=False
        )
        return np.asarray(output.logits[0].numpy())
    output = source.reference(input_ids=torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False)
    return np.asarray(output.logits[0, len(prompt) - 1 :].numpy())


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities [rows, vocabulary] of logits."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
