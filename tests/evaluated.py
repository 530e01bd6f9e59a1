"""Evaluation folders as `yunque evaluate` writes them, with scores made up by the test."""

import json

import numpy as np


def write(folder, scores, *, answers=None, prompts=None, references=None, ids=None, **settings):
    """Write an evaluation of ``scores`` (metric -> one value per row, None where a row has none)."""
    rows = len(next(iter(scores.values())))
    ids = ids or [str(row) for row in range(rows)]
    prompts = prompts or [f"Sum up:\n\ntext {key}\n\nSummary:" for key in ids]
    answers = answers or [f"answer {key} of {folder.name}" for key in ids]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "generations.jsonl").open("w", encoding="utf-8") as file:
        for row in range(rows):
            known = {name: float(values[row]) for name, values in scores.items() if values[row] is not None}
            record = {"id": ids[row], "prompt": prompts[row], "answer": answers[row], "tokens": 3, "scores": known}
            if references is not None:
                record["reference"] = references[row]
            file.write(json.dumps(record) + "\n")
    content = {
        "schema": 1,
        "model": {"path": f"/models/{folder.name}", "manifest_sha256": None, "stage": "ppo", "bytes": 1_000_000},
        "data": {"name": "dialogs", "split": "test", "rows": rows, "sha256": "0" * 64},
        "decoding": {"method": "greedy", "batch_size": 8},
        "metrics": {},
        "speed": {"tokens_per_s": 100.0},
        "notes": [],
        "versions": {"python": "3.11"},
        "created": "2026-11-22T04:00:00+00:00",
        "command": f"yunque evaluate /models/{folder.name} --dataset_name dialogs",
    }
    (folder / "evaluation.json").write_text(json.dumps(content | settings))
    return folder


def toxicity(rows, share, seed):
    """Probabilities: ``share`` of the answers toxic, the others near 0."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(rows) < share, rng.beta(8, 2, rows), rng.beta(0.5, 12, rows))
