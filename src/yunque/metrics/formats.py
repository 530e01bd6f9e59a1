"""Whether answers have the form they were asked for: JSON of a schema, or a regular expression."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yunque.errors import InputError

Check = Callable[[str], bool]


def json_schema(path: str) -> Check:
    """Check of texts that are one JSON value, nothing around it, valid under the schema in the file ``path``.

    Raises:
        InputError: no such file, not JSON, no valid schema, or jsonschema is not installed.
    """
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"format_schema: {path} is no readable JSON file: {error}") from error
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
    except ImportError as error:
        raise InputError("format_schema: needs jsonschema; pip install jsonschema") from error
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise InputError(f"format_schema: {path} is no valid JSON schema: {error.message}") from error
    validator = kind(schema)

    def is_valid(text: str) -> bool:
        try:
            value: Any = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return False
        return validator.is_valid(value)

    return is_valid


def pattern(expression: str, option: str = "format_pattern") -> Check:
    """Check of texts that match the regular expression from beginning to end.

    Raises:
        InputError: not a regular expression.
    """
    compiled = compile_pattern(expression, option)
    return lambda text: compiled.fullmatch(text) is not None


def compile_pattern(expression: str, option: str) -> re.Pattern[str]:
    """Compile a user's regular expression; a dot matches line breaks too.

    Raises:
        InputError: not a regular expression; the message begins with ``option``.
    """
    try:
        return re.compile(expression, re.DOTALL)
    except re.error as error:
        raise InputError(f"{option}: '{expression}' is no regular expression: {error}") from error


def compliance(texts: Sequence[str], checks: Sequence[Check]) -> np.ndarray:
    """1 where a text passes all ``checks``, else 0, shape [num_texts]."""
    return np.array([float(all(check(text) for check in checks)) for text in texts])


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is Python's, not JSON's")
