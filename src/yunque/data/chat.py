"""The tokenizer's chat template as plain text around a prompt and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import datasets

from yunque.data.arguments import TEXT_FIELD
from yunque.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _ASSISTANT = "«the user's words»", "«the assistant's words»"


@dataclass(frozen=True)
class ChatFrame:
    """What the template writes before the user's words, between them and the answer, and behind the answer."""

    head: str
    tail: str
    ending: str

    def wrap(self, rows: datasets.Dataset, template: str) -> datasets.Dataset:
        """Rows with "head" and "tail" inside the chat; where they have none, those of ``template``."""
        if "head" in rows.column_names:
            heads, tails = list(rows["head"]), list(rows["tail"])
        else:
            head, _, tail = template.partition(TEXT_FIELD)
            heads, tails = [head] * len(rows), [tail] * len(rows)
        columns = {name: list(rows[name]) for name in rows.column_names}
        columns |= {"head": [self.head + head for head in heads], "tail": [tail + self.tail for tail in tails]}
        return datasets.Dataset.from_dict(columns)


def chat_frame(tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> ChatFrame:
    """Take the template apart around one user's turn and one answer.

    Raises:
        InputError: the tokenizer has no template, or one that does not go on from its own prompt with the answer.
    """
    if not tokenizer.chat_template:
        raise InputError("chat_template: the tokenizer has none; leave it out, or take an instruct model's tokenizer")
    turns = [{"role": "system", "content": system_prompt}] if system_prompt else []
    turns.append({"role": "user", "content": _USER})
    try:
        prompt = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        answer = {"role": "assistant", "content": _ASSISTANT}
        whole = str(tokenizer.apply_chat_template([*turns, answer], tokenize=False))
    except Exception as error:  # whatever a Jinja template raises, such as "no system role"
        raise InputError(f"chat_template: the tokenizer's template fails: {error}") from error
    head, user, tail = prompt.partition(_USER)
    between, assistant, ending = whole.removeprefix(head + user + tail).partition(_ASSISTANT)
    if not user or not assistant or between or not whole.startswith(prompt):
        raise InputError(
            "chat_template: this template writes something else before an answer than before a generated one, so"
            " that training would not meet what the model is asked later; use prompt_templates"
        )
    return ChatFrame(head, tail, ending)
