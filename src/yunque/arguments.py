"""Command-line and YAML arguments: dataclasses parsed by TRL's ``TrlParser``, errors in one line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl.scripts.utils import TrlParser

from yunque.errors import InputError
from yunque.packaged import find_config

_NAMES_A_RUN = ("--config", "--model_name_or_path", "--teacher_name_or_path")


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument whose help text is plain: argparse would take its % for a format."""
        if isinstance(text := options.get("help"), str):
            options["help"] = text.replace("%%", "%").replace("%", "%%")  # some come escaped
        return super().add_argument(*names, **options)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Take the values of the YAML file as defaults, converted and checked as those of the command line are."""
        for action in self._actions:
            if (value := kwargs.get(action.dest)) is not None:
                kwargs[action.dest] = self._checked(action, value)
        return super().set_defaults_with_config(**kwargs)

    def _checked(self, action: argparse.Action, value: Any) -> Any:
        is_list = action.nargs in ("+", "*")
        if isinstance(value, list) != is_list:
            self.error(f"argument --{action.dest}: give {'a list' if is_list else 'one value'} instead of {value!r}")
        texts = [json.dumps(part) if isinstance(part, dict) else str(part) for part in (value if is_list else [value])]
        try:
            parts = [self._get_value(action, text) for text in texts]
            for part in parts:
                self._check_value(action, part)
        except argparse.ArgumentError as error:
            self.error(str(error))
        return parts if is_list else parts[0]


def parse(
    *groups: type,
    description: str | None = None,
    default_config: Path | None = None,
    argv: Sequence[str] | None = None,
    repeatable: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Parse ``argv`` and an optional ``--config FILE`` into one instance per dataclass in ``groups``.

    Values of the command line win over the YAML file, which wins over the dataclass defaults. ``default_config``
    is read when the command line names neither a ``--config`` nor a model (or teacher) to start from. Of an option
    with a list of values the last one given wins, unless it is ``repeatable``: then all of them count.

    Raises:
        InputError: an unknown option or YAML key, a value of the wrong type, a file that cannot be read.
    """
    args = [part for arg in (sys.argv[1:] if argv is None else argv) for part in _split_config(arg)]
    if default_config is not None and not any(_names(arg, *_NAMES_A_RUN) for arg in args):
        args = ["--config", str(default_config), *args]
    for option in repeatable:
        args = _joined(args, f"--{option}")
    config = _config_path(args)
    if config is not None:
        args[args.index("--config") + 1] = str(find_config(config))
    parser = _Parser(groups, description=description, allow_abbrev=False)  # type: ignore[arg-type]  # a NewType of Any
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options; the command line wins")
    try:
        values = parser.parse_args_and_config(args, return_remaining_strings=True, separate_remaining_strings=True)
    except yaml.YAMLError as error:
        raise InputError(f"--config {config}: not valid YAML: {error}") from error
    except OSError as error:
        raise InputError(f"--config {config}: {error.strerror}") from error
    except ValueError as error:  # not a mapping, not text, or a dataclass refuses a value
        raise InputError(str(error)) from error
    *_, unknown_keys, unknown_options = values
    if unknown_keys:
        keys = ", ".join(key.removeprefix("--") for key in unknown_keys[::2])
        raise InputError(f"--config {config}: unknown key {keys}; --help lists the known ones")
    if unknown_options:
        raise InputError(f"unknown argument {unknown_options[0]}; --help lists the known ones")
    return values[: len(groups)]


def _split_config(arg: str) -> list[str]:
    return arg.split("=", 1) if arg.startswith("--config=") else [arg]


def _joined(args: Sequence[str], option: str) -> list[str]:
    """``args`` with all values of ``option`` at its end, after one naming of it."""
    others: list[str] = []
    values: list[str] = []
    into = others
    for arg in args:
        if _names(arg, option):
            into = values
            values += arg.split("=", 1)[1:]
            continue
        if arg.startswith("--"):
            into = others
        into.append(arg)
    return [*others, option, *values] if values else list(args)


def _names(arg: str, *options: str) -> bool:
    return any(arg == option or arg.startswith(f"{option}=") for option in options)


def _config_path(args: Sequence[str]) -> str | None:
    if "--config" not in args:
        return None
    position = args.index("--config")
    if position + 1 == len(args):
        raise InputError("--config: give the path of a YAML file")
    return args[position + 1]
