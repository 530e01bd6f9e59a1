"""What answers prompts in an evaluation, behind one small interface: here a torch model of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from peft import PeftModel

from yunque.errors import InputError
from yunque.evaluation.settings import Setting
from yunque.models.adapter import TokenIds, adapter_for
from yunque.models.arguments import GenerationArguments
from yunque.models.decoding import length_batches
from yunque.models.dola import DolaModel
from yunque.models.inference import InferenceModel, model_bytes
from yunque.models.policy import has_plain_head, score_tokens
from yunque.models.quantized import weight_bytes
from yunque.rl.rollout import check_rollouts, generate
from yunque.rl.statistics import peak_memory_bytes


class Answer(NamedTuple):
    """Token ids of an answer without its end token, and whether it reached one."""

    tokens: list[int]
    finished: bool


class ReferenceLoss(NamedTuple):
    """Nats of a reference's tokens, their number, and how many more were cut for want of positions."""

    nats: float
    num_tokens: int
    num_cut: int


class Generator(Protocol):
    """Answers tokenized prompts; every answer depends on its prompt, options, seed and sample number alone."""

    tokenizer: Any
    is_encoder_decoder: bool

    def prompt_limit(self, max_new_tokens: int) -> int:
        """Longest prompt in tokens beside answers of ``max_new_tokens``.

        Raises:
            InputError: there is no room for such answers.
        """
        ...

    def check(self, setting: Setting) -> None:
        """Raises InputError where this model cannot be decoded so."""
        ...

    def answers(
        self, queries: Sequence[TokenIds], setting: Setting, *, seed: int, samples: Sequence[int]
    ) -> list[Answer]:
        """Answer the queries as one batch; ``samples`` number them over the whole evaluation."""
        ...

    def reference_losses(
        self, queries: Sequence[TokenIds], references: Sequence[str]
    ) -> list[ReferenceLoss | None] | None:
        """Loss of each reference after its query, None where it has no tokens; None where it cannot be had at all."""
        ...

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        ...

    def next_logits(self, query: TokenIds, tokens: TokenIds) -> np.ndarray:
        """Logits [tokens, vocabulary], float32, that predict each of ``tokens`` after ``query``."""
        ...

    def describe(self) -> dict[str, Any]:
        """kind, bytes (of the files), weights_bytes (in memory), base and base_bytes of an adapter, dtype."""
        ...

    def peak_memory_bytes(self) -> int:
        """Most memory that this process has held: of the GPU where there is one, else resident."""
        ...


def encode_references(generator: Generator, references: Sequence[str]) -> list[list[int]]:
    """Tokens as fine-tuning's labels: an encoder-decoder's tokenizer ends them itself, a decoder's do end."""
    tokenizer = generator.tokenizer
    if generator.is_encoder_decoder:
        return list(tokenizer(text_target=list(references), verbose=False)["input_ids"])
    ids = tokenizer(list(references), add_special_tokens=False, verbose=False)["input_ids"]
    return [[*row, generator.end_id] for row in ids]


