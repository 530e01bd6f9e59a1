"""Held-out rows as the prompts that the evaluated model was made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import datasets

from yunque import artifacts
from yunque.data.arguments import TEXT_FIELD, DataArguments
from yunque.data.chat import MESSAGES, chat_frame
from yunque.data.held_out import HeldOutRows, load_held_out
from yunque.data.prompts import prepare_prompts
from yunque.errors import InputError
from yunque.evaluation.arguments import HeldOutArguments
from yunque.evaluation.generators import Generator


@dataclass(frozen=True)
class EvaluationPrompts:
    """The rows, their prompts as texts and tokens, the template, and notes for the reader."""

    rows: HeldOutRows
    queries: list[str]
    input_ids: list[list[int]]
    template: str
    notes: list[str]

    def __len__(self) -> int:
        return len(self.queries)

    def fingerprint(self) -> str:
        """Hex SHA-256 of ids, prompts and references: equal, and two evaluations may be compared row by row."""
        content = json.dumps([self.rows.ids, self.queries, self.rows.references])
        return hashlib.sha256(content.encode()).hexdigest()

    def batches(self, batch_size: int) -> list[list[int]]:
        """Row numbers decoded together: of similar length, longest first, the same for any number of ranks."""
        order = sorted(range(len(self)), key=lambda row: (-len(self.input_ids[row]), row))
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def prepare(generator: Generator, args: HeldOutArguments, model: str, max_new_tokens: int) -> EvaluationPrompts:
    """Load the rows of ``args`` and put them into the prompt that ``model``'s manifest names, where ``args`` does not.

    Raises:
        InputError: no such data or column; no room for a prompt beside ``max_new_tokens``; no chat template.
    """
    template, chat, system_prompt, notes = _template(args, model)
    data = args.data(template)
    rows = load_held_out(data, split=args.test_split, max_rows=args.max_test_samples, id_column=args.id_column)
    texts = datasets.Dataset.from_dict({"text": rows.texts} | ({MESSAGES: rows.messages} if rows.messages else {}))
    if chat and not rows.messages:
        texts = chat_frame(generator.tokenizer, system_prompt).wrap(texts, template)
    prepared = prepare_prompts(
        texts,
        generator.tokenizer,
        data,
        append_eos=generator.is_encoder_decoder,
        model_limit=generator.prompt_limit(max_new_tokens),
        special_tokens=not chat,
    )
    if len(prepared.dataset) < len(rows.texts):
        raise InputError(
            f"max_prompt_length: {len(rows.texts) - len(prepared.dataset)} conversations are longer; raise it, or "
            "leave them out"
        )
    notes += rows.notes
    if prepared.report.truncated:
        notes.append(str(prepared.report))
    columns = prepared.dataset
    return EvaluationPrompts(rows, list(columns["query"]), list(columns["input_ids"]), template, notes)


def _template(args: HeldOutArguments, model: str) -> tuple[str, bool, str | None, list[str]]:
    """The template, whether it goes into the chat template, after which system turn, what was decided for the user."""
    known, config = artifacts.trained_prompt(model)
    chat = bool(config.get("chat_template")) if args.chat_template is None else args.chat_template
    if args.system_prompt is not None and not chat:
        raise InputError("system_prompt: is for chat_template only; add it or leave system_prompt out")
    trained_so = chat and config.get("chat_template")
    system_prompt = args.system_prompt or (config.get("system_prompt") if trained_so else None)
    if args.prompt_template is not None:
        return args.prompt_template, chat, system_prompt, []
    if known is None:
        notes = ["the model names no prompt template: that of the recipes is used"]
        return DataArguments.prompt_template, chat, system_prompt, notes
    if known.count(TEXT_FIELD) != 1:
        raise InputError(
            f"prompt_template: the model's own has other columns than {TEXT_FIELD} ({known[:60]!r}); give one with it"
        )
    return known, chat, system_prompt, []


def row_share(batches: Sequence[list[int]], done: set[int], rank: int, num_ranks: int) -> list[int]:
    """Numbers of the batches that are not ``done`` and are this rank's to do."""
    return [number for number in range(len(batches)) if number not in done][rank::num_ranks]
