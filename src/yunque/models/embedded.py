"""The embedded default: corpus, policy and reward model, built by this project on first use and cached.

They lie in ``<cache>/embedded/<hash of everything they depend on>``; the cache is ``$YUNQUE_CACHE``, else
``$XDG_CACHE_HOME/yunque``, else ``~/.cache/yunque``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from yunque import artifacts
from yunque.data import corpus
from yunque.data.arguments import DataArguments
from yunque.errors import InputError
from yunque.models import embedded_training as training
from yunque.models import scratch
from yunque.models.loading import save_model

EMBEDDED = "embedded"  # what --model_name_or_path, --reward_model_name_or_path and --dataset_name call it
NUM_THREADS = 1  # fixed, since sums in another order give other weights; 2 gain little, and on a busy machine lose much
_LIBRARIES = ("torch", "transformers", "tokenizers")
_SOURCES = (Path(corpus.__file__), corpus.SCENARIOS_FILE, __file__, training.__file__, scratch.__file__)
_DEFAULT_SETTINGS = training.EmbeddedSettings()


@dataclass(frozen=True)
class Embedded:
    """Where the embedded default lies: two model folders and a folder with train, validation and test JSONL."""

    policy: Path
    reward_model: Path
    dataset: Path


def ensure_embedded(quiet: bool = False, settings: training.EmbeddedSettings = _DEFAULT_SETTINGS) -> Embedded:
    """Return the embedded default, building it when it is missing or damaged (four minutes of one slow core).

    Several processes may call this at once: one builds, the others wait. The caller's random state and number of
    threads stay as they are. ``quiet`` silences the progress on stderr.

    Raises:
        InputError: the cache folder cannot be written.
    """
    folder = _cache_folder() / _content_hash(settings)
    if _problem(folder) is None:
        return _embedded(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder, quiet):
            problem = _problem(folder)  # another process may have built it by now
            if problem is not None:
                if folder.exists():
                    _say(f"the cached embedded models are damaged ({problem}); building them again", quiet)
                _build(folder, settings, quiet)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror}); set YUNQUE_CACHE to another folder"
        ) from error
    return _embedded(folder)


def use_embedded(*options: tuple[object, str]) -> bool:
    """Put paths where argument groups say "embedded" and return whether one did; ``options``: (group, field name).

    Raises:
        InputError: the cache folder cannot be written.
    """
    named = [(group, name) for group, name in options if getattr(group, name) == EMBEDDED]
    if named:
        embedded = ensure_embedded()
        paths = {
            "model_name_or_path": embedded.policy,
            "reward_model_name_or_path": embedded.reward_model,
            "dataset_name": embedded.dataset,
        }
        for group, name in named:
            setattr(group, name, str(paths[name]))
    return bool(named)


# --- the cache --------------------------------------------------------------------------------------------------------


def _cache_folder() -> Path:
    root = os.environ.get("YUNQUE_CACHE")
    if root:
        return Path(root).expanduser().absolute() / EMBEDDED
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "yunque" / EMBEDDED


def _content_hash(settings: training.EmbeddedSettings) -> str:
    """Hash of everything the build depends on; 16 hex digits."""
    parts = {
        "sources": [artifacts.sha256_file(path) for path in _SOURCES],
        "settings": asdict(settings),
        "prompt_template": DataArguments.prompt_template,
        "versions": {name: ".".join(version(name).split(".")[:2]) for name in _LIBRARIES},
        "machine": platform.machine(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _embedded(folder: Path) -> Embedded:
    return Embedded(folder / "policy", folder / "reward_model", folder / "dataset")


def _problem(folder: Path) -> str | None:
    """Why the folder is no complete, undamaged build; None if it is one."""
    embedded = _embedded(folder)
    try:
        for model in (embedded.policy, embedded.reward_model):
            for problem in artifacts.verify(model):
                return f"{model.name}: {problem}"
        for data in artifacts.read_manifest(embedded.policy).data:
            if artifacts.sha256_file(embedded.dataset / f"{data['split']}.jsonl") != data["sha256"]:
                return f"dataset: {data['split']}.jsonl has other content"
    except (InputError, OSError) as error:
        return str(error)
    return None


@contextmanager
def _lock(folder: Path, quiet: bool) -> Iterator[None]:
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say("waiting for another process that builds the embedded models", quiet)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _say(message: str, quiet: bool) -> None:
    if not quiet:
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()


# --- the build --------------------------------------------------------------------------------------------------------


def _build(folder: Path, settings: training.EmbeddedSettings, quiet: bool) -> None:
    """Build into a sibling and rename it to ``folder``: an interrupted build leaves nothing that looks complete."""
    staging = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(staging, ignore_errors=True)  # left by a killed build: the lock says that nobody works on it
    _say(f"building the embedded corpus and models in {folder} (once, a few minutes)", quiet)
    try:
        with _own_state():
            _build_all(_embedded(staging), settings, quiet)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def _own_state() -> Iterator[None]:
    """Fixed number of threads, CPU, gradients on; the caller's threads, random state and settings restored."""
    num_threads = torch.get_num_threads()
    shows_bars = hf_logging.is_progress_bar_enabled()
    torch.set_num_threads(NUM_THREADS)
    hf_logging.disable_progress_bar()  # one bar per saved file
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.device("cpu"):
            torch.random.default_generator.manual_seed(0)  # torch.manual_seed would reseed the caller's GPUs too
            yield
    finally:
        torch.set_num_threads(num_threads)
        if shows_bars:
            hf_logging.enable_progress_bar()


