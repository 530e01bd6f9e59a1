"""``yunque serve``."""

from __future__ import annotations

import typer

from yunque import errors

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def serve(context: typer.Context) -> None:
    """Serve ONNX model folders over HTTP (--help lists all options)."""
    try:
        from yunque.serving import process
    except ImportError as error:
        raise errors.InputError(f"yunque serve needs {error.name}; pip install yunque") from error
    process.main(context.args, "yunque serve")
