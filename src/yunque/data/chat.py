"""Conversations by the tokenizer's chat template: read, rendered, and which of their tokens an assistant says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeGuard

import datasets

from yunque.data.arguments import TEXT_FIELD
from yunque.errors import InputError
from yunque.runtime.chat_template import TemplateFailed, in_parts, reads_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGES = "messages"
"""Column of prepared rows that holds a conversation as JSON: "prompt", "answer", and "all" where all turns train."""

ASSISTANT = "assistant"
_USER, _ASSISTANT = "«the user's words»", "«the assistant's words»"
_ROLES = {"human": "user", "gpt": ASSISTANT, "bot": ASSISTANT}  # ShareGPT's names
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, Any]


# --- reading ----------------------------------------------------------------------------------------------------------


def is_conversation(value: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether ``value`` is a list of messages: of "role" and "content", or ShareGPT's "from" and "value"."""
    listed = isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(each, Mapping) for each in value)
    return listed and not {"role", "from"}.isdisjoint(value[0])


def read_messages(value: Sequence[Mapping[str, Any]], where: str) -> list[Message]:
    """Messages of "role", "content" and whatever else they have that is not null.

    Raises:
        InputError: a message without a role or a content; ``where`` begins the line.
    """
    messages = []
    for number, given in enumerate(value, 1):
        message = {name: part for name, part in given.items() if part is not None}
        if "from" in message and "role" not in message:
            message["role"], message["content"] = message.pop("from"), message.pop("value", None)
        role = _ROLES.get(message.get("role", ""), message.get("role"))
        content = message.get("content")
        if not isinstance(role, str) or not (isinstance(content, str | list) or "tool_calls" in message):
            raise InputError(f"{where}: message {number} has no role or no content; give both")
        messages.append({**message, "role": role})
    return messages


def content_of(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content may be a list of parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def conversation_row(prompt: Sequence[Message], answer: Sequence[Message], *, train_all: bool) -> dict[str, Any]:
    """What a prepared row keeps of a conversation: its last question, the reference answer and all messages."""
    questions = [content_of(message) for message in prompt if message["role"] != ASSISTANT]
    return {
        "text": questions[-1] if questions else "",
        "references": [content_of(message) for message in answer[-1:]],
        MESSAGES: json.dumps({"prompt": prompt, "answer": answer, "all": train_all}),
    }


# --- rendering --------------------------------------------------------------------------------------------------------


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ask: bool) -> str:
    """The conversation as text; with ``ask`` up to where the assistant's next answer begins.

    Raises:
        InputError: the tokenizer has no template, or one that does not take these messages.
    """
    if not tokenizer.chat_template:
        raise InputError("chat_template: the tokenizer has none; leave it out, or take an instruct model's tokenizer")
    try:
        turns = _as_read(tokenizer, messages)
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))
    except TemplateFailed as error:
        raise InputError(f"chat_template: {error}") from error
    except Exception as error:  # whatever a Jinja template raises, such as "no system role"
        raise InputError(f"chat_template: the tokenizer's template does not take the messages: {error}") from error


