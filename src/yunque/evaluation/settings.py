"""Decoding settings: every combination that was asked for, with a name of its own."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from yunque.evaluation.arguments import DecodingArguments
from yunque.models.arguments import GenerationArguments


@dataclass(frozen=True)
class Setting:
    """How one evaluation decodes: the sampler's options, samples per prompt, what they vote by, DoLa's layers."""

    options: GenerationArguments
    num_samples: int
    vote_pattern: str | None
    dola_layers: str | None

    @property
    def name(self) -> str:
        """Short and fit for a folder: greedy, or temperature, top_p and top_k as far as they differ from all."""
        options = self.options
        if not options.temperature:
            return "greedy"
        parts = [f"temperature_{options.temperature:g}"]
        if options.top_p < 1:
            parts.append(f"top_p_{options.top_p:g}")
        if options.top_k:
            parts.append(f"top_k_{options.top_k}")
        return "_".join(parts)

    def with_one_token(self) -> Setting:
        """The same for answers of one token."""
        return replace(self, options=replace(self.options, min_new_tokens=0, max_new_tokens=1), num_samples=1)

    def as_dict(self) -> dict[str, Any]:
        """The setting for JSON."""
        sampling = "self_consistency" if self.num_samples > 1 else "sampling"
        method = sampling if self.options.temperature else "greedy"
        return {
            "method": f"dola_{method}" if self.dola_layers else method,
            **vars(self.options),
            "num_samples": self.num_samples,
            "vote_pattern": self.vote_pattern,
            "dola_layers": self.dola_layers,
        }


def expand(args: DecodingArguments) -> list[Setting]:
    """One setting per combination of temperature, top_p and top_k; greedy decoding, which knows no filters, once."""
    settings: dict[str, Setting] = {}
    for temperature, top_p, top_k in itertools.product(args.temperature, args.top_p, args.top_k):
        options = GenerationArguments(
            temperature=temperature,
            top_p=top_p if temperature else 1.0,
            top_k=top_k if temperature else 0,
            min_new_tokens=args.min_new_tokens,
            max_new_tokens=args.max_new_tokens,
        )
        setting = Setting(options, args.self_consistency, args.vote_pattern, args.dola_layers)
        settings.setdefault(setting.name, setting)
    return list(settings.values())
