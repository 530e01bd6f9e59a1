"""Checkpoints that are complete or absent, and signals that ask a run to save and stop."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import SAFE_MODEL_NAME
from safetensors import SafetensorError, safe_open

from yunque.errors import InputError

_STATE = "state.json"


class Checkpoints:
    """The last few checkpoints of a run: Accelerate's state (weights that train, optimizer, RNG) and a JSON state."""

    def __init__(self, folder: Path, accelerator: Accelerator, *, keep: int) -> None:
        self.folder, self.accelerator, self.keep = folder, accelerator, keep
        accelerator.register_save_state_pre_hook(_drop_frozen_weights)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save atomically as ``step-NNNNNN``, on every rank at once; older checkpoints beyond ``keep`` go."""
        partial, final = self.folder / ".partial", self._path(step)
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(partial))
            if main:
                (partial / _STATE).write_text(json.dumps({"step": step, **state}))
        except BaseException:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()
        if main:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in self._complete()[: -self.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def latest(self) -> dict[str, Any] | None:
        """JSON state of the newest checkpoint, or None when there is none."""
        complete = self._complete()
        return json.loads((complete[-1] / _STATE).read_text()) if complete else None

    def load(self, step: int) -> None:
        """Load the checkpoint of ``step`` into everything the accelerator has prepared.

        Raises:
            InputError: the checkpoint is of another model, or damaged.
        """
        folder = self._path(step)
        try:
            _check_trained_weights(folder / f"{SAFE_MODEL_NAME}.safetensors", self.accelerator)
            self.accelerator.load_state(str(folder), strict=False)  # frozen weights are not in the file
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise InputError(f"resume: {folder} does not fit this run: {error}") from error

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _complete(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob(f"step-*/{_STATE}"))


class StopSignal:
    """While entered, SIGINT, SIGTERM and SIGUSR1 only leave a note; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.noted = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any rank has been asked to stop; every rank must ask at the same point."""
        noted = torch.tensor(int(self.noted), device=accelerator.device)
        return bool(accelerator.reduce(noted, reduction="sum").item())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = True


def _check_trained_weights(path: Path, accelerator: Accelerator) -> None:
    """Every weight that trains must be in the checkpoint; loading alone would pass over one that is not."""
    if not path.exists():  # a sharded engine keeps, and checks, a format of its own
        return
    with safe_open(path, framework="pt") as file:
        saved = set(file.keys())
    for model in accelerator._models:
        missing = {name for name, parameter in model.named_parameters() if parameter.requires_grad} - saved
        if missing:
            raise ValueError(f"it holds no {min(missing)}")


def _drop_frozen_weights(models: list[torch.nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
    """Leave out of a checkpoint what training never changes: the base under an adapter."""
    for model, state in zip(models, weights, strict=False):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name in state.keys() - trained:
            del state[name]
