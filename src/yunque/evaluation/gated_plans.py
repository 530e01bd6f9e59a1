"""Variants of one model in several precisions, exported, evaluated and gated against it, each at most once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yunque import artifacts
from yunque.compression.mixed_arguments import KeepGateArguments
from yunque.compression.schemes import PrecisionPlan
from yunque.errors import InputError
from yunque.evaluation.arguments import (
    DecodingArguments,
    EvaluatedModelArguments,
    EvaluationArguments,
    HeldOutArguments,
)
from yunque.evaluation.comparison import Options, compare
from yunque.evaluation.evaluate import evaluate
from yunque.evaluation.evaluation_files import RESULT
from yunque.evaluation.evaluations import Evaluation, NoAnswers, read_evaluation
from yunque.evaluation.gates import Gate, Verdict
from yunque.export.folder import write_folder
from yunque.export.source import Source
from yunque.metrics.paired import Resampling

_ALIGNED, _UNALIGNED = "aligned", "unaligned"


@dataclass(frozen=True)
class Judgement:
    """Verdicts of all gates on one split; ``excess`` is the worst distance of an interval's bad end to its limit.

    It is in parts of the limit, and infinite where there are no answers to judge.
    """

    split: str
    passed: bool
    excess: float
    verdicts: list[Verdict]
    reason: str = ""

    def lines(self) -> list[str]:
        """One for each gate."""
        return [str(verdict) for verdict in self.verdicts] or [self.reason]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "split": self.split,
            "passed": self.passed,
            "verdicts": [verdict.as_dict() for verdict in self.verdicts],
            "reason": self.reason,
        }


class GatedPlans:
    """Evaluations of plans of ``source`` below ``folder``, which a run that was stopped finds there again."""

    def __init__(
        self, source: Source, args: KeepGateArguments, gates: Sequence[Gate], folder: Path, seed: int, dataset: str
    ) -> None:
        self.source, self.args, self.gates, self.folder = source, args, gates, folder
        self.seed, self.dataset = seed, dataset
        self._judged: dict[tuple[str, str, float], Judgement] = {}

    def held_out(self, split: str) -> HeldOutArguments:
        """The rows of a split."""
        args = self.args
        return HeldOutArguments(
            dataset_name=self.dataset,
            test_split=split,
            max_test_samples=args.max_search_samples if split == args.search_split else args.max_verdict_samples,
            text_column=args.gate_text_column,
            target_column=args.gate_target_column,
        )

    def aligned(self, split: str) -> Evaluation:
        """The evaluation of the model itself."""
        return self._evaluation(_ALIGNED, self.source.name, split)

    def judge(self, plan: PrecisionPlan, split: str, confidence: float) -> Judgement:
        """Export ``plan``, let it answer the prompts of ``split``, and judge every gate.

        Raises:
            InputError: a gate that nothing measured, or that cannot be judged of any model.
        """
        name = plan_key(plan)
        known = (name, split, confidence)
        if known not in self._judged:
            self._judged[known] = self._judge(name, plan, split, confidence)
        return self._judged[known]

    def _judge(self, name: str, plan: PrecisionPlan, split: str, confidence: float) -> Judgement:
        baseline, base = self.aligned(split), None
        if self.args.unaligned_name_or_path is not None:
            base = self._evaluation(_UNALIGNED, self.args.unaligned_name_or_path, split)
        try:
            candidate = self.evaluation(plan, split)
        except NoAnswers as error:
            return Judgement(split, False, float("inf"), [], str(error))
        options = Options(resampling=Resampling(confidence=confidence))
        compared = compare(baseline, [candidate], gates=self.gates, base=base, options=options)
        verdicts = compared.candidates[0].verdicts
        passed = all(verdict.status == "passed" for verdict in verdicts)
        return Judgement(split, passed, max(_excess(verdict) for verdict in verdicts), verdicts)

    def write(self, plan: PrecisionPlan, folder: Path) -> list[Any]:
        """Write the ONNX folder of ``plan`` as a finished model folder of its own."""
        parent = self.source.name
        known = artifacts.manifest_of(parent)
        written: list[Any] = []
        artifacts.save_model_folder(
            folder,
            lambda staging: written.extend(write_folder(self.source, staging, plan)),
            stage="quantize",
            parents=[parent],
            prompt_template=known.prompt_template if known else None,
            config={"plan": plan.as_dict()},
        )
        return written

    def evaluation(self, plan: PrecisionPlan, split: str) -> Evaluation:
        """Export ``plan`` and let it answer the prompts of ``split``."""
        name = plan_key(plan)
        place = self._place(name, split)
        exported = self.folder / "plans" / name
        if not (place / RESULT).is_file():
            if not (exported / artifacts.MANIFEST).is_file():
                self.write(plan, exported)
            self._evaluate(str(exported), place, split)
            shutil.rmtree(exported)  # a few seconds make it again; many of them would fill a disk
        return read_evaluation(place, name)

    def _evaluation(self, name: str, model: str, split: str) -> Evaluation:
        place = self._place(name, split)
        if not (place / RESULT).is_file():
            self._evaluate(model, place, split)
        return read_evaluation(place, name)

    def _evaluate(self, model: str, place: Path, split: str) -> None:
        args = self.args
        settings = EvaluationArguments(
            output_dir=str(place),
            resume=True,
            seed=self.seed,
            per_device_eval_batch_size=args.gate_batch_size,
            toxicity_model_name_or_path=args.toxicity_model_name_or_path,
            toxicity_label=args.toxicity_label,
            reference_loss=any(gate.metric == "nll" for gate in self.gates),
            latency_prompts=0,
        )
        decoding = DecodingArguments(max_new_tokens=args.gate_max_new_tokens)
        evaluated = EvaluatedModelArguments(model_name_or_path=model, dtype="float32")
        evaluate(evaluated, self.held_out(split), decoding, settings, argv=[model], quiet=True)

    def _place(self, name: str, split: str) -> Path:
        return self.folder / "evaluations" / f"{name}-{split}"


def plan_key(plan: PrecisionPlan) -> str:
    """A short name that differs for every plan."""
    content = json.dumps(plan.as_dict(), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def check_measured(gates: Sequence[Gate], aligned: Evaluation, unaligned: str | None) -> None:
    """Check that every gate's metric is there before anything is searched.

    Raises:
        InputError: a metric that the evaluation lacks, recovery without the model before alignment.
    """
    for gate in gates:
        metric = "toxicity" if gate.kind == "recovery" else gate.metric
        if metric not in aligned.scores:
            hint = (
                "give toxicity_model_name_or_path" if metric == "toxicity" else f"there are {', '.join(aligned.scores)}"
            )
            raise InputError(f"keep_gate: {gate.text}: the answers have no {metric}; {hint}")
        if gate.kind == "recovery" and unaligned is None:
            raise InputError(f"keep_gate: {gate.text}: needs the model before alignment; give unaligned_name_or_path")


def _excess(verdict: Verdict) -> float:
    gate, interval = verdict.gate, verdict.interval
    bad = interval.low if gate.direction > 0 else interval.high
    return gate.direction * (gate.limit - bad) / (abs(gate.limit) or 1.0)
