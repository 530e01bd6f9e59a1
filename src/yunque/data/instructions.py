"""Prompts made of several columns: instruction and input, several phrasings, each row with a template of its own."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from yunque.data.arguments import INSTRUCTION_TEMPLATES, DataArguments, TemplateArguments, placeholders
from yunque.data.chat import MESSAGES
from yunque.data.loading import LoadedData, RawSplit, group_columns, load_pair, load_splits, require_column, text_of
from yunque.errors import InputError

TEXT_PLACEHOLDER = "text"  # stands for text_column, so that phrasings look like prompt_template


def load_instructions(args: DataArguments, templates: TemplateArguments, seed: int) -> LoadedData:
    """Load train and test rows as ``load_splits``, with "head" and "tail" of the template around "text".

    "text" is the longest of the row's columns: what is cut from a prompt that is too long. The phrasing of a row
    follows from ``seed`` and its number. Without ``prompt_templates`` the rows are those of ``load_splits``.

    Raises:
        InputError: as ``load_splits``, or a placeholder that is no column.
    """
    if templates.prompt_templates is None:
        data = load_splits(args, seed)
        if templates.system_prompt and MESSAGES in data.train.column_names:
            raise InputError("system_prompt: messages bring their own; leave it out")
        return data
    return load_pair(args, seed, functools.partial(_instruction_rows, args, templates, seed))


def frame(template: str, values: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Head, longest value and tail of the filled template; paragraphs whose columns are all empty are left out.

    None where no column has a value.
    """
    paragraphs = [
        part
        for part in re.split(r"(?<=\n\n)", template)
        if not (names := placeholders(part)) or any(values[name] for name in names)
    ]
    kept = "".join(paragraphs)
    names = [name for name in placeholders(kept) if values[name]]
    if not names:
        return None
    longest = max(names, key=lambda name: len(values[name]))
    head, _, tail = kept.partition(f"{{{longest}}}")

    def fill(text: str) -> str:  # in one pass: braces inside a value are its own
        return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], text)

    return fill(head), values[longest], fill(tail)


def _instruction_rows(
    args: DataArguments, templates: TemplateArguments, seed: int, raw: RawSplit
) -> list[dict[str, Any]]:
    phrasings = [INSTRUCTION_TEMPLATES.get(template, template) for template in templates.prompt_templates or []]
    columns = {}
    for name in dict.fromkeys(name for phrasing in phrasings for name in placeholders(phrasing)):
        column, option = (args.text_column, "text_column") if name == TEXT_PLACEHOLDER else (name, "prompt_templates")
        columns[name] = require_column(raw, column, option)[0]
    targets = require_column(raw, args.target_column, "target_column", numbered=True)
    groups = group_columns(args, raw)
    rows = []
    for number, row in enumerate(raw.rows):
        cells = [row.get(column) for column in targets]
        answers = [answer for cell in cells for answer in (cell if isinstance(cell, list | tuple) else [cell])]
        texts = (text_of(answer, f"target_column: '{args.target_column}'") for answer in answers)
        references = [text for text in texts if text is not None]
        values = {name: text_of(row.get(column), f"column '{column}'") or "" for name, column in columns.items()}
        phrasing = phrasings[np.random.default_rng((seed, number)).integers(len(phrasings)) if phrasings[1:] else 0]
        filled = frame(phrasing, values)
        if filled is None or not references:
            continue
        head, text, tail = filled
        kept: dict[str, Any] = {"id": str(row.get("id") or number), "text": text, "references": references}
        kept |= {"head": head, "tail": tail}
        for column in groups:
            kept["group"] = text_of(row.get(column), f"group_column: '{column}'") or ""
        rows.append(kept)
    return rows
