"""Sequence classifiers to train: a pretrained body under a head of the user's labels or one reward; what it reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yunque.data import chat
from yunque.data.encoding import encode
from yunque.errors import InputError
from yunque.models.arguments import ModelArguments

if TYPE_CHECKING:
    import datasets
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "adapter"


def load_to_classify(args: ModelArguments, tokenizer: Any, label_names: Sequence[str]) -> PreTrainedModel | PeftModel:
    """Load the model of ``args`` with a head for ``label_names``, new where the checkpoint has none of that size.

    ``use_peft`` adds a LoRA adapter, beside which the head trains whole.

    Raises:
        InputError: the architecture has no classification form, or LoRA targets that match no layer.
    """
    from yunque.models.start_check import read_checked

    return read_checked(_load_to_classify)(args, tokenizer, label_names)


def _load_to_classify(args: ModelArguments, tokenizer: Any, label_names: Sequence[str]) -> PreTrainedModel | PeftModel:
    from peft import TaskType
    from transformers import AutoModelForSequenceClassification

    from yunque.models.copying import tied_by_whole_weights
    from yunque.models.loading import add_lora

    name = str(args.model_name_or_path)
    try:
        with tied_by_whole_weights():
            model = AutoModelForSequenceClassification.from_pretrained(
                name,
                revision=args.model_revision,
                dtype=args.dtype,
                attn_implementation=args.attn_implementation,
                trust_remote_code=args.trust_remote_code,
                id2label=dict(enumerate(label_names)),
                label2id={label: number for number, label in enumerate(label_names)},
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model_name_or_path: cannot make a classifier of {name}: {error}") from error
    if model.config.is_encoder_decoder and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise InputError(
            "launch profile fsdp2: reward: checkpoints of an encoder-decoder's classification head cannot be written; "
            "take zero3"
        )
    model.config.pad_token_id = tokenizer.pad_token_id  # decoder-only classifiers look for the last token before it
    return add_lora(model, args, TaskType.SEQ_CLS) if args.use_peft else model


def save_classifier(
    model: Any, tokenizer: Any, folder: Path, *, merge: bool, weights: dict[str, Any] | None = None
) -> None:
    """Write a plain classifier folder; of a model with LoRA the merged one and, unless ``merge``, ``adapter`` in it.

    Merged because that is what every reader of classifiers loads: an adapter's base has another head. ``weights`` are
    the gathered ones of a model that is split over ranks.
    """
    from peft import PeftModel

    from yunque.models.loading import save_model

    save_model(model, tokenizer, folder, merge=True, weights=weights)
    if isinstance(model, PeftModel) and not merge:
        model.save_pretrained(str(folder / ADAPTER), state_dict=weights)
        model.config.save_pretrained(folder / ADAPTER)  # the names of the labels, which PEFT does not keep
        tokenizer.save_pretrained(folder / ADAPTER)


def encode_texts(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[datasets.Dataset, str]:
    """Tokenize "text" to at most ``max_length`` tokens, "label" becoming "labels"; and say how many texts were cut.

    Raises:
        InputError: ``max_length`` is more than the tokenizer allows.
    """
    import datasets

    if max_length > tokenizer.model_max_length:
        raise InputError(f"max_length: {max_length} is more than the {tokenizer.model_max_length} the model reads")
    texts = list(dataset["text"])
    whole = encode(tokenizer, texts)
    cut = encode(tokenizer, texts, truncation=True, max_length=max_length)
    lost = [len(full) - len(kept) for full, kept in zip(whole, cut, strict=True) if len(full) > len(kept)]
    report = f"texts: {len(texts):,}, cut to {max_length} tokens: {len(lost):,} ({sum(lost):,} tokens lost)"
    return datasets.Dataset.from_dict({"input_ids": cut, "labels": list(dataset["label"])}), report


def pair_texts(
    dataset: datasets.Dataset, answer: str, reward_text: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[str]:
    """What a reward model reads of each pair: prompt and its ``answer`` ("chosen" or "rejected"), or the answer.

    Messages are read by the chat template of ``tokenizer``, if it has one.
    """
    answers = list(dataset[answer])
    if reward_text == "response":
        return answers
    if chat.MESSAGES in dataset.column_names and tokenizer is not None and tokenizer.chat_template:
        pairs = [chat.pair_texts(tokenizer, row) for row in dataset[chat.MESSAGES]]
        return [pair["prompt"] + pair[answer] for pair in pairs]
    return [prompt + text for prompt, text in zip(dataset["prompt"], answers, strict=True)]


def encode_pairs(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, reward_text: str
) -> tuple[datasets.Dataset, str]:
    """Tokenize to "chosen_ids" and "rejected_ids", the *last* ``max_length`` tokens of each; and say what was cut.

    The answer stands at the end, and rewards.ClassifierScorer cuts there as well. "margin" stays.

    Raises:
        InputError: ``max_length`` is more than the tokenizer allows.
    """
    import datasets

    if max_length > tokenizer.model_max_length:
        raise InputError(f"max_length: {max_length} is more than the {tokenizer.model_max_length} the model reads")
    tokenizer.truncation_side = "left"
    columns: dict[str, Any] = {}
    cut = 0
    for answer in ("chosen", "rejected"):
        texts = pair_texts(dataset, answer, reward_text, tokenizer)
        whole = encode(tokenizer, texts)
        kept = encode(tokenizer, texts, truncation=True, max_length=max_length)
        cut += sum(len(full) > len(part) for full, part in zip(whole, kept, strict=True))
        columns[f"{answer}_ids"] = kept
    alike = sum(first == second for first, second in zip(*columns.values(), strict=True))
    if alike == len(dataset):
        raise InputError(f"max_length: of all {alike:,} pairs the last {max_length} tokens are equal; raise it")
    if "margin" in dataset.column_names:
        columns["margin"] = list(dataset["margin"])
    report = f"texts: {2 * len(dataset):,}, cut to their last {max_length} tokens: {cut:,}, pairs alike then: {alike:,}"
    return datasets.Dataset.from_dict(columns), report
