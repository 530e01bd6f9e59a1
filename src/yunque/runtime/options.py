"""How one request wants its text made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from yunque.errors import InputError


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Greedy search unless ``do_sample`` or ``num_beams`` says otherwise; names and meaning as in transformers.

    ``eos_token_ids`` None takes the model's, an empty tuple never ends a text. A ``seed`` gives the same text in
    whatever batch the request runs. ``logprobs`` asks for log-probabilities of the chosen tokens under the model itself
    (temperature 1, no filter).
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0  # no sequence of so many tokens twice; 0: any
    seed: int = 0
    eos_token_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()  # ends the text before the first of these strings
    num_beams: int = 1
    length_penalty: float = 1.0  # of beams: score = log-probability / length ** length_penalty
    early_stopping: bool | Literal["never"] = False
    logprobs: bool = False
    top_logprobs: int = 0  # with logprobs: so many of the most probable tokens at every place

    def __post_init__(self) -> None:
        """Check every value by itself and the few that exclude each other."""
        checks = [
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            ("temperature", self.temperature > 0, "a number above 0, or leave do_sample out for greedy search"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "a share above 0, up to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "a number above 0; 1 is none"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (none) or more"),
            ("seed", 0 <= self.seed < 1 << 64, "a whole number from 0"),
            ("num_beams", self.num_beams >= 1, "1 or more"),
            ("top_logprobs", 0 <= self.top_logprobs <= (20 if self.logprobs else 0), "0 to 20, together with logprobs"),
            ("stop", all(self.stop), "texts that are not empty"),
            ("early_stopping", self.early_stopping in (True, False, "never"), "true, false or never"),
        ]
        for name, holds, hint in checks:
            if not holds:
                raise InputError(f"{name}: {getattr(self, name)!r} is not possible; give {hint}")
        if self.num_beams > 1 and (self.do_sample or self.stop or self.logprobs):
            raise InputError("num_beams: does not go with do_sample, stop or logprobs; leave them out")