def _build_all(target: Embedded, settings: training.EmbeddedSettings, quiet: bool) -> None:
    examples = corpus.build_corpus(sizes=settings.split_sizes)
    data = _write_dataset(target.dataset, examples)
    template = DataArguments.prompt_template
    prompts = {split: [template.format(text=row.dialogue) for row in rows] for split, rows in examples.items()}

    model, tokenizer = training.train_policy(examples["train"], prompts["train"], settings, quiet)
    summaries = [row.summary for row in examples["validation"]]
    with torch.no_grad():
        loss = training.answer_loss(model, tokenizer, prompts["validation"], summaries).item()
    _save(target.policy, model, tokenizer, "finetune", data, settings.policy, {"validation_loss": loss})

    model, tokenizer = training.train_reward_model(examples["train"], prompts["train"], settings, quiet)
    texts = training.reward_texts(examples["validation"], prompts["validation"], settings.reward.seed)
    with torch.no_grad():
        accuracy = training.classifier_accuracy(model, tokenizer, texts)
    _save(target.reward_model, model, tokenizer, "reward", data, settings.reward, {"validation_accuracy": accuracy})


def _save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    stage: str,
    data: Sequence[dict[str, Any]],
    settings: training.TrainingSettings,
    metrics: dict[str, float],
) -> None:
    artifacts.save_model_folder(
        folder,
        lambda staging: save_model(model, tokenizer, staging),
        stage=stage,
        parents=(),
        data=data,
        prompt_template=DataArguments.prompt_template,
        seed=settings.seed,
        config=asdict(settings),
        metrics=metrics,
    )


def _write_dataset(folder: Path, examples: dict[str, list[corpus.Example]]) -> list[dict[str, Any]]:
    """Write one JSONL file per split and return the manifest's description of them."""
    folder.mkdir(parents=True)
    described = []
    for split, rows in examples.items():
        content = "".join(json.dumps(row.row(), ensure_ascii=False) + "\n" for row in rows).encode()
        (folder / f"{split}.jsonl").write_bytes(content)
        sha256 = artifacts.sha256_bytes(content)
        described.append({"name": EMBEDDED, "split": split, "rows": len(rows), "sha256": sha256})
    return described
