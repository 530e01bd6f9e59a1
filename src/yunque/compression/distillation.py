"""A Trainer whose loss compares a student with a frozen teacher, for encoder-decoder and decoder-only models alike.

Shapes: B rows, L positions of the logits, N answer tokens of the batch, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from yunque.compression.arguments import DistillationArguments
from yunque.compression.divergences import divergence
from yunque.compression.students import Student
from yunque.data.targets import IGNORED, AnswerCollator
from yunque.distributed.trainers import LengthGrouping
from yunque.errors import InputError
from yunque.models.adapter import ModelAdapter
from yunque.models.copying import eval_mode

PARTS = ("soft", "hard", "hidden", "alignment")


@dataclass(frozen=True)
class Outputs:
    """Logits (N, V) that predict the answer tokens, and pairs of states to match: (rows, D) per kept layer."""

    logits_NV: Tensor
    states: list[Tensor]


class DistillationTrainer(LengthGrouping):
    """Trains a student on rows of "input_ids" and "labels" by the losses of ``DistillationArguments``.

    TRL's GKDTrainer and DistillationTrainer are for decoder-only chat rows and have neither labels of the teacher's
    answers nor hidden states nor a second teacher; their divergence is ours (tests/compression/test_divergences.py).
    Sums are divided by the answer tokens of all ranks and accumulated batches.
    """

    loss_is_scaled_for_ga = True
    model: Any

    def __init__(
        self,
        student: Student,
        teacher: Any,
        args: TrainingArguments,
        *,
        losses: DistillationArguments,
        adapter: ModelAdapter,
        tokenizer: Any,
        train_dataset: datasets.Dataset,
        aligned: Any = None,
    ) -> None:
        self.collate = collator(tokenizer, student.model)
        super().__init__(
            model=student.model,
            args=args,
            train_dataset=train_dataset,
            data_collator=self.collate,
            processing_class=tokenizer,
        )
        self.losses, self.adapter, self.origins = losses, adapter, student.origins
        self.teacher = frozen(teacher).to(self.args.device)
        self.aligned = self.teacher if aligned is None else frozen(aligned).to(self.args.device)
        if losses.hidden_weight:
            _check_widths(student, teacher)

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """Batches of one optimizer step, with their answer tokens counted over all ranks."""
        batches, _ = super().get_batch_samples(*args)
        tokens = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        return batches, self.accelerator.reduce(torch.tensor(tokens, device=self.args.device), reduction="sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Weighted sum of the parts over the answer tokens, by their count over ranks and accumulation."""
        own = self._turn_is_the_student_s()
        if own:
            inputs = self._prepare_inputs(self._sampled(model, inputs))
            tokens = (inputs["labels"] != IGNORED).sum()
            num_items_in_batch = self.accelerator.reduce(tokens, reduction="sum")
            num_items_in_batch = num_items_in_batch * self.current_gradient_accumulation_steps
        parts = self._parts(model, inputs, own)
        weights = [getattr(self.losses, f"{name}_weight") for name in PARTS]
        total = sum(weight * parts[name].sum() for weight, name in zip(weights, PARTS, strict=True) if weight)
        self._add_up(parts)
        return total / num_items_in_batch * self.accelerator.num_processes  # the engine averages over ranks

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts' means per answer token since the last line to a line that holds a loss."""
        if "loss" in logs and self._sums is not None:
            sums = self.accelerator.reduce(self._sums, reduction="sum")
            means = (sums[0] / sums[1].clamp(min=1)).tolist()
            for name, mean, count in zip(PARTS, means, sums[1].tolist(), strict=True):
                if count:
                    logs[f"loss/{name}"] = mean
            self._sums = None
        super().log(logs, start_time)

    def _turn_is_the_student_s(self) -> bool:
        """Drawn by seed and step, so that all ranks and a resumed run agree; never in an evaluation."""
        if not self.losses.on_policy_share or not self.model.training:
            return False
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        return bool(torch.rand((), generator=generator) < self.losses.on_policy_share)

    def _parts(self, model: Any, inputs: dict[str, Any], own: bool) -> dict[str, Tensor]:
        """Each part's loss (N,) per answer token; on the student's own answers neither labels nor states count."""
        hidden = bool(self.losses.hidden_weight) and not own
        student = self._forward(model, inputs, hidden)
        targets_N = answer_tokens(inputs["labels"])
        with torch.no_grad():
            teacher = self._forward(self.teacher, inputs, hidden)
            aligned = teacher
            if self.losses.alignment_weight and self.aligned is not self.teacher:
                aligned = self._forward(self.aligned, inputs, False)
        options = self.losses
        zeros_N = student.logits_NV.new_zeros(len(targets_N), dtype=torch.float32)
        parts = dict.fromkeys(PARTS, zeros_N[:0])
        if options.soft_weight:
            arguments = (options.divergence, options.distill_temperature, options.jsd_beta)
            parts["soft"] = divergence(student.logits_NV, teacher.logits_NV, *arguments)
        if options.hard_weight and not own:
            parts["hard"] = cross_entropy(student.logits_NV.float(), targets_N, reduction="none")
        if options.alignment_weight:
            parts["alignment"] = divergence(student.logits_NV, aligned.logits_NV, "reverse", 1.0, 0.5)
        if hidden:
            distances = [
                (mine.float() - theirs.float()).square().mean()
                for mine, theirs in zip(student.states, teacher.states, strict=True)
            ]
            parts["hidden"] = zeros_N + torch.stack(distances).mean()
        return parts

    def _forward(self, model: Any, inputs: Mapping[str, Tensor], hidden: bool) -> Outputs:
        """One pass: logits at the answer tokens and, if ``hidden``, the kept layers' outputs, padding left out."""
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        with self.accelerator.autocast():
            output = model(**rest, use_cache=False, output_hidden_states=hidden)
        encoded = self.adapter.config.is_encoder_decoder
        logits, mask = (output.logits, labels != IGNORED) if encoded else _shifted(output.logits, labels)
        states: list[Tensor] = []
        if hidden:
            assert self.origins is not None
            whole = model is self.teacher
            read = inputs["attention_mask"].bool()
            stacks = (
                [(output.encoder_hidden_states, read), (output.decoder_hidden_states, labels != IGNORED)]
                if encoded
                else [(output.hidden_states, read)]
            )
            for (found, mask_BL), origin in zip(stacks, self.origins.values(), strict=True):
                # The last state of a stack is normed, so that the student's last can only be like the teacher's last.
                layers = [*origin[:-1], len(found) - 2] if whole else range(len(origin))
                states += [found[layer + 1][mask_BL] for layer in layers]
        return Outputs(logits[mask], states)

    @torch.no_grad()
    def _sampled(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The batch's prompts with answers that the student samples, as the collator makes them of rows."""
        prompts = prompts_of(inputs, encoded=self.adapter.config.is_encoder_decoder)
        options = {"do_sample": True, "temperature": self.losses.on_policy_temperature, "top_k": 0}
        inner = self.accelerator.unwrap_model(model)
        with eval_mode(inner):
            answers = answers_of(inner, self.adapter, prompts, self.losses.max_new_tokens, self.args.device, **options)
        return self.collate([labelled_row(self.adapter, *row) for row in zip(prompts, answers, strict=True)])

    def _add_up(self, parts: Mapping[str, Tensor]) -> None:
        sums = torch.stack([parts[name].detach().sum().float() for name in PARTS])
        counts = torch.tensor([float(len(parts[name])) for name in PARTS], device=sums.device)
        both = torch.stack([sums, counts])
        self._sums = both if self._sums is None else self._sums + both


def collator(tokenizer: Any, model: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """Pads rows on the right, labels with -100, and gives an encoder-decoder model its decoder's inputs."""
    to_the_right = deepcopy(tokenizer)
    to_the_right.padding_side = "right"
    return AnswerCollator(to_the_right, model)


def frozen(model: Any) -> Any:
    """``model`` in eval mode, its weights without gradients."""
    return model.eval().requires_grad_(False)


def answer_tokens(labels_BL: Tensor) -> Tensor:
    """Label tokens (N,) of all rows, in order."""
    return labels_BL[labels_BL != IGNORED]


def _shifted(logits_BLV: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the positions before each label of a decoder-only model, and where labels count."""
    return logits_BLV[:, :-1], labels_BL[:, 1:] != IGNORED


def prompts_of(inputs: Mapping[str, Tensor], *, encoded: bool) -> list[list[int]]:
    """Token ids of the prompts in a padded batch: all that is read, without the answer that follows in one sequence."""
    rows = []
    for ids, mask, labels in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True):
        read = mask.bool() if encoded else mask.bool() & (labels == IGNORED)
        rows.append(ids[read].tolist())
    return rows


def labelled_row(adapter: ModelAdapter, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, list[int]]:
    """A row of "input_ids" and "labels" as the data loaders make them."""
    if adapter.config.is_encoder_decoder:
        return {"input_ids": [*prompt], "labels": [*answer]}
    return {"input_ids": [*prompt, *answer], "labels": [IGNORED] * len(prompt) + [*answer]}


def answers_of(
    model: Any,
    adapter: ModelAdapter,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    device: torch.device,
    **options: Any,
) -> list[list[int]]:
    """Token ids the model answers with, each through its end of sequence."""
    inputs = adapter.generation_inputs(prompts, device)
    tokens = model.generate(
        **inputs,
        **({"do_sample": False, "num_beams": 1} | options),
        max_new_tokens=max_new_tokens,
        eos_token_id=adapter.eos_ids,
        pad_token_id=adapter.pad_id,
        synced_gpus=is_deepspeed_zero3_enabled() or isinstance(model, FSDPModule),
    )
    answers = []
    for row in tokens[:, adapter.response_start(inputs) :].tolist():
        ends = [position for position, token in enumerate(row) if token in adapter.eos_ids]
        answers.append(row[: ends[0] + 1] if ends else row)
    return answers


def _check_widths(student: Student, teacher: Any) -> None:
    if student.origins is None:
        raise InputError("hidden_weight: is for students made of the teacher's layers; leave it out")
    assert student.model.config.hidden_size == teacher.config.hidden_size
