"""How close a quantized model is to the float model it was made from: logits, greedy choices, divergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from yunque import runtime
from yunque.data.encoding import encode
from yunque.errors import InputError
from yunque.export.source import Source
from yunque.models.adapter import adapter_for
from yunque.models.arguments import GenerationArguments, ModelArguments
from yunque.models.inference import load_for_inference
from yunque.models.loading import load_classifier
from yunque.models.positions import fixed_rotary_limit
from yunque.rl.rollout import generate
from yunque.runtime.spec import SPEC

_BATCH = 16
_LONGEST_PROMPT = 512  # where positions are relative: more would take long and show nothing else

Logits = Callable[[Sequence[int], Sequence[int]], NDArray[np.float32]]
"""From a prompt and an answer to the logits [answer, vocabulary] of its tokens; of a classifier [1, labels]."""


@dataclass(frozen=True)
class Text:
    """A prompt and the float model's own answer; none of a classifier."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Fidelity:
    """What the comparison found, over the tokens of the float model's greedy answers."""

    prompts: int
    source: str
    tokens: int
    max_logit_difference: float
    greedy_agreement: float  # share of tokens that are the other model's first choice too
    kl_mean: float  # KL(float || quantized) of the next token in nats
    kl_max: float

    def __str__(self) -> str:
        """One line for the user."""
        return (
            f"against float32 on {self.prompts} prompts ({self.source}): largest logit difference "
            f"{self.max_logit_difference:.2g}, greedy choices equal {self.greedy_agreement:.1%} of {self.tokens:,}, "
            f"KL {self.kl_mean:.2g} nats a token (largest {self.kl_max:.2g})"
        )


# --- texts ------------------------------------------------------------------------------------------------------------


def longest_prompt(source: Source, new_tokens: int) -> int:
    """Tokens of a prompt that leave room for ``new_tokens``."""
    positions = fixed_rotary_limit(source.config)
    if source.config.model_type == "t5" or not positions:
        return _LONGEST_PROMPT
    if source.kind == "causal":
        positions -= new_tokens
    if source.config.model_type == "roberta":
        positions -= source.config.pad_token_id + 1
    return max(1, int(positions))


def write_texts(
    source: Source, prompts: Sequence[str], option: str, *, new_tokens: int, max_tokens: int | None = None
) -> tuple[list[Text], int]:
    """Prompts with the model's own greedy answers of up to ``new_tokens``, and how many were too long.

    ``option`` is where they come from.

    Raises:
        InputError: no prompt is left.
    """
    most = min(longest_prompt(source, new_tokens), max_tokens or 1 << 30)
    encoded = encode(source.tokenizer, prompts)
    rows = sorted((row for row in encoded if 0 < len(row) <= most), key=len)
    if not rows:
        raise InputError(
            f"{option}: all {len(encoded)} prompts are empty or longer than {most} tokens; give shorter ones"
        )
    answers: list[list[int]] = [[] for _ in rows]
    if source.kind != "classifier":
        answers = _answers(source, rows, new_tokens)
    return [Text(row, answer) for row, answer in zip(rows, answers, strict=True)], len(encoded) - len(rows)


def _answers(source: Source, rows: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    adapter = adapter_for(source.model, source.tokenizer)
    adapter.pad_id = adapter.pad_id or 0  # masked wherever it stands
    options = GenerationArguments(temperature=0, max_new_tokens=new_tokens)
    answers = []
    for start in range(0, len(rows), _BATCH):
        queries = rows[start : start + _BATCH]
        numbers = range(start, start + len(queries))
        made = generate(source.model, adapter, queries, options, seed=0, samples=numbers, device=torch.device("cpu"))
        answers += [response.tokens for response in made]
    return answers


def run_over(source: Source, texts: Sequence[Text]) -> None:
    """Let the torch model read every text, one at a time: padding would be among what its layers see."""
    logits = torch_logits(source.model, source.kind)
    for text in texts:
        logits(text.prompt, text.answer)


# --- models -----------------------------------------------------------------------------------------------------------


def torch_logits(model: Any, kind: str) -> Logits:
    """Of a torch model."""

    @torch.inference_mode()
    def logits(prompt: Sequence[int], answer: Sequence[int]) -> NDArray[np.float32]:
        ids = torch.tensor([list(prompt)])
        if kind == "classifier":
            return np.asarray(model(input_ids=ids).logits.float().numpy())
        if kind == "seq2seq":
            start = model.generation_config.decoder_start_token_id
            if start is None:
                start = model.config.decoder_start_token_id
            inputs = torch.tensor([[start, *answer[:-1]]])
            output = model(input_ids=ids, decoder_input_ids=inputs, use_cache=False)
            return np.asarray(output.logits[0].float().numpy())
        output = model(input_ids=torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False)
        return np.asarray(output.logits[0, len(prompt) - 1 :].float().numpy())

    return logits


def folder_logits(folder: Path, kind: str) -> Logits:
    """Of a folder, loaded as its users load it."""
    if not (folder / SPEC).is_file():
        if kind == "classifier":
            return torch_logits(load_classifier(str(folder), "model_name_or_path")[0], kind)
        return torch_logits(load_for_inference(ModelArguments(model_name_or_path=str(folder))).model, kind)
    model = runtime.load(folder, verify="none")

    def logits(prompt: Sequence[int], answer: Sequence[int]) -> NDArray[np.float32]:
        if isinstance(model, runtime.Classifier):
            return model.logits([prompt])
        if isinstance(model, runtime.Seq2SeqModel):
            return model.logits([prompt], [answer[:-1]])[0]
        return model.logits([[*prompt, *answer[:-1]]])[0][len(prompt) - 1 :]

    return logits


# --- comparison -------------------------------------------------------------------------------------------------------


def measure_fidelity(source: Source, quantized: Logits, texts: Sequence[Text], origin: str) -> Fidelity:
    """Compare over ``texts``, whose answers are the float model's greedy ones."""
    reference = torch_logits(source.reference, source.kind)
    differences, divergences, equal, tokens = [], [], 0, 0
    for text in texts:
        theirs, ours = (logits(text.prompt, text.answer) for logits in (reference, quantized))
        differences.append(float(np.abs(theirs - ours).max()))
        if theirs.shape[1] == 1:  # a score: the two sides of it are what there is to choose
            theirs, ours = (np.pad(logits, ((0, 0), (0, 1))) for logits in (theirs, ours))
        equal += int((theirs.argmax(axis=1) == ours.argmax(axis=1)).sum())
        tokens += len(theirs)
        p, q = _log_softmax(theirs), _log_softmax(ours)
        divergences.append((np.exp(p) * (p - q)).sum(axis=1))
    kl = np.concatenate(divergences)
    return Fidelity(
        len(texts), origin, tokens, float(np.max(differences)), equal / tokens, float(kl.mean()), float(kl.max())
    )


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