def _as_read(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    """Messages with contents in the form that the tokenizer's template reads: texts, or lists of parts."""
    if _reads_parts(tokenizer, str(tokenizer.chat_template)):
        return in_parts(messages)
    return [
        {**message, "content": content_of(message)} if _is_text(message.get("content")) else message
        for message in messages
    ]


def _is_text(content: Any) -> bool:
    return isinstance(content, list) and all(part.get("type") == "text" for part in content)


@lru_cache(maxsize=8)
def _reads_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """As ``reads_parts``; ``template`` is that of ``tokenizer``, which may get another."""
    return reads_parts(lambda chat: str(tokenizer.apply_chat_template(chat, tokenize=False)))


def prompt_text(tokenizer: PreTrainedTokenizerBase, row: str) -> str:
    """The prompt of a prepared row's conversation."""
    return render(tokenizer, json.loads(row)["prompt"], ask=True)


def pair_texts(tokenizer: PreTrainedTokenizerBase, row: str) -> dict[str, str]:
    """Texts of "prompt", "chosen" and "rejected" of a prepared pair's conversations, as they follow each other."""
    pair = json.loads(row)
    prompt = render(tokenizer, pair["prompt"], ask=True)
    texts = {}
    for name in ("chosen", "rejected"):
        whole = render(tokenizer, [*pair["prompt"], *pair[name]], ask=False)
        if not whole.startswith(prompt):
            raise InputError(_OTHER_ANSWERS)
        texts[name] = whole.removeprefix(prompt)
    return {"prompt": prompt, **texts}


_OTHER_ANSWERS = (
    "chat_template: this template writes something else before an answer than before a generated one, so that training"
    " would not meet what the model is asked later; use prompt_templates"
)


Trim = tuple[bool, bool]
"""Whether a template takes the white space off the left and off the right of a message."""


@dataclass(frozen=True)
class ChatFrame:
    """What the template writes before the user's words, between them and the answer, and around the answer.

    ``beginning`` is the space that Llama 2's, Mistral's and Vicuna's put before an answer but not before a generated
    one: it is the answer's own. ``trims`` and ``trims_answer``: Llama's and Gemma's templates take off white space.
    """

    head: str
    tail: str
    beginning: str
    ending: str
    trims: Trim = (False, False)
    trims_answer: Trim = (False, False)

    def wrap(self, rows: datasets.Dataset, template: str) -> datasets.Dataset:
        """Rows with "head" and "tail" inside the chat; where they have none, those of ``template``."""
        if "head" in rows.column_names:
            heads, tails = list(rows["head"]), list(rows["tail"])
        else:
            head, _, tail = template.partition(TEXT_FIELD)
            heads, tails = [head] * len(rows), [tail] * len(rows)
        columns = {name: list(rows[name]) for name in rows.column_names}
        texts = list(zip(heads, rows["text"], tails, strict=True))
        heads, columns["text"], tails = map(list, zip(*(_trimmed(parts, self.trims) for parts in texts), strict=True))
        columns |= {"head": [self.head + head for head in heads], "tail": [tail + self.tail for tail in tails]}
        return datasets.Dataset.from_dict(columns)

    def answer(self, text: str) -> str:
        """An answer as the template writes it behind the prompt."""
        return self.beginning + _trimmed(("", text, ""), self.trims_answer)[1] + self.ending


def _trimmed(parts: tuple[str, str, str], trim: Trim) -> tuple[str, str, str]:
    """Head, text and tail whose whole has no white space on the left, on the right, where ``trim`` says so."""
    head, text, tail = parts
    if trim[0]:
        head = head.lstrip()
        text = text if head else text.lstrip()
    if trim[1]:
        tail = tail.rstrip()
        text = text if tail else text.rstrip()
    return head, text, tail


def chat_frame(tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> ChatFrame:
    """Take the template apart around one user's turn and one answer.

    Raises:
        InputError: the tokenizer has no template, or one that does not go on from its own prompt with the answer.
    """
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []

    def rendered(user: str, *answers: str) -> str:
        turns = [{"role": "user", "content": user}, *({"role": ASSISTANT, "content": answer} for answer in answers)]
        return render(tokenizer, [*system, *turns], ask=not answers)

    prompt, whole = rendered(_USER), rendered(_USER, _ASSISTANT)
    head, user, tail = prompt.partition(_USER)
    beginning, assistant, ending = whole.removeprefix(prompt).partition(_ASSISTANT)
    if not user or not assistant or beginning.strip() or not whole.startswith(prompt):
        raise InputError(_OTHER_ANSWERS)
    padded, answered = rendered(f" {_USER} "), rendered(_USER, f" {_ASSISTANT} ")
    trims = (f"{head} {_USER}" not in padded, f"{_USER} {tail}" not in padded)
    trims_answer = (f"{prompt}{beginning} {_ASSISTANT}" not in answered, f"{_ASSISTANT} {ending}" not in answered)
    return ChatFrame(head, tail, beginning, ending, trims, trims_answer)


# --- tokens -----------------------------------------------------------------------------------------------------------


def encode_conversation(tokenizer: PreTrainedTokenizerBase, row: str) -> tuple[list[int], list[bool]]:
    """Token ids of a prepared row's conversation, as ``apply_chat_template`` has them, and which of them train.

    Those are the assistant's, ends of turns included: by the template's own marks (``{% generation %}``), or where the
    renderings up to each answer and through it show it to stand.

    Raises:
        InputError: no template, no fast tokenizer, or an answer whose place cannot be shown.
    """
    chat = json.loads(row)
    messages = [*chat["prompt"], *chat["answer"]]
    whole = render(tokenizer, messages, ask=False)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("chat_template: messages need a fast tokenizer (tokenizer.json), which knows tokens' places")
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, places = list(encoded["input_ids"]), encoded["offset_mapping"]
    since = 0 if chat["all"] else len(render(tokenizer, chat["prompt"], ask=False))
    if _GENERATION.search(str(tokenizer.chat_template)):
        marked: Any = tokenizer.apply_chat_template(
            _as_read(tokenizer, messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        spoken = [bool(mask) for mask in marked["assistant_masks"]]
    else:
        first = 0 if chat["all"] else len(chat["prompt"])
        spans = _answers(tokenizer, messages, whole, first)
        spoken = [any(start <= begin and end <= stop for start, stop in spans) for begin, end in places]
    return ids, [said and begin >= since for said, (begin, _) in zip(spoken, places, strict=True)]


def _answers(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], whole: str, first: int
) -> list[tuple[int, int]]:
    """Where in ``whole`` the assistant's answers stand, from message ``first`` on."""
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT or number < first:
            continue
        before = render(tokenizer, messages[:number], ask=True) if number else ""
        through = render(tokenizer, messages[: number + 1], ask=False)
        if not whole.startswith(through):
            raise InputError(
                f"chat_template: the template writes answer {len(spans) + 1} otherwise when more turns follow, so that "
                "its tokens cannot be told; use a template with {% generation %}, or one row for each answer"
            )
        if not through.startswith(before):
            raise InputError(_OTHER_ANSWERS)
        spans.append((len(before), len(through)))
    return spans
