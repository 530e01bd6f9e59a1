"""Chats as prompts by a tokenizer's own template, rendered as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Turns = Sequence[Mapping[str, Any]]
"""Messages of "role" and "content"."""

_PROBES = ("what the user says", "when they wrote it")  # of one length
_FAILURES = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


class TemplateFailed(ValueError):
    """The template cannot be read, or does not take these messages."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it writes; ``parts`` where it reads contents as lists of parts only."""

    template: Any
    tokens: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, ...
    parts: bool = False

    def render(self, messages: Turns) -> str:
        """The prompt of a conversation, up to where the assistant's answer begins.

        Raises:
            TemplateFailed: the template does not take these messages, such as two turns of a user in a row.
        """
        turns = in_parts(messages) if self.parts else [dict(message) for message in messages]
        given = {"tools": None, "documents": None, "add_generation_prompt": True, **self.tokens}
        try:
            return str(self.template.render(messages=turns, **given))
        except _FAILURES as error:
            reason = str(error) if isinstance(error, TemplateError) else "it failed"
            raise TemplateFailed(f"the model's chat template does not take them: {reason}") from error


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a model folder; None where it has none.

    Raises:
        TemplateFailed: it is no template, or leaves out what a user says.
    """
    try:
        path = folder / "tokenizer_config.json"
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        source = _source(folder, config)
        if source is None:
            return None
        template = _environment().from_string(source)
    except (OSError, ValueError, TemplateError, RecursionError) as error:
        raise TemplateFailed(f"its chat template is not valid: {error}") from error
    found = ChatTemplate(template, _named_tokens(config))
    return replace(found, parts=reads_parts(found.render))


def in_parts(messages: Turns) -> list[dict[str, Any]]:
    """Messages whose contents are lists of parts."""
    return [
        {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else dict(message)
        for message in messages
        for content in [message.get("content")]
    ]


def reads_parts(render: Callable[[list[dict[str, Any]]], str]) -> bool:
    """Whether a template, which ``render`` gives messages to, reads contents as lists of parts only.

    What it reads shows in what it writes: other words of the user make another prompt.

    Raises:
        TemplateFailed: it leaves out what a user says, in either form.
    """
    taken = False
    for opening in ([], [{"role": "system", "content": "be brief"}]):  # some templates want a system's turn
        chats = [[*opening, {"role": "user", "content": probe}] for probe in _PROBES]
        for parts in (False, True):
            try:
                prompts = {str(render(in_parts(chat) if parts else chat)) for chat in chats}
            except Exception:  # whatever a template raises
                continue
            if len(prompts) > 1:
                return parts
            taken = True
    if taken:
        raise TemplateFailed("its chat template leaves out what a user says")
    return False  # it wants another conversation: it says so for each


def _source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template of its own file, or of the tokenizer's configuration, where it may be one of several."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by the names that templates know them by: ``bos_token``, and a model's own as ``image_token``."""
    extra = config.get("extra_special_tokens")
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str) and text}


class _Generation(Extension):
    """``{% generation %}``, which marks what an assistant says for training; here its body is written as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it from the class)

    def parse(self, parser: Parser) -> nodes.Node:
        """The body of the block, which keeps what it sets to itself."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers renders: blocks leave no lines behind; templates may refuse messages and ask for the date."""
    extensions = [loopcontrols, _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = _as_json
    return environment


def _as_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
