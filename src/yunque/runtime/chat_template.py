"""Chats as prompts by a tokenizer's own template, rendered as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Turns = Sequence[Mapping[str, str]]
"""Messages of "role" and "content"."""

_TOKENS = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_PROBE = "what the user says"
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
        turns: list[dict[str, Any]] = [dict(message) for message in messages]
        if self.parts:
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
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
    tokens = {name: text for name in _TOKENS if (text := _token(config.get(name)))}
    found = [ChatTemplate(template, tokens), ChatTemplate(template, tokens, parts=True)]
    for form in found:
        if _reads_user(form):
            return form
    try:
        found[0].render([{"role": "user", "content": _PROBE}])
    except TemplateFailed:
        return found[0]  # it wants another conversation than a single turn, or none: it says so for each
    raise TemplateFailed("its chat template leaves out what a user says")


def _reads_user(form: ChatTemplate) -> bool:
    try:
        return _PROBE in form.render([{"role": "user", "content": _PROBE}])
    except TemplateFailed:
        return False


def _source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template of its own file, or of the tokenizer's configuration, where it may be one of several."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _token(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


class _Generation(Extension):
    """``{% generation %}``, which marks what an assistant says for training; here its body is written as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it from the class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body of the block."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


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
