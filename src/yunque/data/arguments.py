"""Which data a recipe reads and how: the argument groups, importable without torch, transformers or datasets."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from yunque.errors import InputError

TEXT_FIELD = "{text}"


@dataclass
class SourceArguments:
    """Where the rows come from and which of them are used.

    Raises:
        InputError: a split name that is a slice, two equal splits, a share outside (0, 1), a limit below 1.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, folder of save_to_disk or with train/validation (or dev)/test files, or one file: .jsonl,"
            " .json, .csv, their .gz, .parquet, .arrow"
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set"})
    train_split: str = field(default="train", metadata={"help": "Split to train on; one file is the split `train`"})
    test_split: str | None = field(
        default=None,
        metadata={
            "help": "Held-out split; by default `test`, else `validation` or `dev`, else `test_size` of the train split"
        },
    )
    test_size: float = field(
        default=0.1, metadata={"help": "Share of the train split held out (by the seed) where there is no test split"}
    )
    group_column: str | None = field(
        default=None, metadata={"help": "Column whose value puts rows into one group, such as `topic`"}
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Use so many train rows, drawn at random and the same for every seed, before length filters"},
    )
    max_test_samples: int | None = field(
        default=None,
        metadata={"help": "Use so many test rows, drawn at random and the same for every seed, before length filters"},
    )

    def __post_init__(self) -> None:
        """Check what can be checked without the data."""
        for name in ("train_split", "test_split"):
            split = getattr(self, name)
            if split is not None and not re.fullmatch(r"[\w.-]+", str(split)):
                raise InputError(
                    f"{name}: '{split}' is not the plain name of a split; to use some of its rows set max_train_samples"
                    " or max_test_samples"
                )
        if self.test_split == self.train_split:
            raise InputError(
                f"test_split: '{self.test_split}' is also the train_split; name another one, or leave it out"
                " to hold out test_size of it"
            )
        if not isinstance(self.test_size, int | float) or not 0 < self.test_size < 1:
            raise InputError(f"test_size: {self.test_size} is not a share; give a number between 0 and 1, such as 0.1")
        _check_limits(self, "max_train_samples", "max_test_samples")


@dataclass
class DataArguments(SourceArguments):
    """Texts with reference answers, turned into prompts.

    Raises:
        InputError: a template without ``{text}``, a minimum above its maximum, a limit below 1, and as the base class.
    """

    text_column: str = field(default="dialogue", metadata={"help": "Column with the text that goes into the prompt"})
    target_column: str = field(
        default="summary",
        metadata={
            "help": "Column with the reference answer; where it is numbered (summary1, ...) all of them are used"
        },
    )
    prompt_template: str = field(
        default="Summarize the following conversation.\n\n{text}\n\nSummary:",
        metadata={"help": "The prompt, with {text} where the text goes"},
    )
    min_text_chars: int | None = field(default=None, metadata={"help": "Drop rows whose text has fewer characters"})
    max_text_chars: int | None = field(default=None, metadata={"help": "Drop rows whose text has more characters"})
    min_prompt_tokens: int | None = field(default=None, metadata={"help": "Drop rows whose prompt has fewer tokens"})
    max_prompt_tokens: int | None = field(default=None, metadata={"help": "Drop rows whose prompt has more tokens"})
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Cut the text of a prompt with more tokens than this (default: what the model takes)"},
    )

    def __post_init__(self) -> None:
        """Check what can be checked without the data."""
        super().__post_init__()
        if self.prompt_template.count(TEXT_FIELD) != 1:
            raise InputError(
                f"prompt_template: must hold {TEXT_FIELD} once, where the text goes, such as 'Summarize: {TEXT_FIELD}'"
            )
        _check_range(self, "min_text_chars", "max_text_chars")
        _check_range(self, "min_prompt_tokens", "max_prompt_tokens")
        _check_limits(self, "max_prompt_length")


