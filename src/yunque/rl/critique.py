"""Constitutional data, step by step: answers, critiques and revisions (SFT), candidates and judgements (preferences).

Bai et al. 2022, "Constitutional AI: Harmlessness from AI Feedback". Every step is a JSONL file in the folder of steps;
a line is made again only where its content hash says that what it is made of has changed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from yunque.data.arguments import SourceArguments
from yunque.data.loading import RawSplit, load_one, require_column, text_of
from yunque.errors import InputError
from yunque.models.arguments import GenerationArguments
from yunque.rl.constitution import Constitution, Principle, fill
from yunque.rl.feedback_arguments import FeedbackArguments
from yunque.rl.judge import FIRST, SECOND, Pair, Verdict, judge
from yunque.rl.ledger import Ledger, content_hash
from yunque.rl.writing import Request, Writer, stream

_TOO_LONG = "the prompt of this step is longer than the model reads; write the text here, or shorten what it is made of"
_PAIRS_AT_ONCE = 8  # judged together, and lost together when the run is stopped in the middle of them


@dataclass(frozen=True)
class RedTeamPrompt:
    """A prompt with the id that names it in every file."""

    id: str
    text: str


def load_prompts(args: FeedbackArguments) -> tuple[list[RedTeamPrompt], dict[str, Any]]:
    """Read the red-team prompts, and where they came from (for the manifest); ids are column `id` or row numbers.

    Raises:
        InputError: nothing readable, no such column, no prompt, an id twice.
    """

    def normalise(raw: RawSplit) -> list[dict[str, Any]]:
        require_column(raw, args.prompt_column, "prompt_column")
        rows = []
        for number, row in enumerate(raw.rows, 1):
            text = text_of(row.get(args.prompt_column), f"prompt_column: '{args.prompt_column}'")
            if text is not None:
                rows.append({"id": text_of(row.get("id"), "column 'id'") or str(number), "prompt": text})
        return rows

    source = SourceArguments(
        dataset_name=args.dataset_name, dataset_config=args.dataset_config, train_split=args.train_split
    )
    loaded = load_one(source, "train_split", normalise)
    rows = loaded.rows.to_list()[: args.max_prompts]
    names = [row["id"] for row in rows]
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise InputError(f"dataset_name: two prompts of '{args.dataset_name}' have the id '{name}'; give each its own")
    return [RedTeamPrompt(row["id"], row["prompt"]) for row in rows], {**loaded.source, "rows": len(rows)}


@dataclass(frozen=True)
class _Task:
    """A text to be written: its key, the prompt, the random stream, and fields for the reader of the file."""

    key: str
    prompt: str
    stream: int
    fields: dict[str, str]
    round: int | None = None

    @property
    def line_key(self) -> str:
        """Key of the line in the file."""
        return self.key if self.round is None else f"{self.key}/{self.round}"


class ConstitutionalData:
    """The steps over one list of prompts; each returns what its file holds afterwards, in the prompts' order.

    Raises:
        InputError: more rounds than principles.
    """

    def __init__(
        self,
        args: FeedbackArguments,
        generation: GenerationArguments,
        constitution: Constitution,
        prompts: Sequence[RedTeamPrompt],
        folder: Path,
        log: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> None:
        if args.num_revisions > len(constitution.principles):
            raise InputError(
                f"num_revisions: {args.num_revisions} rounds, but the constitution has "
                f"{len(constitution.principles)} principles; lower it"
            )
        self.args, self.generation, self.constitution = args, generation, constitution
        self.prompts, self.folder, self.log = list(prompts), folder, log
        self.frames = constitution.frames
        self._keys: dict[str, list[str]] = {}  # of each file, in the order of its lines

    def revisions(self, writer: Writer) -> tuple[list[dict[str, str]], dict[str, float]]:
        """Answer every prompt, criticise and revise the answer ``num_revisions`` times: SFT rows and counts.

        Rows have "id", "instruction", an empty "input" and "output", the last revision; prompts without one
        are left out and counted.
        """
        first = self._write(writer, "answers", "answer", [self._answer_task(one, "answer") for one in self.prompts])
        last = dict(first)
        principles = {one.id: self._drawn_principles(one) for one in self.prompts}
        for number in range(self.args.num_revisions):
            chosen = {name: drawn[number] for name, drawn in principles.items()}
            critiques = self._write(writer, "critiques", "critique", self._critique_tasks(number, chosen, last))
            last = self._write(writer, "revisions", "revision", self._revision_tasks(number, chosen, last, critiques))
        rows = [
            {"id": one.id, "instruction": one.text, "input": "", "output": last[one.id].strip()}
            for one in self.prompts
            if last.get(one.id, "").strip()
        ]
        changed = [row["output"] != first[row["id"]].strip() for row in rows]
        return rows, {
            "answers": len(first),
            "sft_rows": len(rows),
            "sft_dropped": len(self.prompts) - len(rows),
            "share_revised": float(np.mean(changed)) if rows else 0.0,
        }

    def preferences(self, writer: Writer, judging: Writer) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """Sample two answers per prompt and have them judged: rows of "id", "prompt", "chosen", "rejected", and counts.

        Pairs of equal texts, with an empty answer, or without a verdict make no row and are counted.
        """
        tasks = [self._answer_task(one, side) for one in self.prompts for side in (FIRST, SECOND)]
        candidates = self._write(writer, "candidates", "answer", tasks)
        sides = {
            one.id: [candidates.get(f"{one.id}/{side}", "").strip() for side in (FIRST, SECOND)] for one in self.prompts
        }
        empty = [one for one in self.prompts if not all(sides[one.id])]
        equal = [one for one in self.prompts if all(sides[one.id]) and len(set(sides[one.id])) == 1]
        skipped = {one.id for one in (*empty, *equal)}
        judged = [one for one in self.prompts if one.id not in skipped]
        verdicts = self._judge(judging, {one.id: Pair(one.text, *sides[one.id]) for one in judged})
        rows = []
        for one in judged:
            preferred = verdicts[one.id]["preferred"]
            if preferred is not None:
                chosen, rejected = sides[one.id] if preferred == FIRST else reversed(sides[one.id])
                rows.append({"id": one.id, "prompt": one.text, "chosen": chosen, "rejected": rejected})
        abstained = len(judged) - len(rows)
        return rows, {
            "pairs_judged": len(judged),
            "pairs": len(rows),
            "abstained": abstained,
            "share_abstained": abstained / len(judged) if judged else 0.0,
            "pairs_equal": len(equal),
            "pairs_empty": len(empty),
            "comparisons_unreadable": sum(int(record["unreadable"] or 0) for record in verdicts.values()),
        }

    def _drawn_principles(self, prompt: RedTeamPrompt) -> list[Principle]:
        generator = np.random.default_rng(stream(self.args.seed, "principles", prompt.id))
        return self.constitution.draw(generator, self.args.num_revisions)

    def _answer_task(self, prompt: RedTeamPrompt, purpose: str) -> _Task:
        key = prompt.id if purpose == "answer" else f"{prompt.id}/{purpose}"
        text = fill(self.frames.answer, prompt=prompt.text)
        return _Task(key, text, stream(self.args.seed, purpose, prompt.id), {"prompt": prompt.text})

    def _critique_tasks(
        self, number: int, principles: Mapping[str, Principle], answers: Mapping[str, str]
    ) -> list[_Task]:
        tasks = []
        for one in self.prompts:
            if one.id in answers:
                request = principles[one.id].critique_request
                text = fill(self.frames.critique, prompt=one.text, answer=answers[one.id], request=request)
                tasks.append(self._task("critique", one, number, principles[one.id], text))
        return tasks

    def _revision_tasks(
        self,
        number: int,
        principles: Mapping[str, Principle],
        answers: Mapping[str, str],
        critiques: Mapping[str, str],
    ) -> list[_Task]:
        tasks = []
        for one in self.prompts:
            if one.id in critiques:
                request = principles[one.id].revision_request
                texts = {"prompt": one.text, "answer": answers[one.id], "critique": critiques[one.id]}
                text = fill(self.frames.revision, request=request, **texts)
                tasks.append(self._task("revision", one, number, principles[one.id], text))
        return tasks

    def _task(self, step: str, prompt: RedTeamPrompt, number: int, principle: Principle, text: str) -> _Task:
        numbered = stream(self.args.seed, step, prompt.id, number)
        return _Task(prompt.id, text, numbered, {"principle": principle.id}, round=number + 1)

    def _write(self, writer: Writer, name: str, field: str, tasks: Sequence[_Task]) -> dict[str, str]:
        """Have the missing lines of a step's file written; the text of each task by its key, empty ones left out."""
        started = time.perf_counter()
        ledger = self._ledger(name, (field,))
        options = asdict(self.generation)
        hashes = [content_hash(name, task.prompt, task.stream, writer.identity, options) for task in tasks]
        missing = [place for place, task in enumerate(tasks) if ledger.get(task.line_key, hashes[place]) is None]
        requests = [Request(tasks[place].prompt, tasks[place].stream) for place in missing]
        with tqdm(total=len(tasks), initial=len(tasks) - len(missing), desc=name, unit="text") as bar:
            for number, text in writer.write(requests, self.generation):
                task = tasks[missing[number]]
                problem = {} if text is not None else {"problem": _TOO_LONG}
                ledger.append(task.line_key, hashes[missing[number]], {**task.fields, field: text, **problem})
                bar.update()
        self._keys.setdefault(name, []).extend(task.line_key for task in tasks)
        ledger.compact(self._keys[name])
        self.log({"step": name, "lines": len(tasks), "made": len(missing), "wall_s": time.perf_counter() - started})
        records = [ledger.get(task.line_key, made_of) for task, made_of in zip(tasks, hashes, strict=True)]
        texts = {task.key: record[field] for task, record in zip(tasks, records, strict=True) if record}
        return {key: text for key, text in texts.items() if text is not None}

    def _judge(self, judging: Writer, pairs: Mapping[str, Pair]) -> dict[str, dict[str, Any]]:
        """Have the missing verdicts given, a few pairs at a time; the record of each pair by the prompt's id."""
        started = time.perf_counter()
        ledger = self._ledger("judgements", ("preferred", "margin", "unreadable"))
        asked = [self.args.min_judge_margin, self.args.judge_max_new_tokens, self.frames.preference]
        asked += [[one.id, one.priority, one.preference_question] for one in self.constitution.principles]
        hashes = {name: content_hash("judge", asdict(pair), judging.identity, asked) for name, pair in pairs.items()}
        missing = [name for name in pairs if ledger.get(name, hashes[name]) is None]
        with tqdm(total=len(pairs), initial=len(pairs) - len(missing), desc="judgements", unit="pair") as bar:
            for first in range(0, len(missing), _PAIRS_AT_ONCE):
                names = missing[first : first + _PAIRS_AT_ONCE]
                verdicts = judge(
                    [pairs[name] for name in names],
                    self.constitution,
                    judging,
                    min_margin=self.args.min_judge_margin,
                    max_new_tokens=self.args.judge_max_new_tokens,
                )
                for name, verdict in zip(names, verdicts, strict=True):
                    ledger.append(name, hashes[name], _record(verdict))
                    bar.update()
        ledger.compact(pairs)
        wall_s = time.perf_counter() - started
        self.log({"step": "judgements", "lines": len(pairs), "made": len(missing), "wall_s": wall_s})
        records = {name: ledger.get(name, hashes[name]) or {} for name in pairs}
        for name, record in records.items():
            if record["preferred"] not in (FIRST, SECOND, None):
                raise InputError(
                    f"{ledger.path}, key {name}: preferred is {record['preferred']!r}; give {FIRST}, {SECOND} or null"
                )
        return records

    def _ledger(self, name: str, fields: Sequence[str]) -> Ledger:
        return Ledger(self.folder / f"{name}.jsonl", fields)


def _record(verdict: Verdict) -> dict[str, Any]:
    return {
        "preferred": verdict.preferred,
        "margin": round(verdict.margin, 4),
        "principles": ", ".join(verdict.principles),
        "unreadable": verdict.unreadable,
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
