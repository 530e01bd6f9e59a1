"""Tasks: one data set or several with weights, each read, templated and tokenized by its own options."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from yunque.data.arguments import INSTRUCTION_TEMPLATES, DataArguments, MixtureArguments, TemplateArguments
from yunque.data.chat import MESSAGES, chat_frame
from yunque.data.instructions import load_instructions
from yunque.data.loading import LoadedData
from yunque.data.prompts import prepare_prompts
from yunque.data.targets import encode_continuations, encode_conversations, encode_targets
from yunque.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """A data set, how its prompts are made, and its weight in the mixture."""

    name: str
    data: DataArguments
    templates: TemplateArguments
    weight: float | None = None


@dataclass(frozen=True)
class Encoding:
    """What the model wants: prompts of at most ``prompt_limit`` tokens; answers of at most ``max_target_length``.

    Every answer ends with one of ``eos_ids``; decoder-only models read prompt and answer as one sequence.
    """

    encoder_decoder: bool
    prompt_limit: int
    max_target_length: int
    eos_ids: Sequence[int]


@dataclass(frozen=True)
class PreparedTask:
    """Rows to train on and to test, the latter with "query", "prompt_ids" and "references"; where they came from."""

    name: str
    train: datasets.Dataset
    test: datasets.Dataset
    sources: list[dict[str, Any]]
    report: str


def tasks_of(data: DataArguments, templates: TemplateArguments, mixture: MixtureArguments) -> list[Task]:
    """Tasks to train on: those of the mixture, or the run's own data as one.

    Raises:
        InputError: a task with an option that is none, or with one that its group refuses.
    """
    if not mixture.mixture:
        return [Task("test", data, templates)]
    return [_task(options, data, templates, "mixture") for options in mixture.tasks()]


def old_task_of(data: DataArguments, templates: TemplateArguments, mixture: MixtureArguments) -> Task | None:
    """The task that is watched for forgetting.

    Raises:
        InputError: as ``tasks_of``.
    """
    options = mixture.old()
    return None if options is None else _task(options, data, templates, "old_task")


def prepare_task(task: Task, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, seed: int) -> PreparedTask:
    """Load, fill templates and tokenize both splits of ``task``.

    Raises:
        InputError: as ``load_instructions``, ``chat_frame`` and ``prepare_prompts``.
    """
    data = load_instructions(task.data, task.templates, seed)
    report = [str(data)]
    encoded = {}
    chats = MESSAGES in data.train.column_names
    frame = chat_frame(tokenizer, task.templates.system_prompt) if task.templates.chat_template and not chats else None
    for split, rows in (("train", data.train), ("test", data.test)):
        if frame is not None:
            rows = frame.wrap(rows, task.data.prompt_template)
        prompts = prepare_prompts(
            rows,
            tokenizer,
            task.data,
            append_eos=encoding.encoder_decoder,
            model_limit=encoding.prompt_limit,
            special_tokens=frame is None,
        )
        length = encoding.max_target_length
        if chats and not encoding.encoder_decoder:
            most = None if encoding.prompt_limit is None else encoding.prompt_limit + length
            labelled, targets = encode_conversations(prompts.dataset, tokenizer, most)
        elif encoding.encoder_decoder:
            labelled, targets = encode_targets(prompts.dataset, tokenizer, length, encoding.eos_ids)
        else:
            labelled, targets = encode_continuations(prompts.dataset, tokenizer, length, encoding.eos_ids, frame)
        kept = {"query": list(prompts.dataset["query"]), "references": list(prompts.dataset["references"])}
        kept |= {"prompt_ids": list(prompts.dataset["input_ids"])} if split == "test" else {}
        encoded[split] = _with_columns(labelled, kept) if split == "test" else labelled
        report += [f"{split} {prompts.report}", f"{split} {targets}"]
    sources = [{"task": task.name, **source} for source in data.sources] if task.name != "test" else data.sources
    return PreparedTask(task.name, encoded["train"], encoded["test"], sources, "\n".join(report))


def prompt_template_of(tasks: Sequence[Task]) -> str | None:
    """The one template of a run, for its manifest; None where rows have several."""
    if len(tasks) > 1:
        return None
    templates = tasks[0].templates.prompt_templates or [tasks[0].data.prompt_template]
    return INSTRUCTION_TEMPLATES.get(templates[0], templates[0]) if len(templates) == 1 else None


def load_task(task: Task, seed: int) -> LoadedData:
    """Only read ``task``: for a tokenizer that is trained on its texts.

    Raises:
        InputError: as ``load_instructions``.
    """
    return load_instructions(task.data, task.templates, seed)


def mix(parts: Sequence[datasets.Dataset], weights: Sequence[float | None], seed: int) -> datasets.Dataset:
    """As many rows as ``parts`` have, shares of them by ``weights``: a task with too few rows gives them repeatedly.

    Without weights all rows once.
    """
    shares = np.array([len(part) if weight is None else weight for part, weight in zip(parts, weights, strict=True)])
    wanted = shares / shares.sum() * sum(len(part) for part in parts)
    counts = np.diff(np.round(np.concatenate([[0.0], wanted.cumsum()]))).astype(int)
    rng = np.random.default_rng(seed)
    drawn = []
    for part, count in zip(parts, counts.tolist(), strict=True):
        whole, rest = divmod(count, len(part))
        rows = [*list(range(len(part))) * whole, *np.sort(rng.permutation(len(part))[:rest]).tolist()]
        drawn.append(part.select(rows, keep_in_memory=True))
    return datasets.concatenate_datasets(drawn)


def _with_columns(rows: datasets.Dataset, columns: dict[str, list[Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({name: list(rows[name]) for name in rows.column_names} | columns)


def _task(options: dict[str, Any], data: DataArguments, templates: TemplateArguments, where: str) -> Task:
    changes = dict(options)
    name, weight = changes.pop("name"), changes.pop("weight", None)
    if "prompt_template" in changes:
        changes.setdefault("prompt_templates", None)  # the task's own, not the run's phrasings
    groups: list[Any] = []
    try:
        for group in (data, templates):
            names = {field.name for field in dataclasses.fields(group)} & set(changes)
            groups.append(dataclasses.replace(group, **{key: changes.pop(key) for key in names}))
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: task '{name}': {error}") from error
    if changes:
        raise InputError(f"{where}: task '{name}': unknown option {', '.join(changes)}; give data options only")
    return Task(name, groups[0], groups[1], weight)