@dataclass
class LabelledDataArguments(SourceArguments):
    """Texts with one label each, for a classifier.

    Raises:
        InputError: fewer than two labels, a label twice, a label without a value, and as the base class.
    """

    text_column: str = field(default="text", metadata={"help": "Column with the text to classify"})
    label_column: str = field(default="label", metadata={"help": "Column with the label"})
    label_names: list[str] = field(
        default_factory=lambda: ["nothate", "hate"], metadata={"help": "Names of the labels, in the model's order"}
    )
    label_values: list[str] | None = field(
        default=None,
        metadata={
            "help": "What the data says for each of `label_names`, in that order, such as `non-hateful hateful`;"
            " by default the name itself or its position from 0"
        },
    )

    def __post_init__(self) -> None:
        """Check what can be checked without the data."""
        super().__post_init__()
        self.label_names = [str(name) for name in self.label_names]  # YAML reads 0 and 1 as numbers
        if len(self.label_names) < 2 or len(set(self.label_names)) < len(self.label_names):
            raise InputError(f"label_names: {' '.join(self.label_names)}: give at least two names, each of them once")
        if self.label_values is None:
            return
        self.label_values = [str(value) for value in self.label_values]
        if len(self.label_values) != len(self.label_names) or len(set(self.label_values)) < len(self.label_values):
            raise InputError(
                f"label_values: {' '.join(self.label_values)}: give one value for each label, in the order"
                f" of label_names ({' '.join(self.label_names)})"
            )


@dataclass
class PreferenceArguments(SourceArguments):
    """Prompts with a chosen and a rejected answer: as pairs, as hh-rlhf's dialogues, or as rankings.

    A file with the column of completions holds rankings; one without the column of prompts, whole dialogues.

    Raises:
        InputError: an unknown choice, two sources of margins, and as the base class.
    """

    prompt_column: str = field(default="prompt", metadata={"help": "Column with the prompt"})
    chosen_column: str = field(
        default="chosen", metadata={"help": "Column with the better answer (or the dialogue that ends with it)"}
    )
    rejected_column: str = field(
        default="rejected", metadata={"help": "Column with the worse answer (or the dialogue that ends with it)"}
    )
    completions_column: str = field(
        default="completions", metadata={"help": "Rankings: column with the list of answers to one prompt"}
    )
    ranks_column: str = field(
        default="ranks", metadata={"help": "Rankings: column with their ranks, 1 the best, null for a rejected answer"}
    )
    scores_column: str = field(
        default="scores", metadata={"help": "Rankings without ranks: column with their scores, more is better"}
    )
    unranked: str = field(
        default="drop",
        metadata={"help": "Answers whose rank or score is null: `drop` them, or `last` to put them below all others"},
    )
    margin_column: str | None = field(
        default=None, metadata={"help": "Pairs: column with how much better the chosen answer is, 0 or more"}
    )
    margin_from_scores: bool = field(
        default=False, metadata={"help": "Rankings: take the difference of the two scores as the margin"}
    )

    def __post_init__(self) -> None:
        """Check what can be checked without the data."""
        super().__post_init__()
        if self.unranked not in ("drop", "last"):
            raise InputError(f"unranked: '{self.unranked}' is unknown; give drop or last")
        if self.margin_column is not None and self.margin_from_scores:
            raise InputError("margin_from_scores: margin_column gives the margins already; leave one of them out")
        if self.margin_from_scores and self.unranked == "last":
            raise InputError("unranked: last gives no score, but margin_from_scores needs one; set unranked: drop")


@dataclass
class GroupArguments:
    """How many groups ``group_column`` makes.

    Raises:
        InputError: fewer than 1.
    """

    max_groups: int = field(
        default=8, metadata={"help": "Groups: the column's commonest values, and one of all others; or length bands"}
    )

    def __post_init__(self) -> None:
        """Check the range."""
        if self.max_groups < 1:
            raise InputError(f"max_groups: {self.max_groups} is too small; give 1 or more")


@dataclass
class OpeningArguments(SourceArguments):
    """Texts whose first few tokens are prompts, for a model to go on from.

    Raises:
        InputError: a minimum above its maximum, a limit below 1, and as the base class.
    """

    text_column: str = field(default="text", metadata={"help": "Column with the text that the prompt opens"})
    min_text_chars: int | None = field(default=201, metadata={"help": "Drop rows whose text has fewer characters"})
    max_text_chars: int | None = field(default=None, metadata={"help": "Drop rows whose text has more characters"})
    prompt_tokens_low: int = field(default=2, metadata={"help": "Fewest tokens of a prompt, drawn for each row"})
    prompt_tokens_high: int = field(default=8, metadata={"help": "Most tokens of a prompt, itself included"})

    def __post_init__(self) -> None:
        """Check what can be checked without the data."""
        super().__post_init__()
        _check_range(self, "min_text_chars", "max_text_chars")
        _check_range(self, "prompt_tokens_low", "prompt_tokens_high")


