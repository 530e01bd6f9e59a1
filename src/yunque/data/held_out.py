"""Rows to evaluate on: a text each and, where the data has them, reference answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from yunque.data.arguments import DataArguments
from yunque.data.chat import ASSISTANT, MESSAGES, conversation_row, is_conversation, read_messages
from yunque.data.loading import conversation_column, match_split, open_source, require_column, sample_rows, text_of
from yunque.errors import InputError

ID_COLUMNS = ("id", "fname")


@dataclass(frozen=True)
class HeldOutRows:
    """Rows with their positions in the file, unique ids, texts and references (empty where there are none).

    ``source`` is the entry for a manifest; ``notes`` say in one line each what was unusual.
    """

    positions: list[int]
    ids: list[str]
    texts: list[str]
    references: list[list[str]]
    source: dict[str, Any]
    notes: list[str]
    messages: list[str] | None = None  # of rows that are conversations, as ``data.chat`` prepares them


def load_held_out(
    args: DataArguments, *, split: str | None, max_rows: int | None, id_column: str | None
) -> HeldOutRows:
    """Load one split: ``split``, else `test`, else `validation`, else the only one there is.

    Rows without a text are left out; those without a reference, or data without the column of references, are not.

    Raises:
        InputError: no readable data, no such split or column, no row with a text.
    """
    readers = open_source(args)
    raw = readers[_chosen_split(args.dataset_name, list(readers), split)]()
    chats = conversation_column(args, raw)
    if chats is None:
        require_column(raw, args.text_column, "text_column")
    notes: list[str] = []
    try:
        targets = require_column(raw, args.target_column, "target_column", numbered=True)
    except InputError:
        targets = []
        if chats is None:
            notes.append(f"no column '{args.target_column}' in {raw.name}: metrics that need references are left out")
    if id_column is not None:
        require_column(raw, id_column, "id_column")
    column = id_column or next((name for name in ID_COLUMNS if name in raw.columns), None)
    rows = [_row(args, number, row, targets, column, chats) for number, row in enumerate(raw.rows)]
    usable = [row for row in rows if row["text"] is not None]
    if not usable:
        raise InputError(
            f"text_column: none of the {len(rows)} rows of '{raw.name}' has a text in '{args.text_column}'"
        )
    if len(usable) < len(rows):
        notes.append(f"{len(rows) - len(usable)} rows without a text are left out")
    chosen = sample_rows(usable, max_rows)
    ids = [row["id"] for row in chosen]
    if len(set(ids)) < len(ids):
        notes.append(f"column '{column}' names some rows twice: positions in the file are the ids")
        ids = [str(row["position"]) for row in chosen]
    without = sum(not row["references"] for row in chosen)
    if targets and without:
        notes.append(f"{without} of {len(chosen)} rows have no reference: reference metrics are over the others")
    source = {"name": raw.name, "split": raw.split, "rows": len(chosen), "sha256": raw.sha256}
    positions, texts, references = ([row[name] for row in chosen] for name in ("position", "text", "references"))
    messages = None if chats is None else [row[MESSAGES] for row in chosen]
    return HeldOutRows(positions, ids, texts, references, source, notes, messages)


def _chosen_split(name: str | None, splits: Sequence[str], wanted: str | None) -> str:
    for candidate in ("test", "validation") if wanted is None else (wanted,):
        if (found := match_split(candidate, splits)) is not None:
            return found
    if wanted is None and len(splits) == 1:
        return splits[0]
    missing = "neither test nor validation" if wanted is None else f"no split '{wanted}'"
    raise InputError(f"test_split: '{name}' has {missing}; name one of {', '.join(sorted(splits))}")


def _row(
    args: DataArguments,
    number: int,
    row: dict[str, Any],
    targets: Sequence[str],
    id_column: str | None,
    chats: str | None,
) -> dict[str, Any]:
    values: list[Any] = []
    for column in targets:
        value = row.get(column)
        values += value if isinstance(value, list | tuple) else [value]
    texts = (text_of(value, f"target_column: '{args.target_column}'") for value in values)
    identity = None if id_column is None else text_of(row.get(id_column), f"column '{id_column}'")
    kept = {"position": number, "id": identity or str(number), "text": None, "references": []}
    if chats is None:
        kept["text"] = text_of(row.get(args.text_column), f"text_column: '{args.text_column}'")
    elif is_conversation(value := row.get(chats)):
        prompt = read_messages(value, f"text_column: '{chats}', row {number + 1}")
        answer = [prompt.pop()] if prompt[-1]["role"] == ASSISTANT and len(prompt) > 1 else []
        kept |= conversation_row(prompt, answer, train_all=False)
    references = [text for text in texts if text is not None]
    return {**kept, "references": kept["references"] or references}
