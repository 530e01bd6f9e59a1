"""``yunque evaluate``."""

from __future__ import annotations

import typer

from yunque import errors

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""The arguments are dataclasses, as the recipes': typer hands them on, with ``--help`` and ``--config`` among them."""

DESCRIPTION = """Answer the prompts of held-out rows with a model folder and score the answers.

yunque evaluate FOLDER --dataset_name DATA --output_dir OUT [options]; several processes:
accelerate launch --num_processes N -m yunque evaluate FOLDER ...
"""


def evaluate(context: typer.Context) -> None:
    """Answer held-out prompts with a model folder and score the answers (--help lists all options)."""
    argv = context.args
    if argv and not argv[0].startswith("-"):
        argv = ["--model_name_or_path", *argv]
    try:
        from yunque.arguments import parse
        from yunque.evaluation import arguments
    except ImportError as error:
        raise errors.InputError(f"yunque evaluate needs {error.name}; pip install 'yunque[train]'") from error
    groups = parse(
        arguments.EvaluatedModelArguments,
        arguments.HeldOutArguments,
        arguments.DecodingArguments,
        arguments.EvaluationArguments,
        description=DESCRIPTION,
        argv=argv,
    )
    from yunque.evaluation.evaluate import evaluate as run

    run(*groups, argv=context.args)
