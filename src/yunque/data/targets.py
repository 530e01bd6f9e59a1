"""Reference answers as labels, cut to a length and counted; packing of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import Tensor

from yunque.data.chat import MESSAGES, ChatFrame, encode_conversation
from yunque.data.encoding import common_length
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
    frame: ChatFrame | None = None,
) -> tuple[datasets.Dataset, str]:
    """Rows of "input_ids", prompt and first reference as one sequence, and "labels", -100 on the prompt's tokens.

    The answer has at most ``max_target_length`` tokens, and one of ``eos_ids`` at or near its end (the first, where it
    has none), so that the model learns to stop; a cut answer keeps it. With ``frame`` prompt, answer and what the
    chat template writes behind it are one text, whose tokens are the template's. Also returns a line as
    ``encode_targets``.
    """
    texts = [references[0] for references in dataset["references"]]
    prompts, end, stop = list(dataset["input_ids"]), [], [eos_ids[0]]
    if frame is None:
        whole = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        chats = [query + frame.answer(text) for query, text in zip(dataset["query"], texts, strict=True)]
        joint = tokenizer(chats, add_special_tokens=False, verbose=False)["input_ids"]
        borders = [common_length(prompt, ids) for prompt, ids in zip(prompts, joint, strict=True)]
        prompts = [prompt[:border] for prompt, border in zip(prompts, borders, strict=True)]
        whole = [ids[border:] for ids, border in zip(joint, borders, strict=True)]
        end = list(tokenizer(frame.ending, add_special_tokens=False)["input_ids"]) if frame.ending else []
        stop = stop if not set(end) & set(eos_ids) else []
    end += stop
    room = max(1, max_target_length - len(end))
    input_ids, labels, lost = [], [], []
    for prompt, answer in zip(prompts, whole, strict=True):
        target = [*answer, *stop]
        if len(target) > room + len(end):
            lost.append(len(target) - room - len(end))
            target = [*answer[:room], *end]
        input_ids.append([*prompt, *target])
        labels.append([IGNORED] * len(prompt) + target)
    report = f"answers: {len(texts):,}, cut to {max_target_length} tokens: {len(lost):,} ({sum(lost):,} tokens lost)"
    return datasets.Dataset.from_dict({"input_ids": input_ids, "labels": labels}), report


def encode_conversations(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[datasets.Dataset, str]:
    """Rows of "input_ids", whole conversations by the chat template, and "labels", -100 on all but what trains.

    A conversation loses what is beyond ``max_length`` tokens. Also returns a line that says how many did.

    Raises:
        InputError: as ``encode_conversation``, or a conversation of which nothing is left to train on.
    """
    input_ids, labels, lost = [], [], []
    for number, row in enumerate(dataset[MESSAGES], 1):
        ids, trained = encode_conversation(tokenizer, row)
        lost.append(max(0, len(ids) - (max_length or len(ids))))
        target = [token if said else IGNORED for token, said in zip(ids, trained, strict=True)][:max_length]
        if set(target) == {IGNORED}:
            raise InputError(f"max_target_length: of conversation {number} no answer is left; raise it")
        input_ids.append(ids[:max_length])
        labels.append(target)
    cut = [count for count in lost if count]
    report = f"conversations: {len(labels):,}, cut to {max_length} tokens: {len(cut):,} ({sum(cut):,} tokens lost)"
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
