"""What the server is told: models, limits, keys; from the command line, a YAML file and the environment."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from yunque.errors import InputError
from yunque.serving.schemas import MODEL_NAME

API_KEYS = "YUNQUE_API_KEYS"
ADMIN_KEYS = "YUNQUE_ADMIN_KEYS"

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class ServerSettings(BaseModel):
    """All settings of the server; every field is an option and a key of the YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    models: dict[str, Path] = Field({}, description="Served models: name and ONNX folder")
    folders: dict[str, Path] = Field({}, description="Further folders that an admin may swap a model to, by name")
    host: str = Field("127.0.0.1", description="Address to listen on")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="Port to listen on; 0 takes a free one")
    verify: Literal["sha256", "size", "none"] = Field("sha256", description="How model folders are checked")

    api_key_file: Path | None = Field(None, description=f"API keys, one per line; more from {API_KEYS}")
    admin_key_file: Path | None = Field(None, description=f"Keys of the admin route; more from {ADMIN_KEYS}")
    protect_metrics: bool = Field(False, description="Ask for an API key at /metrics too")
    allowed_hosts: list[str] = Field([], description="Host headers to answer to; all when empty")
    cors_origins: list[str] = Field([], description="Origins whose pages may use the API")

    threads: Count | None = Field(None, description="Threads of each graph; from the machine when left out")
    max_rows: Count | None = Field(None, description="Texts made at the same time; from memory when left out")
    max_queued: Count = Field(256, description="Texts that may wait for each model; more get 429")
    prefill_tokens: Count | None = Field(None, description="Prompt tokens read between two steps of running texts")
    memory_budget_bytes: Count | None = Field(None, description="For caches, per model; from free memory when left out")
    memory_share: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="Share of free memory for caches")
    max_prompt_tokens: Count = Field(2048, description="Longest prompt")
    max_new_tokens: Count = Field(1024, description="Longest answer that may be asked for")
    default_chat_tokens: Count = Field(256, description="Longest answer of a chat that asks for no length")
    max_choices: Count = Field(32, description="Prompts times n in one request")
    max_texts: Count = Field(256, description="Texts in one /classify request")
    max_body_bytes: Count = Field(1 << 20, description="Largest request")
    max_header_bytes: Count = Field(1 << 14, description="Largest request line and headers")
    max_connections: Count = Field(1024, description="Open connections")

    timeout_s: Seconds = Field(120.0, description="Longest time for an answer; a request may ask for less")
    header_timeout_s: Seconds = Field(10.0, description="Time for a client to send its headers")
    body_timeout_s: Seconds = Field(30.0, description="Time for a client to send its body")
    write_timeout_s: Seconds = Field(30.0, description="Time for a client that reads nothing")
    keep_alive_s: Count = Field(15, description="Idle time of a connection")
    drain_timeout_s: Seconds = Field(30.0, description="Time for running requests after SIGTERM")

    guard_folder: Path | None = Field(None, description="Classifier folder that scores every answer, served as guard")
    guard_label: str = Field("", description="Its label of a bad answer; all but the first when left out")
    guard_threshold: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="Probability from which it is bad")
    guard_action: Literal["block", "flag", "pass"] = Field("flag", description="What happens to a bad answer")
    guard_release: Literal["answer", "sentence"] = Field("answer", description="What block holds back until scored")

    chat_template: Literal["auto", "plain", "off"] = Field(
        "auto", description="auto: the tokenizer's or else plain text; plain: always plain; off: no chat without one"
    )
    playground: bool = Field(True, description="Serve the page at /")
    log_requests: bool = Field(False, description="Write prompts and answers into the log")

    @field_validator("models", "folders")
    @classmethod
    def _names(cls, folders: dict[str, Path]) -> dict[str, Path]:
        for name in folders:
            if not re.fullmatch(MODEL_NAME, name):
                raise ValueError(f"{name!r} is no name for a model; give letters, digits and . _ : @ -")
        return folders

    @model_validator(mode="after")
    def _has_models(self) -> ServerSettings:
        if not self.models:
            raise ValueError("models: give at least one ONNX folder, as of compress/to_onnx.py")
        return self


_HINTS = {"models": "NAME=FOLDER", "folders": "NAME=FOLDER"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def parse_settings(argv: Sequence[str], prog: str) -> ServerSettings:
    """Settings from ``argv``, which wins over its ``--config`` file, which wins over the defaults.

    Raises:
        InputError: an unknown option or key, a value that does not go, a file that cannot be read.
    """
    given = vars(parser(prog).parse_args(list(argv)))
    config, places = given.pop("config", None), given.pop("places", [])
    place = given.pop("model_name_or_path", None)
    values = _read_config(Path(config)) if config else {}
    values |= {name: value for name, value in given.items() if name not in _HINTS}
    named = _named([*([place] if place else []), *places], values.get("models"))
    if named:
        values["models"] = named
    if "folders" in given:
        values["folders"] = _named(given["folders"], None)
    return validate(values, str(config) if config else None)


def validate(values: dict[str, Any], config: str | None = None) -> ServerSettings:
    """Settings from plain values.

    Raises:
        InputError: a value that does not go, in one line.
    """
    try:
        return ServerSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    where = f"--config {config}: " if config else ""
    if first["type"] == "extra_forbidden":
        raise InputError(f"{where}unknown key {name}; --help lists the known ones")
    raise InputError(f"{where}{name}: {reason}" if name else f"{where}{reason}")


def _named(places: Sequence[str], former: Any) -> dict[str, str]:
    """Names and folders from "NAME=FOLDER" or "FOLDER", whose name is that of the folder."""
    named: dict[str, str] = {}
    for place in places:
        name, mark, folder = place.partition("=")
        if not mark:
            name, folder = re.sub(r"[^A-Za-z0-9._:@-]", "-", Path(place).resolve().name)[:64], place
        if name in named:
            raise InputError(f"{place}: two models are called {name}; give one another NAME=FOLDER")
        named[name] = folder
    return named


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: give a mapping of settings")
    return {str(key): value for key, value in content.items()}


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line: an option for every setting."""
    made = _Parser(
        prog=prog, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Serve ONNX models over HTTP: OpenAI-compatible and plain routes, continuous batching.",
    )  # fmt: skip
    made.add_argument("places", nargs="*", metavar="FOLDER | NAME=FOLDER", help="Models to serve")
    made.add_argument("--model_name_or_path", metavar="FOLDER", help="A model to serve, as the first FOLDER")
    made.add_argument("--config", metavar="FILE", help="YAML file with any of these options; the command line wins")
    for name, field in ServerSettings.model_fields.items():
        if name == "models":
            continue
        default = "" if field.default in (None, [], {}) else f" (default {field.default})"
        options: dict[str, Any] = {"help": f"{field.description}{default}".replace("%", "%%")}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif name == "folders" or field.annotation == list[str]:
            options |= {"nargs": "+", "metavar": _HINTS.get(name, "NAME")}
        elif choices := [str(each) for each in get_args(field.annotation) if isinstance(each, str)]:
            options["choices"] = choices
        else:
            options["metavar"] = "VALUE"
        made.add_argument(f"--{name}", **options)
    return made
