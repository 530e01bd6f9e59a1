"""The meter of layers' damage for a model folder: its prompts, its own answers, the judge of their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from yunque.compression.probing import Probe, ProbeTexts
from yunque.compression.schemes import LayerScheme
from yunque.compression.sensitivity import Meter
from yunque.compression.substitution import Target
from yunque.evaluation.answers import FIRST_SAMPLE
from yunque.evaluation.generators import TorchGenerator, encode_references
from yunque.evaluation.judging import ToxicityJudge
from yunque.evaluation.prompting import EvaluationPrompts
from yunque.evaluation.scores import score_kind
from yunque.evaluation.scoring import AnsweredRow, answer_scores
from yunque.export.dequantized import pack, quantize_dequantize
from yunque.export.quantized import Layer
from yunque.export.source import Source
from yunque.models.adapter import TokenIds, adapter_for
from yunque.models.arguments import GenerationArguments
from yunque.models.inference import FULL, InferenceModel
from yunque.rl.rollout import generate

_ANSWERS_TOGETHER = 64  # prompts decoded as one batch


@dataclass(frozen=True)
class MeterSettings:
    """How many answers the model samples for each prompt, how, and the metrics whose change is measured."""

    metrics: Sequence[str]
    num_answers: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0


def torch_generator(source: Source, device: torch.device) -> TorchGenerator:
    """The loaded model of ``source`` as what answers prompts."""
    return TorchGenerator(InferenceModel(source.model, source.tokenizer, FULL, None), source.name, device)


def build_meter(
    source: Source,
    prompts: EvaluationPrompts,
    judge: ToxicityJudge | None,
    settings: MeterSettings,
    device: torch.device,
) -> Meter:
    """Let the model answer ``prompts``, greedily and several times by sampling, and prepare to measure damages.

    The judge, if there is one, is loaded.
    """
    generator = torch_generator(source, device)
    adapter = adapter_for(source.model, source.tokenizer)
    sampling = GenerationArguments(temperature=settings.temperature, max_new_tokens=settings.max_new_tokens)
    greedy = GenerationArguments(temperature=0.0, max_new_tokens=settings.max_new_tokens)

    def answer(rows: Sequence[int], options: GenerationArguments = greedy, number: int = 0) -> list[list[int]]:
        found: list[list[int]] = []
        for start in range(0, len(rows), _ANSWERS_TOGETHER):
            part = rows[start : start + _ANSWERS_TOGETHER]
            queries = [prompts.input_ids[row] for row in part]
            samples = [FIRST_SAMPLE + row * settings.num_answers + number for row in part]
            given = generate(
                generator.model, adapter, queries, options, seed=settings.seed, samples=samples, device=device
            )
            found += [response.tokens for response in given]
        return found

    every = range(len(prompts))
    drawn = [answer(every, sampling, number) for number in range(settings.num_answers)]
    texts = ProbeTexts(
        prompts=prompts.input_ids,
        references=_references(generator, prompts),
        greedy=answer(every),
        sampled=list(zip(*drawn, strict=True)),
        temperature=settings.temperature,
    )
    if judge is not None:
        judge.load(device)
    scorer = _Scorer(generator, prompts, judge, settings.metrics)
    state = source.state()
    rounding = _Rounding(state)
    return Meter(Probe(source.model, adapter, texts, device), rounding, rounding.num_bytes, score=scorer, answer=answer)


def targets(source: Source, layers: Sequence[Layer]) -> dict[str, Target]:
    """The layers in the torch model, by name."""
    model = source.model
    names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    head = names.get(model.get_output_embeddings())
    found = {}
    for layer in layers:
        readers = tuple(name.rpartition(".")[0] for name in layer.parameters)
        if layer.role != "linear":
            readers = (str(head),) if layer.role == "head" else ()
        found[layer.name] = Target(layer.name, layer.parameters, readers)
    return found


class _Rounding:
    """The numbers of the ONNX kernels, and their bytes, as they came up."""

    def __init__(self, state: Mapping[str, np.ndarray]) -> None:
        self.state = state
        self.known: dict[tuple[str, LayerScheme], int] = {}

    def __call__(self, name: str, weight: np.ndarray, scheme: LayerScheme) -> np.ndarray:
        self.known[name, scheme] = pack(weight, scheme).nbytes
        return quantize_dequantize(weight, scheme)

    def num_bytes(self, name: str, scheme: LayerScheme) -> int:
        """Bytes of values and scales."""
        return self.known[name, scheme]


def _references(generator: TorchGenerator, prompts: EvaluationPrompts) -> list[list[int]]:
    limit = generator.prompt_limit(1)
    found: list[list[int]] = [[] for _ in prompts.input_ids]
    known = [row for row, texts in enumerate(prompts.rows.references) if texts]
    encoded = encode_references(generator, [prompts.rows.references[row][0] for row in known])
    for row, tokens in zip(known, encoded, strict=True):
        room = limit if generator.is_encoder_decoder else limit + 1 - len(prompts.input_ids[row])
        found[row] = tokens[: max(room, 0)]
    return found


class _Scorer:
    """Scores answers as an evaluation does, in the units that are shown."""

    def __init__(
        self, generator: TorchGenerator, prompts: EvaluationPrompts, judge: ToxicityJudge | None, metrics: Sequence[str]
    ) -> None:
        self.tokenizer, self.ends = generator.tokenizer, set(generator.adapter.eos_ids)
        self.prompts, self.judge, self.metrics = prompts, judge, metrics

    def __call__(self, rows: Sequence[int], answers: Sequence[TokenIds]) -> dict[str, np.ndarray]:
        """Scores of an answer to each of the prompts ``rows``, by metric; what cannot be scored counts as the worst."""
        texts = [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]
        toxicity: list[Any] = self.judge.toxicity(texts) if self.judge is not None and texts else [None] * len(texts)
        answered = [
            AnsweredRow(
                position=row,
                id=str(row),
                prompt="",
                references=self.prompts.rows.references[row],
                answer=text,
                tokens=len(answer),
                finished=bool(answer) and answer[-1] in self.ends,
                toxicity=value,
            )
            for row, text, answer, value in zip(rows, texts, answers, toxicity, strict=True)
        ]
        columns = answer_scores(answered, ())
        return {name: _filled(name, columns[name]) for name in self.metrics if name in columns}


def _filled(name: str, column: Sequence[float | None]) -> np.ndarray:
    kind = score_kind(name)
    values = np.array([np.nan if value is None else value for value in column], dtype=np.float64) * kind.per_stored
    worst = (kind.high if kind.better == "lower" else kind.low) or 0.0
    return np.where(np.isfinite(values), values, worst)
