"""Load what is learnt from: a whole model, an adapter merged into its base, never quantized."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from yunque.compression.arguments import TeacherArguments
from yunque.errors import InputError
from yunque.models.arguments import ModelArguments
from yunque.models.embedded import EMBEDDED, ensure_embedded
from yunque.models.loading import load_model, load_tokenizer, merge_loaded_adapter


def use_embedded_teacher(args: TeacherArguments) -> None:
    """Put the path of the embedded policy where ``args`` say "embedded".

    Raises:
        InputError: the cache folder cannot be written.
    """
    if args.teacher_name_or_path == EMBEDDED:
        args.teacher_name_or_path = str(ensure_embedded().policy)


def load_teacher(args: TeacherArguments, option: str, *, like: Any = None) -> tuple[Any, PreTrainedModel]:
    """Tokenizer and model of ``option``; ``like`` is a tokenizer whose vocabulary it must have.

    Raises:
        InputError: no such model, virtual tokens, another vocabulary.
    """
    options = ModelArguments(
        model_name_or_path=getattr(args, option),
        dtype=args.teacher_dtype,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
        pad_token=args.pad_token,
    )
    try:
        tokenizer = load_tokenizer(options)
        model = load_model(options, tokenizer)
    except InputError as error:
        raise InputError(str(error).replace("model_name_or_path", option, 1)) from error
    if like is not None and tokenizer.get_vocab() != like.get_vocab():
        raise InputError(f"{option}: its vocabulary is not the teacher's; give a model of the same tokenizer")
    return tokenizer, merge_loaded_adapter(model)
