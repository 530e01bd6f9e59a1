"""Proof that an exported folder reads, writes and chats in the torch model's own tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yunque.errors import CheckFailed, InputError
from yunque.runtime.chat_template import ChatTemplate, TemplateFailed, read_chat_template
from yunque.runtime.tokenizer import Tokenizer

_TEXTS = (
    "What is 12.5 % of 80, and why?",
    "No: it isn't Tom 's , it's Ana's ...",
    "  two  spaces,\ta tab\nand a line\n\n",
    "¿Dónde está el niño? ¡Allí!",
    "日本語と한국어, עברית, ไทย",
    "😀👩‍👩‍👧 é ﬁ ½",
    "def f(x):\n    return x<=1",
)
_TURNS = (("user", "Hello"), ("assistant", "Hi, and <b>&</b>\n"), ("user", "¿Qué tal?"))


def check_texts(tokenizer: Any, folder: Path, *, chats: bool) -> None:
    """Check that ``folder``'s files give the tokens and texts that ``tokenizer`` of transformers gives.

    With ``chats`` its chat template, if it has one, must give the same prompts.

    Raises:
        InputError: a chat template that is not valid, or leaves out what a user says.
        CheckFailed: other tokens, texts or prompts.
    """
    ours = Tokenizer(folder)
    for text in _TEXTS:
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        if ours.encode([text]) != [ids]:
            raise CheckFailed(f"tokenizer.json: {text!r} becomes other tokens than transformers' tokenizer makes of it")
        written = tokenizer.decode(ids, skip_special_tokens=True)
        if "\ufffd" not in written and ours.decode(ids) != written:
            raise CheckFailed(f"tokenizer.json: the tokens of {text!r} become another text than transformers makes")
    if not chats:
        return
    try:
        template = read_chat_template(folder)
    except TemplateFailed as error:
        raise InputError(
            f"model_name_or_path: {error}; mend chat_template.jinja, or remove it for a model without chats"
        ) from error
    if template is not None:
        _check_chats(tokenizer, template)


def _check_chats(tokenizer: Any, template: ChatTemplate) -> None:
    turns = [{"role": role, "content": content} for role, content in _TURNS]
    for chat in (turns[:1], turns, [{"role": "system", "content": "Be kind."}, *turns]):
        theirs = chat
        if template.parts:
            theirs = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat]  # type: ignore[dict-item]
        try:
            expected = str(tokenizer.apply_chat_template(theirs, tokenize=False, add_generation_prompt=True))
        except Exception:  # whatever a template raises: no such role, or a bug of its own
            expected = None
        try:
            found = template.render(chat)
        except TemplateFailed:
            found = None
        if found != expected:
            raise CheckFailed("chat_template.jinja: renders other prompts than transformers does")
