"""What the runtime must know about an exported model beside its graphs: ``runtime.json``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
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


def unique_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Name every label once: those that share a name get their index behind it, as in ``other_0`` and ``other_2``.

    Probabilities are keyed by label, so that of two of one name one would be lost.
    """
    labels = tuple(map(str, names))
    while repeated := {label for label, count in Counter(labels).items() if count > 1}:
        labels = tuple(f"{label}_{index}" if label in repeated else label for index, label in enumerate(labels))
    return labels


def label_indices(id2label: Mapping[int, str]) -> dict[str, int]:
    """Columns of a classifier's logits by the unique names of its labels."""
    return {name: index for index, name in enumerate(unique_labels(id2label[index] for index in sorted(id2label)))}


def is_onnx(folder: str | Path) -> bool:
    """Whether a local folder is one that the runtime reads.

    Raises:
        InputError: it holds graphs, but another tool's.
    """
    path = Path(folder)
    if not path.is_dir():
        return False
    if (path / SPEC).is_file():
        return True
    if any(path.glob("*.onnx")) and not any(path.glob("*.safetensors")):
        raise InputError(
            f"model_name_or_path: {folder} holds graphs of another tool; export with compress/to_onnx.py, without"
            " --optimum_layout"
        )
    return False


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
    content["eos_token_ids"], content["labels"] = tuple(content["eos_token_ids"]), unique_labels(content["labels"])
    return ModelSpec(**content)
