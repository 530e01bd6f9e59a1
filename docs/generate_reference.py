"""Write docs/reference from the code: configurations, command line, manifest, HTTP API, launch profiles.

    python docs/generate_reference.py

The pages are committed, and a test holds them to what this script writes (`make docs`).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import runpy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints
from unittest import mock

import typer
import yaml

from yunque import arguments, artifacts, errors
from yunque.cli import app
from yunque.cli.scripts import LAUNCH_OPTIONS, ScriptCommand
from yunque.packaged import SCRIPTS
from yunque.serving import openapi
from yunque.serving.settings import ServerSettings

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "reference"
NOTE = "Written by `make docs` from the code; do not edit."
ARGPARSE_SCRIPTS = ("compress/pipeline.py", "serve/loadtest.py", "serve/smoke.py")
"""Scripts with options of their own, which no YAML file sets."""

_HEAD = ("option", "type", "default", "")


class Script(NamedTuple):
    """A script (or subcommand) whose options are dataclasses."""

    name: str
    purpose: str
    groups: tuple[type, ...]
    default_config: str | None


def pages() -> dict[str, str]:
    """File names and contents."""
    return {
        "command_line.md": _command_line(),
        "configurations.md": _configurations(),
        "http_api.md": _http_api(),
        "launch_profiles.md": _launch_profiles(),
        "manifest.md": _manifest(),
    }


# --- configurations ---------------------------------------------------------------------------------------------------


class _Asked(Exception):
    """A program has said what it takes; its work is not wanted."""


def scripts() -> Iterator[Script]:
    """Every script and subcommand whose options are dataclasses."""
    found = sorted([*(ROOT / "recipes").glob("*.py"), *(ROOT / "compress").glob("*.py")])
    for path in found:
        name = path.relative_to(ROOT).as_posix()
        if name not in ARGPARSE_SCRIPTS:
            yield _ask(name, lambda path=path: runpy.run_path(str(path), run_name="__main__"))
    yield _evaluate()


def _evaluate() -> Script:
    return _ask("yunque evaluate", lambda: app(["evaluate"], standalone_mode=False))


def _ask(name: str, program: Callable[[], Any]) -> Script:
    """Start a program and stop it where it hands its options to the parser."""
    asked: list[Script] = []

    def parse(*groups: type, description: str = "", default_config: Path | None = None, **_: Any) -> None:
        config = default_config and default_config.relative_to(ROOT).as_posix()
        asked.append(Script(name, description.strip().splitlines()[0], groups, config))
        raise _Asked

    with mock.patch.object(arguments, "parse", parse), contextlib.suppress(_Asked):
        program()
    return asked[0]


def _configurations() -> str:
    found = list(scripts())
    groups = dict.fromkeys(group for script in found for group in script.groups)
    return _page(
        "Configurations",
        "Options of the recipes, the compress scripts and `yunque evaluate`. Each is a key of the `--config` YAML\n"
        "file and an option `--name`. The command line wins over the file, the file over these defaults; an unknown\n"
        "name is an error. A switch is turned on by `--name` and off by `--name false`;\n"
        "a list takes several words.",
        "## Which script takes which",
        _table(
            ("script", "what it does", "options", "read when no model and no `--config` is named"),
            [
                (
                    f"`{script.name}`",
                    script.purpose,
                    ", ".join(_link(group.__name__) for group in script.groups),
                    f"`{script.default_config}`" if script.default_config else "",
                )
                for script in found
            ],
        ),
        *(part for group in groups for part in _group(group, groups)),
    )


def _group(group: type, shown: Iterable[type]) -> list[str]:
    """A dataclass: what it is, and its options without those of a base that the page shows too."""
    bases = [base for base in group.__mro__[1:] if is_dataclass(base) and base in shown]
    hints = get_type_hints(group)
    own = [
        field
        for field in fields(group)
        if not any(base.__dataclass_fields__.get(field.name) is field for base in bases)
    ]
    text = _sentences(inspect.getdoc(group))
    if bases:
        text += f" All other options are those of {', '.join(_link(base.__name__) for base in bases)}."
    rows = [(f"`{each.name}`", _type(hints[each.name]), _default(each), _help(group, each.name)) for each in own]
    return [f"## {group.__name__}", text, _table(_HEAD, rows) if rows else ""]


def _help(group: type, name: str) -> str:
    """An option's words; one that only changes a base's default has the base's."""
    options = [base.__dataclass_fields__.get(name) for base in group.__mro__ if is_dataclass(base)]
    return next(option.metadata["help"] for option in options if option and "help" in option.metadata)