class TorchGenerator:
    """A torch model: full, adapter, nf4 or int8."""

    def __init__(self, loaded: InferenceModel, name: str, device: torch.device) -> None:
        self.loaded, self.name, self.device = loaded, name, device
        self.model, self.tokenizer = loaded.model.to(device), loaded.tokenizer
        self.adapter = adapter_for(self.model, self.tokenizer)
        self.is_encoder_decoder: bool = self.model.config.is_encoder_decoder
        if not loaded.has_virtual_tokens:
            check_rollouts(self.model, self.adapter, device)
        self.lean = not loaded.has_virtual_tokens and has_plain_head(self.model, self.adapter)

    def prompt_limit(self, max_new_tokens: int) -> int:
        """As the adapter's, less the virtual tokens."""
        virtual = self.model.active_peft_config.num_virtual_tokens if self.loaded.has_virtual_tokens else 0
        return self.adapter.prompt_limit(max_new_tokens) - virtual

    def check(self, setting: Setting) -> None:
        """Virtual tokens are decoded by transformers, whose sampling depends on the batch."""
        if self.loaded.has_virtual_tokens and setting.options.temperature:
            raise InputError("temperature: a model of virtual tokens (prompt tuning) is evaluated greedily; give 0")
        if setting.dola_layers:
            self._contrasting(setting.dola_layers)

    def answers(
        self, queries: Sequence[TokenIds], setting: Setting, *, seed: int, samples: Sequence[int]
    ) -> list[Answer]:
        """Answer by the decoders of rollouts."""
        options = setting.options
        if self.loaded.has_virtual_tokens:
            return self._answers_after_virtual_tokens(queries, options)
        model = self.model if setting.dola_layers is None else self._contrasting(setting.dola_layers)
        found = generate(model, self.adapter, queries, options, seed=seed, samples=samples, device=self.device)
        return [Answer(row.tokens[:-1] if row.finished else row.tokens, row.finished) for row in found]

    @torch.no_grad()
    def reference_losses(
        self, queries: Sequence[TokenIds], references: Sequence[str]
    ) -> list[ReferenceLoss | None] | None:
        """Loss under teacher forcing, of the tokens that fine-tuning would train on."""
        targets, cut = [], []
        for query, whole in zip(queries, encode_references(self, references), strict=True):
            limit = self.prompt_limit(1)
            room = limit if self.is_encoder_decoder else limit + 1 - len(query)
            targets.append(whole[: max(room, 0)])
            cut.append(len(whole) - len(targets[-1]))
        losses: list[ReferenceLoss | None] = [None] * len(targets)
        filled = [row for row, target in enumerate(targets) if target]
        sequences = [[*queries[row], *targets[row]] for row in filled]
        # PEFT puts virtual tokens before the padding on a query's left: without padding they stand where they belong.
        most_rows = 1 if self.loaded.has_virtual_tokens else None
        for numbers in length_batches(sequences, self.device, most_rows=most_rows):
            rows = [filled[number] for number in numbers]
            batch = self.adapter.scoring_batch(
                [queries[row] for row in rows], [targets[row] for row in rows], self.device
            )
            scores, _ = score_tokens(self.model, self.adapter, batch, 1.0, lean=self.lean)
            nats = -(scores.logprobs_BR.double() * batch.mask_BR).sum(dim=1)
            for row, value in zip(rows, nats.tolist(), strict=True):
                losses[row] = ReferenceLoss(value, len(targets[row]), cut[row])
        return losses

    @property
    def end_id(self) -> int:
        """The token that training puts after an answer."""
        return self.adapter.eos_ids[0]

    @torch.no_grad()
    def next_logits(self, query: TokenIds, tokens: TokenIds) -> np.ndarray:
        """From one forward pass over query and tokens."""
        batch = self.adapter.scoring_batch([query], [tokens], self.device)
        logits_BRV, _ = self.adapter.score(self.model, batch)
        return np.asarray(logits_BRV[0].float().cpu().numpy())

    def describe(self) -> dict[str, Any]:
        """What was loaded."""
        described: dict[str, Any] = {
            "kind": self.loaded.kind,
            "bytes": model_bytes(self.name),
            "weights_bytes": weight_bytes(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }
        if self.loaded.base is not None:
            described |= {"base": self.loaded.base, "base_bytes": model_bytes(self.loaded.base)}
        return described

    def peak_memory_bytes(self) -> int:
        """Of the GPU, or of the whole process with its libraries."""
        return peak_memory_bytes(self.device)

    def _contrasting(self, layers: str) -> DolaModel:
        if self.loaded.has_virtual_tokens:
            raise InputError("dola_layers: a model of virtual tokens (prompt tuning) is decoded plainly; leave it out")
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return DolaModel(base, layers, plain_head=self.lean).eval()

    @torch.no_grad()
    def _answers_after_virtual_tokens(self, queries: Sequence[TokenIds], options: GenerationArguments) -> list[Answer]:
        parts = [queries] if self.is_encoder_decoder else [[query] for query in queries]
        found: list[Answer] = []
        for part in parts:
            inputs = self.adapter.generation_inputs(part, self.device)
            tokens = self.model.generate(
                **inputs,
                max_new_tokens=options.max_new_tokens,
                min_new_tokens=options.min_new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=self.adapter.eos_ids,
                pad_token_id=self.adapter.pad_id,
            )
            for row in tokens[:, self.adapter.response_start(inputs) :].tolist():
                ends = [place for place, token in enumerate(row) if token in self.adapter.eos_ids]
                found.append(Answer(row[: ends[0]] if ends else row, bool(ends)))
        return found
