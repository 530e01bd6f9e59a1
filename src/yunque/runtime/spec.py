"""What the runtime must know about an exported model beside its graphs: ``runtime.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from yunque.errors import InputError

SPEC = "runtime.json"
FORMAT = 2  # 1 had the keys of cross-attention transposed

Kind = Literal["seq2seq", "causal", "classifier"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The kind of model, its graphs and its special tokens (the fields of ``runtime.json``)."""

    format: int = FORMAT
    kind: Kind
    architecture: str
    graphs: dict[str, str]  # name of the graph: file
    vocab_size: int
    max_positions: int | None  # None: positions are relative, any length goes
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    decoder_start_token_id: int | None = None  # seq2seq
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    labels: tuple[str, ...] = ()  # classifier
    independent_labels: bool = False  # a probability for each label by itself

    def save(self, folder: Path) -> None:
        """Write ``runtime.json`` into ``folder``."""
        (folder / SPEC).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def unique_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels of a classifier as keys: those that share a name get their index, ``other (0)`` and ``other (2)``."""
    names = tuple(f"{name} ({index})" if labels.count(name) > 1 else name for index, name in enumerate(labels))
    return names if len(set(names)) == len(names) else unique_names(names)


def read_spec(folder: Path) -> ModelSpec:
    """Read ``runtime.json``.

    Raises:
        InputError: it is missing, malformed or of a newer format.
    """
    path = folder / SPEC
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: holds no {SPEC}: not an ONNX folder of compress/to_onnx.py, or one with --optimum_layout"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    known = {field.name for field in fields(ModelSpec)}
    if not isinstance(content, dict) or content.get("format") != FORMAT or set(content) != known:
        raise InputError(f"{path}: not of format {FORMAT}, which this version of yunque reads; export again")
    content["eos_token_ids"], content["labels"] = tuple(content["eos_token_ids"]), unique_names(content["labels"])
    return ModelSpec(**content)