def _type(hint: Any) -> str:
    """A type in words: what a YAML file or a command line may give."""
    if get_origin(hint) is Annotated:
        return _type(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_type(part) for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        return " ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is list:
        return f"list of {_type(get_args(hint)[0])}"
    if get_origin(hint) is dict or hint is dict:
        return "mapping"
    return {bool: "switch", str: "text", Path: "path", int: "integer", float: "number"}.get(hint, hint.__name__)


def _default(field: Field[Any]) -> str:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return "required" if value is MISSING else _value(value)


def _value(value: Any) -> str:
    if value is None or value in ("", [], (), {}):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(f"`{part}`" for part in value) if isinstance(value, list | tuple) else f"`{value}`"


# --- command line -----------------------------------------------------------------------------------------------------


def _command_line() -> str:
    return _page(
        "Command line",
        app.info.help + " Options of a list are given several times: `--gate A --gate B`.",
        _table(_HEAD, _parameters(app.registered_callback.callback)),
        "## Exit codes",
        _sentences(inspect.getdoc(errors.run).split("\n\n")[1]) + " `accelerate launch` says 1 for all but the first;"
        " `python -m yunque.distributed.launch` keeps them.",
        *_commands(app, "yunque"),
        *(part for name in ARGPARSE_SCRIPTS for part in _argparse_script(name)),
    )


def _commands(of: typer.Typer, name: str) -> Iterator[str]:
    """The subcommands in their order, and those of subcommands; scripts in one table."""
    scripts = [command for command in of.registered_commands if command.cls is ScriptCommand]
    if scripts:
        yield "## Scripts as commands"
        yield (
            "The scripts of `recipes/` and `compress/` run from any folder, with their own options and `--config`; "
            "configurations are found by name (`--config ppo_detox_flan_t5_base`). `--profile NAME` starts one with "
            f"Accelerate, and {', '.join(f'`{name}`' for name in LAUNCH_OPTIONS)} are the launcher's. Exit codes are "
            "the script's. `yunque rehearse` takes these names, too."
        )
        rows = [
            (f"`yunque {each.name}`", f"`{SCRIPTS[each.name]}`", inspect.getdoc(each.callback).partition(" (--help")[0])
            for each in scripts
        ]
        yield _table(("command", "script", ""), rows)
    for command in of.registered_commands:
        if command in scripts:
            continue
        full_name = f"{name} {command.callback.__name__}"
        yield f"## {full_name}"
        yield _sentences(inspect.getdoc(command.callback))
        if full_name == "yunque evaluate":
            links = [f"[{group.__name__}](configurations.md#{group.__name__.lower()})" for group in _evaluate().groups]
            yield f"`FOLDER` is `--model_name_or_path`. Options: {', '.join(links)}."
        elif full_name == "yunque serve":
            yield "`FOLDER` or `NAME=FOLDER` of each model, then any of these, which a `--config` YAML may set too."
            yield _settings()
        else:
            yield _table(_HEAD, _parameters(command.callback))
    for group in of.registered_groups:
        yield from _commands(group.typer_instance, f"{name} {group.name}")


def _parameters(command: Callable[..., None]) -> Iterator[tuple[str, ...]]:
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if get_origin(hints[name]) is not Annotated:  # typer's context
            continue
        kind, info = get_args(hints[name])
        if isinstance(info, typer.models.OptionInfo):
            given = [word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)]
            shown = ", ".join(given or [f"--{name.replace('_', '-')}"])
        else:
            shown = info.metavar or name.upper()
        default = "required" if parameter.default is parameter.empty else _value(parameter.default)
        yield f"`{shown}`", _type(kind), default, info.help


def _settings() -> str:
    rows = []
    for name, each in ServerSettings.model_fields.items():
        rows.append((f"`{name}`", _type(each.annotation), _value(each.default), each.description or ""))
    return _table(_HEAD, rows)


