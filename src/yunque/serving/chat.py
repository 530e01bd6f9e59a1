"""Chats as prompts: with the tokenizer's own template, or plainly where it has none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from yunque.errors import InputError
from yunque.serving.schemas import Message

_TITLES = {"user": "User", "assistant": "Assistant"}


class ChatRefused(Exception):
    """The template does not take these messages."""


@dataclass(frozen=True)
class ChatFormat:
    """Turns messages into a prompt; ``template`` None is the plain form."""

    template: Any = None
    tokens: dict[str, str] | None = None  # bos_token, eos_token, ...

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
        turns = [{"role": _role(message), "content": message.text} for message in messages]
        try:
            return str(self.template.render(messages=turns, add_generation_prompt=True, **(self.tokens or {})))
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            reason = str(error) if isinstance(error, TemplateError) else "it failed"
            raise ChatRefused(f"the model's chat template does not take them: {reason}") from error


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
    """The chat format of a model folder.

    Raises:
        InputError: the template or the tokenizer's configuration cannot be read.
    """
    if choice == "plain":
        return ChatFormat()
    config: dict[str, Any] = {}
    if (path := folder / "tokenizer_config.json").is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from error
    source = _template_source(folder, config)
    if source is None:
        return ChatFormat() if choice == "auto" else None
    try:
        template = _environment().from_string(source)
    except TemplateError as error:
        raise InputError(f"{folder}: its chat template is not valid: {error}; or give --chat_template plain") from error
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return ChatFormat(template, {name: _token(config.get(name)) for name in names})


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """The template of its own file, or of the tokenizer's configuration, where it may be one of several."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _token(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers renders: blocks leave no lines behind; templates may refuse messages and ask for the date."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    return environment


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
