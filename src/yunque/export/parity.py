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
    logit_scale: float  # root mean square of torch's logits, of a language model about each token's mean
    tokens_compared: int
    tokens_equal: int
    ties: int  # unequal tokens whose two logits differ by less than the tolerance times the scale

    def __str__(self) -> str:
        """One line for the user."""
        return (
            f"parity on {self.prompts} prompts ({self.source}): largest logit difference "
            f"{self.max_logit_difference:.1e} of logits of {self.logit_scale:.2g}, {self.tokens_equal:,} of "
            f"{self.tokens_compared:,} greedy choices equal, "
            f"{self.ties} ties"
        )


# --- prompts ----------------------------------------------------------------------------------------------------------


def find_prompts(
    source: Source, dataset: str | None, split: str, column: str | None, most: int
) -> tuple[list[str], str]:
    """Texts to compare on, and where they come from: ``dataset``, else the model's own data, else a few built in.

    Raises:
        InputError: ``dataset`` cannot be read.
    """
    manifest = _manifest(source.name)
    template = (manifest.prompt_template if manifest else None) or "{text}"
    known = manifest.config.get("text_column") if manifest else None
    column = column or known or (DataArguments.text_column if template != "{text}" else "text")
    if dataset is not None:
        return [template.replace("{text}", text) for text in _texts(dataset, split, column, most)], dataset
    for data in manifest.data if manifest else ():
        name = str(data.get("name"))
        if Path(name).exists():
            try:
                return [template.replace("{text}", text) for text in _texts(name, split, column, most)], name
            except InputError:
                continue  # moved, or of another form: the built-in prompts do
    return [_BUILT_IN[index % len(_BUILT_IN)] for index in range(min(most, len(_BUILT_IN)))], "built in"


def _manifest(name: str) -> artifacts.Manifest | None:
    return artifacts.read_manifest(name) if (Path(name) / artifacts.MANIFEST).is_file() else None


def _texts(dataset: str, split: str, column: str, most: int) -> list[str]:
    readers = open_source(SourceArguments(dataset_name=dataset))
    arguments = SourceArguments(dataset_name=dataset, train_split=next(iter(readers)) if len(readers) == 1 else split)
    raw = readers[find_split(arguments, readers, "train_split")]()
    if column not in raw.columns:
        raise InputError(f"parity_text_column: {dataset} has no column {column}; it has {', '.join(raw.columns)}")
    texts = [str(row[column]) for row in raw.rows if row.get(column)]
    if not texts:
        raise InputError(f"parity_dataset: {dataset} has no text in column {column}")
    stride = max(1, len(texts) // most)
    return texts[::stride][:most]


# --- comparison -------------------------------------------------------------------------------------------------------


def check_parity(
    source: Source, folder: Path, prompts: Sequence[str], origin: str, *, tokens: int, tolerance: float
) -> Parity:
    """Compare ``folder`` with the torch model on ``prompts``.

    Raises:
        CheckFailed: a logit differs by more than ``tolerance`` allows, or a greedy token without being a tie.
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

    ``tolerance`` is a share of the logits' scale: the rounding errors of float32 grow with the numbers.

    Raises:
        CheckFailed: a logit differs by more, or a greedy token without being a tie.
    """
    largest = max(parity.max_logit_difference, parity.max_step_difference)
    if not largest <= tolerance * parity.logit_scale:  # a NaN fails too
        raise CheckFailed(
            f"parity: logits differ by up to {largest:.2e} from torch, {largest / (parity.logit_scale or 1):.1e} of "
            f"their size, more than --parity_tolerance {tolerance:.0e}"
        )
    if parity.tokens_equal + parity.ties < parity.tokens_compared:
        wrong = parity.tokens_compared - parity.tokens_equal - parity.ties
        raise CheckFailed(f"parity: {wrong} of {parity.tokens_compared} greedy choices differ from torch's")
    return parity


def compare_labels(source: Source, ids: Sequence[Sequence[int]], ours: NDArray[np.float32], origin: str) -> Parity:
    """``ours`` [texts, labels] against torch's logits of the same texts."""
    theirs = np.concatenate([source.model(torch.tensor([list(row)])).logits.numpy() for row in ids])
    difference, scale = float(np.abs(ours - theirs).max()), float(np.sqrt(np.square(theirs).mean()))
    equal = int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
    return Parity(len(ids), origin, difference, 0.0, scale, len(ids), equal, 0)


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
    differences, steps, squares = [0.0], [0.0], []
    wrong_gaps = [np.zeros(0, np.float32)]
    compared = prompts = 0
    for row in written:
        prompts += 1
        theirs = _torch_logits(source, start, row.prompt, row.tokens)
        differences.append(float(np.abs(row.logits - theirs).max()))
        chosen = np.array(row.tokens)
        places, best = np.arange(len(chosen)), theirs.argmax(axis=1)
        steps.append(float(np.abs(log_softmax(theirs)[places, chosen] - row.logprobs).max()))
        wrong = (best != chosen)[skipped:]
        wrong_gaps.append((theirs[places, best] - theirs[places, chosen])[skipped:][wrong])
        squares.append(float(np.square(theirs - theirs.mean(axis=1, keepdims=True)).mean()))
        compared += len(wrong)
    scale, gaps = float(np.sqrt(np.mean(squares))), np.concatenate(wrong_gaps)
    ties = int((gaps <= tolerance * scale).sum())
    largest = (float(np.max(differences)), float(np.max(steps)))
    return Parity(prompts, origin, *largest, scale, compared, compared - len(gaps), ties)


def _torch_logits(source: Source, start: int | None, prompt: list[int], answer: list[int]) -> NDArray[np.float32]:
    """Torch's logits [answer, vocabulary] for every token of ``answer``."""
    if source.kind == "seq2seq":
        output = source.model(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *answer[:-1]]]), use_cache=False
        )
        return np.asarray(output.logits[0].numpy())
    output = source.model(input_ids=torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False)
    return np.asarray(output.logits[0, len(prompt) - 1 :].numpy())


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities [rows, vocabulary] of logits."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