def _argparse_script(name: str) -> list[str]:
    """A script's options from its own parser, caught when it begins to parse."""
    asked: list[argparse.ArgumentParser] = []

    def parse_args(self: argparse.ArgumentParser, *_: Any) -> None:
        asked.append(self)
        raise _Asked

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args), contextlib.suppress(_Asked):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    actions = [action for action in asked[0]._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    rows = [
        (
            f"`{', '.join(action.option_strings) or action.dest}`",
            _argparse_type(action),
            "required" if action.required else _value(action.default),
            action.help or "",
        )
        for action in actions
    ]
    return [
        f"## {name}",
        (asked[0].description or "").strip().splitlines()[0],
        _table(("option", "value", "default", ""), rows),
    ]


def _argparse_type(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "switch"
    if action.choices:
        return " ".join(f"`{choice}`" for choice in action.choices)
    kind = action.type or str
    return str(action.metavar or (_type(kind) if isinstance(kind, type) else action.dest.upper()))


# --- manifest ---------------------------------------------------------------------------------------------------------


def _manifest() -> str:
    source = inspect.getsource(artifacts.Manifest)
    lines, hints = source.splitlines(), get_type_hints(artifacts.Manifest)
    rows = []
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            name = node.target.id
            null = ", or null" if type(None) in get_args(hints[name]) else ""
            rows.append((f"`{name}`", _type(hints[name]) + null, lines[node.lineno - 1].partition("  # ")[2]))
    return _page(
        f"The manifest, {artifacts.MANIFEST}",
        _sentences(inspect.getdoc(artifacts.Manifest)) + f" This is schema {artifacts.SCHEMA}.\n"
        "It is written last: a folder with a manifest is complete. `yunque show FOLDER --verify` checks every hash.",
        _table(("field", "type", "holds"), rows),
    )


# --- HTTP API ---------------------------------------------------------------------------------------------------------


def _http_api() -> str:
    """The document of a server with the default settings, an admin key and API keys."""
    settings = ServerSettings(models={"NAME": Path("FOLDER")})
    registry = SimpleNamespace(names=[])
    document = openapi.document(SimpleNamespace(settings=settings, registry=registry, api_keys=True, admin_keys=True))
    parts = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts += [f"## {method.upper()} {path}", _operation(operation)]
    for name, schema in document["components"]["schemas"].items():
        parts += [f"## {name}", _sentences(schema.get("description", "")), _schema(schema)]
    return _page(
        "HTTP API",
        "From the OpenAPI document that a server has at `/openapi.json`, with the default limits. How the routes\n"
        "behave: [serving](../serve.md).",
        *parts,
    )


def _operation(operation: dict[str, Any]) -> str:
    lines = [_sentences(operation["summary"])]
    security = [name for each in operation.get("security", ()) for name in each]
    if security:
        lines.append(f"- needs: {'an admin key' if security == ['admin'] else 'an API key, where the server has keys'}")
    if "requestBody" in operation:
        lines.append(f"- takes: {_json_type(_json_schema(operation['requestBody']))}")
    by_body: dict[str, list[str]] = {}
    for status, response in operation["responses"].items():
        kinds = response.get("content", {})
        body = _json_type(_json_schema(response)) if "application/json" in kinds else "plain text"
        body += ", or a stream of events" if "text/event-stream" in kinds else ""
        by_body.setdefault(body, []).append(status)
    lines += [f"- {', '.join(statuses)}: {body}" for body, statuses in by_body.items()]
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _json_schema(body: dict[str, Any]) -> dict[str, Any]:
    return body["content"]["application/json"]["schema"]


def _schema(schema: dict[str, Any]) -> str:
    needed = schema.get("required", ())
    rows = [
        (
            f"`{name}`",
            _json_type(each),
            "required" if name in needed else _json_value(each.get("default")),
            each.get("description", ""),
        )
        for name, each in schema.get("properties", {}).items()
    ]
    return _table(("field", *_HEAD[1:]), rows)


def _json_type(schema: dict[str, Any]) -> str:
    """A JSON schema in words; null is left out, as in every optional field."""
    if "$ref" in schema:
        return _link(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(_json_type(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return " ".join(f"`{_json_value(value, bare=True)}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        if schema.get("maxItems") == 0:
            return "empty list"
        some = {0: "list of", 1: "non-empty list of"}[schema.get("minItems", 0)]
        most = f" up to {schema['maxItems']}" if "maxItems" in schema else ""
        return f"{some}{most} {_json_type(schema['items'])}"
    if schema.get("maxProperties") == 0:
        return "empty mapping"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"mapping to {_json_type(schema['additionalProperties'])}"
    words = {"string": "text", "boolean": "true or false", "object": "mapping"}
    kind = schema.get("type", "anything")
    return words.get(kind, kind) + _limits(schema)


def _json_value(value: Any, *, bare: bool = False) -> str:
    if value in (None, "", []) and value is not False:
        return "empty" if bare else ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if bare else f"`{text}`"


_LIMITS = {
    "minimum": "at least {}", "maximum": "at most {}", "exclusiveMinimum": "above {}", "exclusiveMaximum": "below {}",
    "maxLength": "at most {} characters",
}  # fmt: skip


def _limits(schema: dict[str, Any]) -> str:
    if "minimum" in schema and schema["minimum"] == schema.get("maximum"):
        return f", only {schema['minimum']}"
    parts = [words.format(f"{schema[name]:,}") for name, words in _LIMITS.items() if name in schema]
    return f" ({', '.join(parts)})" if parts else ""


# --- launch profiles --------------------------------------------------------------------------------------------------


def _launch_profiles() -> str:
    files = sorted((ROOT / "launch").glob("*.yaml"))
    settings = {file.stem: dict(_flat(yaml.safe_load(file.read_text(encoding="utf-8")))) for file in files}
    names = dict.fromkeys(name for values in settings.values() for name in values)
    rows = [(f"`{name}`", *(_yaml(values.get(name)) for values in settings.values())) for name in names]
    return _page(
        "Launch profiles",
        "Files of `launch/`, for `--config_file` of `accelerate launch`. Which to take, and which method runs under\n"
        "which: [layouts](../layouts.md).",
        "\n".join(f"- `{file.stem}`: {_header(file)}" for file in files),
        "## Settings",
        _table(("setting", *settings), rows),
    )


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield prefix + name, value


def _header(file: Path) -> str:
    """The first paragraph of a file's comment."""
    lines = [line.removeprefix("#").strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return " ".join(lines[: lines.index("")])


def _yaml(value: Any) -> str:
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", NOTE, *filter(None, parts)]) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())


def _sentences(text: str | None) -> str:
    """A docstring as one paragraph, without what it raises."""
    return _cell((text or "").partition("Raises:")[0]).replace("\\|", "|")


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, content in pages().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
    for path in FOLDER.glob("*.md"):
        if path.name not in pages():
            path.unlink()


if __name__ == "__main__":
    main()
