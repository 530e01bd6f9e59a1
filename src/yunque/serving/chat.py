"""Chats as prompts: with the tokenizer's own template, or plainly where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from yunque.runtime.chat_template import ChatTemplate, TemplateFailed, read_chat_template
from yunque.serving import logs
from yunque.serving.schemas import Message

_TITLES = {"user": "User", "assistant": "Assistant"}


class ChatRefused(Exception):
    """These messages make no prompt."""


@dataclass(frozen=True)
class ChatFormat:
    """Turns messages into a prompt; ``template`` None is the plain form, ``broken`` why no chat can be had."""

    template: ChatTemplate | None = None
    broken: str | None = None

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer shall add its special tokens: a template writes them itself."""
        return self.template is None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation.

        Plain: a single user turn is the prompt as it is, after the text of system turns; longer conversations are
        written as ``User: ...`` and ``Assistant: ...`` lines and end with ``Assistant:``.

        Raises:
            ChatRefused: the template does not take these messages, such as two turns of a user in a row.
        """
        if self.template is None:
            return _plain(messages)
        try:
            return self.template.render([{"role": _role(each), "content": each.text} for each in messages])
        except TemplateFailed as error:
            raise ChatRefused(str(error)) from error


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role


def _plain(messages: Sequence[Message]) -> str:
    system = [message.text for message in messages if _role(message) == "system"]
    turns = [message for message in messages if _role(message) != "system"]
    if [turn.role for turn in turns] == ["user"]:
        return "\n\n".join([*system, turns[0].text])
    lines = [f"{_TITLES[turn.role]}: {turn.text}" for turn in turns]
    return "\n\n".join([*system, "\n".join([*lines, "Assistant:"])])


def read_chat_format(folder: Path, choice: Literal["auto", "plain", "off"]) -> ChatFormat | None:
    """The chat format of a model folder; a template that cannot be used is logged, and refuses every chat."""
    if choice == "plain":
        return ChatFormat()
    try:
        template = read_chat_template(folder)
    except TemplateFailed as error:
        logs.LOGGER.warning("no chats", extra={"fields": {"folder": str(folder), "reason": str(error)}})
        return ChatFormat(broken=str(error))
    if template is None:
        return ChatFormat() if choice == "auto" else None
    return ChatFormat(template)
