"""Reference answers as labels, cut to a length and counted; packing of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import Tensor

from yunque.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that no loss counts


class AnswerCollator:
    """Batches of rows of "input_ids" and "labels", padded; for an encoder-decoder with its decoder's inputs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
        from transformers import DataCollatorForSeq2Seq

        self._pad, self._model = DataCollatorForSeq2Seq(tokenizer), model

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """One batch."""
        batch = self._pad([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        if self._model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = decoder_inputs(batch["labels"], self._model)
        return batch


def decoder_inputs(labels_BL: Tensor, model: Any) -> Tensor:
    """What the decoder of ``model`` reads to write ``labels_BL``: its start, then each label but the last.

    By the model's own method, such as mBART's, which puts the language first; M2M100 and Blenderbot have none.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        found: Tensor = own(labels=labels_BL)
        return found
    start = torch.full_like(labels_BL[:, :1], model.config.decoder_start_token_id)
    shifted = torch.cat([start, labels_BL[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id)


def encode_answers(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], max_length: int | None = None
) -> list[list[int]]:
    """Encode answers as the labels of an encoder-decoder, at most ``max_length`` tokens with one of ``eos_ids`` each.

    Where the tokenizer puts no end token after a text, the first of ``eos_ids`` is added: a model that never sees one
    never learns to stop.
    """
    added: Sequence[int] = tokenizer(text_target="")["input_ids"]
    end = [] if set(added) & set(eos_ids) else [eos_ids[0]]
    cut = {} if max_length is None else {"truncation": True, "max_length": max(1, max_length - len(end))}
    rows: list[list[int]] = tokenizer(text_target=list(texts), verbose=False, **cut)["input_ids"]
    return [row if row and row[-1] in eos_ids else [*row, *end] for row in rows]


def encode_targets(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_target_length: int, eos_ids: Sequence[int]
) -> tuple[datasets.Dataset, str]:
    """Rows of "input_ids" and "labels" (the first reference, at most ``max_target_length`` tokens) for a Trainer.

    A cut answer keeps its end token, one of ``eos_ids``. Also returns one line that says how many were cut.
    """
    texts = [references[0] for references in dataset["references"]]
    whole = encode_answers(texts, tokenizer, eos_ids)
    labels = encode_answers(texts, tokenizer, eos_ids, max_target_length)
    lost = [len(full) - len(cut) for full, cut in zip(whole, labels, strict=True) if len(full) > len(cut)]
    report = f"answers: {len(texts):,}, cut to {max_target_length} tokens: {len(lost):,} ({sum(lost):,} tokens lost)"
    return datasets.Dataset.from_dict({"input_ids": list(dataset["input_ids"]), "labels": labels}), report


def encode_continuations(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_target_length: int,
    eos_ids: Sequence[int],
    ending: str = "",
) -> tuple[datasets.Dataset, str]:
    """Rows of "input_ids", prompt and first reference as one sequence, and "labels", -100 on the prompt's tokens.

    The answer with its ``ending`` (a chat template's) has at most ``max_target_length`` tokens, and one of ``eos_ids``
    at or near its end (the first, where the ending has none), so that the model learns to stop; a cut answer keeps
    both. Also returns a line as ``encode_targets``.
    """
    texts = [references[0] for references in dataset["references"]]
    whole = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    end = list(tokenizer(ending, add_special_tokens=False)["input_ids"]) if ending else []
    if not set(end) & set(eos_ids):
        end.append(eos_ids[0])
    room = max(1, max_target_length - len(end))
    input_ids, labels, lost = [], [], []
    for prompt, answer in zip(dataset["input_ids"], whole, strict=True):
        target = [*answer[:room], *end]
        input_ids.append([*prompt, *target])
        labels.append([IGNORED] * len(prompt) + target)
        if len(answer) > room:
            lost.append(len(answer) - room)
    report = f"answers: {len(texts):,}, cut to {max_target_length} tokens: {len(lost):,} ({sum(lost):,} tokens lost)"
    return datasets.Dataset.from_dict({"input_ids": input_ids, "labels": labels}), report


def pack(rows: datasets.Dataset, max_length: int) -> tuple[datasets.Dataset, str]:
    """Whole sequences put together to at most ``max_length`` tokens by TRL's best-fit decreasing, and a line about it.

    Adds "seq_lengths", from which the trainer's positions and attention keep the sequences apart.

    Raises:
        InputError: a sequence is longer than ``max_length``.
    """
    from trl import pack_dataset

    lengths = [len(ids) for ids in rows["input_ids"]]
    if max(lengths) > max_length:
        raise InputError(f"packing_length: a sequence has {max(lengths)} tokens; give at least so many")
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        packed = pack_dataset(rows, max_length)
    finally:
        if shown:
            datasets.enable_progress_bars()
    share = sum(lengths) / (len(packed) * max_length)
    return packed, f"packed {len(rows):,} sequences into {len(packed):,} of up to {max_length} tokens, {share:.0%} full"
