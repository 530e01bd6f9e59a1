"""Sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947): the teacher's answers become the labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.progress import Progress

from yunque.compression.distillation import answers_of, labelled_row
from yunque.data.targets import IGNORED
from yunque.models.adapter import ModelAdapter

FILE = "teacher_answers.jsonl"


class TeacherAnswers:
    """Answers of the teacher to every row's prompt, kept line by line in ``folder`` so that a resumed run goes on."""

    def __init__(
        self, accelerator: Accelerator, adapter: ModelAdapter, folder: Path, *, batch_size: int, max_new_tokens: int
    ) -> None:
        self.accelerator, self.adapter, self.path = accelerator, adapter, folder / FILE
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    @torch.no_grad()
    def relabel(self, rows: datasets.Dataset, teacher: Any, tokenizer: Any, *, num_beams: int) -> datasets.Dataset:
        """``rows`` with the teacher's answers as labels; every rank answers a share."""
        prompts = [_prompt(row, encoded=self.adapter.config.is_encoder_decoder) for row in rows]
        done = dict(self._read()) if self.path.is_file() else {}
        self.accelerator.wait_for_everyone()  # all have read before one writes
        todo = sorted((number for number in range(len(prompts)) if number not in done), key=lambda n: len(prompts[n]))
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        together = self.batch_size * ranks
        with Progress(disable=not self.accelerator.is_main_process) as progress:
            bar = progress.add_task("teacher's answers", total=len(prompts), completed=len(done))
            for start in range(0, len(todo), together):
                numbers = todo[start : start + together]
                here = numbers[rank::ranks] or numbers[:1]  # a rank without a row repeats one: engines wait for all
                texts = [prompts[number] for number in here]
                answers = answers_of(
                    teacher, self.adapter, texts, self.max_new_tokens, self.accelerator.device, num_beams=num_beams
                )
                found = dict(gather_object(list(zip(here, answers, strict=True))))
                self._append(found, tokenizer)
                done |= found
                progress.update(bar, completed=len(done))
        labelled = [labelled_row(self.adapter, prompt, done[number]) for number, prompt in enumerate(prompts)]
        return datasets.Dataset.from_list(labelled)

    def _append(self, found: dict[int, list[int]], tokenizer: Any) -> None:
        if not self.accelerator.is_main_process:
            return
        texts = tokenizer.batch_decode(list(found.values()), skip_special_tokens=True)
        with self.path.open("a", encoding="utf-8") as file:
            for (number, tokens), text in zip(found.items(), texts, strict=True):
                file.write(json.dumps({"row": number, "text": text, "tokens": tokens}, ensure_ascii=False) + "\n")

    def _read(self) -> Iterator[tuple[int, list[int]]]:
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the run was killed while it wrote this last line
                continue
            yield row["row"], row["tokens"]


def _prompt(row: dict[str, Any], *, encoded: bool) -> list[int]:
    if encoded:
        return list(row["input_ids"])
    return [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED]
