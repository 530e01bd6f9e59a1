"""What makes two calls the same run: every option and the content of every file, but for a few options.

One rule for all trainers: a resumed run is refused where anything else than these options differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yunque.artifacts import CHECKPOINTS, LOG, MANIFEST, sha256_file
from yunque.errors import InputError

MAY_CHANGE = frozenset(
    {
        *("output_dir", "overwrite_output_dir", "resume", "config", "report_to"),
        *("save_steps", "save_total_limit", "async_save", "logging_steps", "dataloader_num_workers"),
        *("per_device_eval_batch_size", "gradient_checkpointing"),
        *("guard_kl", "guard_reward_std", "guard_empty", "guard_endless", "guard_patience"),
        *("watch_model_name_or_path", "watch_label"),
    }
)
"""Options that a resumed run may set anew: none of them changes the curve."""

_LENGTH = ("max_steps", "num_train_epochs")
_ENDLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules whose learning rate at a step does not depend on how many steps follow."""


def run_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``config`` that a resumed run must share, and what the files that they name hold.

    Call it where every option has its final value. What a hub id stands for is not looked up.
    """
    identity: dict[str, Any] = {}
    for name, value in config.items():
        if name in MAY_CHANGE:
            continue
        identity[name] = value
        for path in value if isinstance(value, list | tuple) else [value]:
            if isinstance(path, str) and (digest := _content(name, path)) is not None:
                identity[f"{name} (content of {path})"] = digest
    return dict(json.loads(json.dumps(identity, default=str)))


def check_same_run(now: Mapping[str, Any], before: Mapping[str, Any], checkpoint: Path) -> None:
    """Compare the identity of a run with that of the ``checkpoint`` it goes on from.

    Raises:
        InputError: they differ; the message names the first difference.
    """
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name), now.get(name)
        if old == new or (name in _LENGTH and _goes_on_alike(now)):
            continue
        reason = ""
        if name in _LENGTH:
            reason = f" (lr_scheduler_type {now.get('lr_scheduler_type')} is a curve over all steps)"
        raise InputError(
            f"{name}: the checkpoint in {checkpoint} was made with {_short(old)}, now it is {_short(new)}{reason}; "
            "set it back or start afresh with --overwrite_output_dir"
        )


def check_steps(done: int, total: int, checkpoint: Path) -> None:
    """Check that a run that goes on after ``done`` steps does not end before.

    Raises:
        InputError: ``total`` steps are fewer.
    """
    if done > total:
        raise InputError(
            f"max_steps: the checkpoint in {checkpoint} is of step {done}, beyond the {total} steps asked for; "
            f"give {done} or more, or start afresh with --overwrite_output_dir"
        )


def _goes_on_alike(config: Mapping[str, Any]) -> bool:
    is_share = 0 < float(config.get("warmup_steps") or 0) < 1
    return config.get("lr_scheduler_type", "constant") in _ENDLESS_SCHEDULES and not is_share


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _content(name: str, value: str) -> str | None:
    """Hash of the file or folder that the option ``name`` gives, None where it gives none."""
    if not (name.endswith(("path", "dataset_name", "_file")) or "/" in value or value.endswith(".py")):
        return None
    path = Path(value.split(":")[0]).expanduser()
    try:
        if path.is_file():
            return sha256_file(path)
        if not path.is_dir():
            return None
        if (path / MANIFEST).is_file():  # holds the hashes of the others
            return sha256_file(path / MANIFEST)
        digest = hashlib.sha256()
        for file in sorted(each for each in path.rglob("*") if each.is_file()):
            inside = file.relative_to(path)
            if inside.parts[0] not in (CHECKPOINTS, LOG) and not inside.parts[0].startswith("."):
                digest.update(f"{inside} {sha256_file(file)}\n".encode())
        return digest.hexdigest()
    except OSError:  # whoever reads it will say so
        return None
