"""Sequence classifiers to train: a pretrained body under a head of the user's labels, and the texts it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from yunque.errors import InputError
from yunque.models.arguments import ModelArguments

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_to_classify(args: ModelArguments, tokenizer: Any, label_names: Sequence[str]) -> PreTrainedModel:
    """Load the model of ``args`` with a head for ``label_names``, new where the checkpoint has none of that size.

    Raises:
        InputError: the architecture has no classification form.
    """
    from transformers import AutoModelForSequenceClassification

    name = str(args.model_name_or_path)
    try:
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
    model.config.pad_token_id = tokenizer.pad_token_id  # decoder-only classifiers look for the last token before it
    return model


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
    whole = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    cut = tokenizer(texts, return_attention_mask=False, truncation=True, max_length=max_length)["input_ids"]
    lost = [len(full) - len(kept) for full, kept in zip(whole, cut, strict=True) if len(full) > len(kept)]
    report = f"texts: {len(texts):,}, cut to {max_length} tokens: {len(lost):,} ({sum(lost):,} tokens lost)"
    return datasets.Dataset.from_dict({"input_ids": cut, "labels": list(dataset["label"])}), report
