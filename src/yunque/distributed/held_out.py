"""Held-out rows under a model: the loss of every reference answer and the model's own answers, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from transformers.integrations import is_deepspeed_zero3_enabled

from yunque.data.targets import IGNORED, decoder_inputs
from yunque.distributed.layouts import data_ranks
from yunque.metrics.bootstrap import bootstrap, paired_bootstrap
from yunque.metrics.rouge import rouge_scores
from yunque.models.adapter import ModelAdapter, TokenIds, pad


@dataclass(frozen=True)
class HeldOutScores:
    """Per row: nats of the reference's label tokens and their number, ROUGE-L in 0..1 and the answer as text."""

    nats: np.ndarray
    num_tokens: np.ndarray
    rougeL: np.ndarray
    predictions: list[str]

    @property
    def losses(self) -> np.ndarray:
        """Nats per label token of each row."""
        return self.nats / self.num_tokens

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        arrays = {"nats": self.nats, "num_tokens": self.num_tokens, "rougeL": self.rougeL}
        return {name: value.tolist() for name, value in arrays.items()} | {"predictions": self.predictions}

    @staticmethod
    def from_json(content: dict[str, Any]) -> HeldOutScores:
        """What to_json was made of."""
        nats, num_tokens, rouge = (np.array(content[name]) for name in ("nats", "num_tokens", "rougeL"))
        return HeldOutScores(nats, num_tokens, rouge, content["predictions"])

    def as_dict(self, seed: int) -> dict[str, Any]:
        """Loss per label token over all rows, and ROUGE-L with its interval."""
        loss = float(self.nats.sum() / self.num_tokens.sum())
        return {"eval_loss": loss, "rougeL": bootstrap(self.rougeL, seed=seed).as_dict()}


class HeldOut:
    """Answers rows greedily and scores their references, every rank a share of the rows.

    ``rows`` have "input_ids" and "labels" as the trainer reads them, "prompt_ids" and "references".
    """

    def __init__(
        self, accelerator: Accelerator, adapter: ModelAdapter, tokenizer: Any, *, batch_size: int, max_new_tokens: int
    ) -> None:
        self.accelerator, self.adapter, self.tokenizer = accelerator, adapter, tokenizer
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    @torch.no_grad()
    def scores(self, model: Any, rows: datasets.Dataset) -> HeldOutScores:
        """Losses and answers of ``model``, in eval mode for the time of it; the same on every rank."""
        was_training = model.training
        model.eval()
        found: list[tuple[int, float, int, str]] = []
        batches = self._share(len(rows))
        with self.accelerator.autocast():
            for numbers in batches:
                batch = rows.select(numbers, keep_in_memory=True)
                nats, counts = self._losses(model, batch)
                prompts = list(batch["prompt_ids"])
                # Virtual tokens belong right before the prompt, but PEFT puts them before the padding on its left.
                alone = not model.config.is_encoder_decoder and _has_virtual_tokens(model)
                parts = [[prompt] for prompt in prompts] if alone else [prompts]
                texts = [text for part in parts for text in self._answers(model, part)]
                found += zip(numbers, nats.tolist(), counts.tolist(), texts, strict=True)
        model.train(was_training)
        by_row = {number: (nats, count, text) for number, nats, count, text in gather_object(found)}
        all_nats, all_counts, all_texts = zip(*(by_row[number] for number in range(len(rows))), strict=True)
        rouge = rouge_scores(all_texts, list(rows["references"]))["rougeL"]
        return HeldOutScores(np.array(all_nats), np.array(all_counts), rouge, list(all_texts))

    def _share(self, count: int) -> list[list[int]]:
        """Batches of the rows of this rank: as many and as large on every rank, so that none waits for another."""
        rank, ranks = data_ranks(self.accelerator.process_index, self.accelerator.num_processes)
        size = -(-count // ranks)
        here = [min(row, count - 1) for row in range(rank * size, (rank + 1) * size)]
        return [here[start : start + self.batch_size] for start in range(0, size, self.batch_size)]

    def _losses(self, model: Any, batch: datasets.Dataset) -> tuple[Tensor, Tensor]:
        """Nats (B,) of the labels of each row and their number (B,)."""
        device = self.accelerator.device
        input_ids, mask = pad(batch["input_ids"], self.adapter.pad_id, device)
        labels, _ = pad(batch["labels"], IGNORED, device)
        inputs = {"input_ids": input_ids, "attention_mask": mask.long()}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = decoder_inputs(labels, model)
        logits = model(**inputs, use_cache=False).logits[:, -labels.shape[1] :]  # without those of virtual tokens
        if not model.config.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        nats = cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none", ignore_index=IGNORED)
        return nats.sum(dim=1), (labels != IGNORED).sum(dim=1)

    def _answers(self, model: Any, prompts: Sequence[TokenIds]) -> list[str]:
        inputs = self.adapter.generation_inputs(prompts, self.accelerator.device)
        tokens = model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.adapter.eos_ids,
            pad_token_id=self.adapter.pad_id,
            synced_gpus=is_deepspeed_zero3_enabled() or isinstance(model, FSDPModule),
        )
        answers = tokens[:, self.adapter.response_start(inputs) :]
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def _has_virtual_tokens(model: Any) -> bool:
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def change(before: HeldOutScores, after: HeldOutScores, seed: int) -> dict[str, Any]:
    """Loss and ROUGE-L before and after, and the paired changes: of the rows' mean loss and of ROUGE-L."""
    result: dict[str, Any] = {"num_rows": len(before.nats)}
    for name, first, second in (
        ("loss", before.losses, after.losses),
        ("rougeL", before.rougeL, after.rougeL),
    ):
        result |= {f"{name}_before": float(first.mean()), f"{name}_after": float(second.mean())}
        result[f"{name}_change"] = paired_bootstrap(first, second, seed=seed).as_dict()
    return result


def show_change(name: str, report: dict[str, Any]) -> str:
    """One line for the user."""
    parts = [
        f"{label} {report[f'{key}_before']:.3f} -> {report[f'{key}_after']:.3f}, {_interval(report[f'{key}_change'])}"
        for key, label in (("loss", "loss of a row"), ("rougeL", "ROUGE-L"))
    ]
    return f"{name}: {'; '.join(parts)}; {report['num_rows']:,} rows"


def _interval(change: dict[str, float | None]) -> str:
    ends = ["unknown" if change[end] is None else f"{change[end]:+.3f}" for end in ("low", "high")]
    return f"change {change['mean']:+.3f} [{ends[0]}, {ends[1]}]"


def answer_rows(rows: datasets.Dataset, scores: HeldOutScores) -> list[dict[str, Any]]:
    """Rows of "query", "prediction" and "references" for people to read."""
    columns = zip(rows["query"], scores.predictions, rows["references"], strict=True)
    return [{"query": query, "prediction": text, "references": references} for query, text, references in columns]
