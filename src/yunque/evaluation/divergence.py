"""How far a variant's next-token distribution is from the aligned model's, on the aligned model's own answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from yunque.errors import InputError
from yunque.evaluation.generators import Generator
from yunque.evaluation.loading import load_generator
from yunque.evaluation.settings import Setting
from yunque.models.adapter import TokenIds
from yunque.models.arguments import ModelArguments

_OPTION = "kl_model_name_or_path"


class AlignedPolicy:
    """The model whose distribution a variant is to keep; ``is_same`` says that the variant is that very model."""

    def __init__(self, name: str, is_same: bool) -> None:
        self.name = name
        self.is_same = is_same
        self._generator: Generator | None = None

    def load(self, variant: Generator, device: torch.device) -> None:
        """Load it, the first time.

        Raises:
            InputError: no such model, or one of another vocabulary or kind.
        """
        if self.is_same or self._generator is not None:
            return
        try:
            loaded = load_generator(ModelArguments(model_name_or_path=self.name), device)
        except InputError as error:
            raise InputError(f"{_OPTION}: {error}") from error
        if loaded.tokenizer.get_vocab() != variant.tokenizer.get_vocab():
            raise InputError(f"{_OPTION}: {self.name} has another vocabulary; give the model the variant was made from")
        if loaded.is_encoder_decoder != variant.is_encoder_decoder:
            raise InputError(f"{_OPTION}: {self.name} and the variant are not both encoder-decoder or decoder-only")
        self._generator = loaded

    def divergences(
        self, variant: Generator, queries: Sequence[TokenIds], setting: Setting, *, seed: int, samples: Sequence[int]
    ) -> list[float]:
        """KL(aligned || variant) in nats per token of each answer of the aligned model, its end token included."""
        if self.is_same:
            return [0.0] * len(queries)
        assert self._generator is not None, "load the aligned model first"
        aligned, values = self._generator, []
        for query, answer in zip(queries, aligned.answers(queries, setting, seed=seed, samples=samples), strict=True):
            tokens = [*answer.tokens, aligned.end_id] if answer.finished else answer.tokens
            ours, theirs = (model.next_logits(query, tokens) for model in (aligned, variant))
            values.append(float(token_divergences(ours, theirs).mean()))
        return values


def token_divergences(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(softmax(first) || softmax(second)) of logits [tokens, vocabulary], one per token, in nats."""
    vocabulary = min(first.shape[1], second.shape[1])
    log_p, log_q = (
        torch.tensor(logits[:, :vocabulary], dtype=torch.float64).log_softmax(dim=1) for logits in (first, second)
    )
    return np.asarray((log_p.exp() * (log_p - log_q)).sum(dim=1).clamp(min=0.0))