INSTRUCTION_TEMPLATES = {
    "instruction_en": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "instruction_es": "### Instrucción:\n{instruction}\n\n### Entrada:\n{input}\n\n### Respuesta:\n",
}
"""Prompts for rows of instruction and input; the section of an empty column is left out."""


@dataclass
class TemplateArguments:
    """Prompts made of several columns, several phrasings of one task, and the tokenizer's chat template.

    Raises:
        InputError: a template without a placeholder, a system prompt without a chat template.
    """

    prompt_templates: list[str] | None = field(
        default=None,
        metadata={
            "help": "Phrasings of the prompt in place of prompt_template, one drawn for each row: texts with {column}"
            f" placeholders, or {' or '.join(INSTRUCTION_TEMPLATES)}"
        },
    )
    chat_template: bool = field(
        default=False, metadata={"help": "Put the prompt into the tokenizer's chat template, as the user's turn"}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System turn before it, with chat_template"})

    def __post_init__(self) -> None:
        """Check the templates."""
        if self.system_prompt is not None and not self.chat_template:
            raise InputError("system_prompt: is for chat_template only; add it or leave system_prompt out")
        if self.prompt_templates is not None and not self.prompt_templates:
            raise InputError("prompt_templates: is empty; give one or more, or leave it out")
        for template in self.prompt_templates or []:
            if template not in INSTRUCTION_TEMPLATES and not placeholders(template):
                raise InputError(
                    f"prompt_templates: '{template}' has no placeholder for a column, such as {{instruction}}, and is"
                    f" none of {', '.join(INSTRUCTION_TEMPLATES)}"
                )


def placeholders(template: str) -> list[str]:
    """Columns that ``template`` names in braces, in order."""
    return re.findall(r"\{(\w+)\}", template)


@dataclass
class MixtureArguments:
    """Several tasks trained together, and an old one that should not be forgotten.

    Raises:
        InputError: an entry that is not a mapping with a name.
    """

    mixture: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tasks as JSON objects: name, weight (share of train rows; by default the number of its rows) and"
            " the data options in which a task differs from the run's"
        },
    )
    old_task: str | None = field(
        default=None,
        metadata={"help": "One more such object, never trained on: its test rows are answered before and after"},
    )
    evaluate_before: bool = field(
        default=False, metadata={"help": "Answer the test rows before training too, and give the change"}
    )

    def __post_init__(self) -> None:
        """Check that every task can be read."""
        names = [task["name"] for task in self.tasks()]
        if len(set(names)) < len(names):
            raise InputError(f"mixture: {', '.join(names)}: give each task a name of its own")
        if len({"weight" in task for task in self.tasks()}) > 1:
            raise InputError("mixture: some tasks have a weight, some have none; give one to all of them or to none")
        if (old := self.old()) is not None and old["name"] in (names or ["test"]):
            raise InputError(f"old_task: '{old['name']}' is also the name of a trained task; give it another")

    def tasks(self) -> list[dict[str, Any]]:
        """Entries of ``mixture``."""
        return [_task(text, "mixture") for text in self.mixture or []]

    def old(self) -> dict[str, Any] | None:
        """Entry of ``old_task``."""
        return None if self.old_task is None else _task(self.old_task, "old_task")


def _task(text: str, option: str) -> dict[str, Any]:
    try:
        task = json.loads(text)
    except ValueError as error:
        raise InputError(f"{option}: '{text}' is not a JSON object: {error}") from error
    if not isinstance(task, dict) or not isinstance(task.get("name"), str):
        raise InputError(f"{option}: '{text}': give an object with a name")
    weight = task.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
        raise InputError(f"{option}: weight {weight} of '{task['name']}' is not positive")
    return task


def _check_limits(arguments: Any, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise InputError(f"{name}: {value} is not a limit; give a whole number of at least 1, or leave it out")


def _check_range(arguments: Any, minimum: str, maximum: str) -> None:
    _check_limits(arguments, minimum, maximum)
    low, high = getattr(arguments, minimum), getattr(arguments, maximum)
    if low is not None and high is not None and low > high:
        raise InputError(f"{minimum}: {low} is more than {maximum}={high}, so no row would be left; lower it")
