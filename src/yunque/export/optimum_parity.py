"""The proof of a folder for optimum-onnx: its graphs are run as that library runs them, and read again by torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from yunque.data.encoding import encode
from yunque.errors import InputError
from yunque.export.parity import Parity, Written, against_torch, compare_labels, log_softmax, passed
from yunque.export.source import Source
from yunque.runtime.spec import ModelSpec

Arrays = dict[str, NDArray[Any]]


def check_optimum_parity(
    source: Source,
    folder: Path,
    spec: ModelSpec,
    prompts: Sequence[str],
    origin: str,
    *,
    tokens: int,
    tolerance: float,
) -> Parity:
    """Compare ``folder`` with the torch model on ``prompts``, all in one padded batch.

    Raises:
        CheckFailed: a logit differs by more than ``tolerance``, or a greedy token without being a tie.
    """
    names = [path.stem for path in folder.glob("*.onnx")]
    sessions = {name: ort.InferenceSession(folder / f"{name}.onnx") for name in names}
    most = spec.max_positions
    tokens = min(tokens, most // 2) if most else tokens
    room = (most or 512) if source.kind == "classifier" else most - tokens if most else None
    ids = [row[:room] for row in encode(source.tokenizer, prompts) if row]
    if not ids:
        raise InputError("parity_dataset: no prompt has a token; give other texts")
    with torch.inference_mode():
        if source.kind == "classifier":
            batch, mask = _padded(ids, spec.pad_token_id)
            given = _known(sessions["model"], {"input_ids": batch, "attention_mask": mask, "token_type_ids": 0 * mask})
            parity = compare_labels(source, ids, sessions["model"].run(["logits"], given)[0], origin)
        else:
            write = _write_seq2seq if source.kind == "seq2seq" else _write_causal
            logits = np.stack(write(sessions, spec, ids, tokens), axis=1)  # [prompts, tokens, vocabulary]
            chosen = logits.argmax(axis=2)
            written = (
                Written(prompt, list(row), log_softmax(scores)[np.arange(len(row)), row], scores)
                for prompt, row, scores in zip(ids, chosen.tolist(), logits, strict=True)
            )
            parity = against_torch(source, written, origin, tolerance, spec.decoder_start_token_id)
    return passed(parity, tolerance)


def _write_seq2seq(
    sessions: Mapping[str, ort.InferenceSession], spec: ModelSpec, prompts: Sequence[Sequence[int]], tokens: int
) -> list[NDArray[np.float32]]:
    """The logits of every greedy token, [prompts, vocabulary] each."""
    ids, mask = _padded(prompts, spec.pad_token_id)
    hidden = sessions["encoder_model"].run(None, {"input_ids": ids, "attention_mask": mask})[0]
    newest = np.full((len(prompts), 1), spec.decoder_start_token_id, np.int64)
    begun = {"input_ids": newest, "encoder_attention_mask": mask, "encoder_hidden_states": hidden}
    values = _run(sessions["decoder_model"], begun)
    found = [values.pop("logits")[:, -1]]
    past = _as_past(values)
    while len(found) < tokens:
        newest = found[-1].argmax(axis=1)[:, None]
        given = past | {"input_ids": newest, "encoder_attention_mask": mask}
        values = _run(sessions["decoder_with_past_model"], given)
        found.append(values.pop("logits")[:, -1])
        past |= _as_past(values)
    return found


def _write_causal(
    sessions: Mapping[str, ort.InferenceSession], spec: ModelSpec, prompts: Sequence[Sequence[int]], tokens: int
) -> list[NDArray[np.float32]]:
    """As ``_write_seq2seq``; padding is on the left, and positions count a row's own tokens."""
    session = sessions["model"]
    newest, mask = (rows[:, ::-1] for rows in _padded([prompt[::-1] for prompt in prompts], spec.pad_token_id))
    shapes = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past")}
    sizes = {value.name: value.shape for value in session.get_outputs()}
    past: Arrays = {
        name: np.zeros((len(prompts), shape[1], 0, sizes[name.replace("past_key_values", "present")][3]), np.float32)
        for name, shape in shapes.items()
    }
    found: list[NDArray[np.float32]] = []
    while True:
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -newest.shape[1] :]
        values = _run(session, past | {"input_ids": newest, "attention_mask": mask, "position_ids": positions})
        found.append(values.pop("logits")[:, -1])
        if len(found) == tokens:
            return found
        past = _as_past(values)
        newest = found[-1].argmax(axis=1)[:, None]
        mask = np.concatenate([mask, np.ones_like(newest)], axis=1)


def _run(session: ort.InferenceSession, given: Arrays) -> Arrays:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, _known(session, given)), strict=True))


def _known(session: ort.InferenceSession, given: Arrays) -> Arrays:
    return {value.name: np.ascontiguousarray(given[value.name]) for value in session.get_inputs()}


def _as_past(values: Arrays) -> Arrays:
    return {name.replace("present", "past_key_values"): value for name, value in values.items()}


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of one length, padded on the right, and the mask of their tokens."""
    width = max(map(len, rows))
    ids = np.array([[*row, *[pad] * (width - len(row))] for row in rows], np.int64)
    return ids, (np.arange(width) < np.array([len(row) for row in rows])[:, None]).astype(np.int64)
