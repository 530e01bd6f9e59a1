"""How engines batch, wait and refuse; None means: chosen from the machine and the model at start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from yunque.errors import InputError


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Limits of one generating model.

    ``memory_budget_bytes`` is for caches and working memory beside the weights; None takes ``memory_share`` of what the
    machine (or its control group) has free at start.
    """

    threads: int | None = None  # of each graph
    max_rows: int | None = None  # texts made at the same time
    max_queued: int = 256  # texts that wait; more are refused
    prefill_tokens: int | None = None  # prompt tokens read between two steps of the running texts
    memory_budget_bytes: int | None = None
    memory_share: float = 0.5
    deadline_s: float | None = 120.0  # of a request that gives none; from its arrival

    def __post_init__(self) -> None:
        """Check every value."""
        _check(
            ("threads", self.threads, self.threads is None or self.threads >= 1, "1 or more"),
            ("max_rows", self.max_rows, self.max_rows is None or self.max_rows >= 1, "1 or more"),
            ("max_queued", self.max_queued, self.max_queued >= 1, "1 or more"),
            ("prefill_tokens", self.prefill_tokens, (self.prefill_tokens or 1) >= 1, "1 or more"),
            ("memory_budget", self.memory_budget_bytes, (self.memory_budget_bytes or 1) >= 1, "bytes above 0"),
            ("memory_share", self.memory_share, 0 < self.memory_share <= 1, "a share above 0, up to 1"),
            ("deadline_s", self.deadline_s, (self.deadline_s or 1) > 0, "seconds above 0"),
        )


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """Limits of one classifier."""

    threads: int | None = None
    max_batch: int = 32  # texts scored together
    max_wait_s: float = 0.003  # for others to come, once one waits
    max_queued: int = 512
    max_tokens: int = 8192  # of one batch with its padding
    deadline_s: float | None = 30.0

    def __post_init__(self) -> None:
        """Check every value."""
        _check(
            ("threads", self.threads, self.threads is None or self.threads >= 1, "1 or more"),
            ("max_batch", self.max_batch, self.max_batch >= 1, "1 or more"),
            ("max_wait_s", self.max_wait_s, self.max_wait_s >= 0, "seconds from 0"),
            ("max_queued", self.max_queued, self.max_queued >= 1, "1 or more"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more"),
            ("deadline_s", self.deadline_s, (self.deadline_s or 1) > 0, "seconds above 0"),
        )


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """A classifier that scores answers before or after they leave.

    ``block`` holds text back until it is scored below ``threshold``; ``flag`` lets it through and reports the score in
    the last event; ``pass`` only counts. What ``block`` holds back is one sentence of a growing answer, or all of it.
    """

    action: Literal["block", "flag", "pass"] = "flag"
    label: str = ""  # whose probability counts; empty: of all labels but the first
    threshold: float = 0.5
    release: Literal["answer", "sentence"] = "answer"

    def __post_init__(self) -> None:
        """Check every value."""
        _check(
            ("guard_action", self.action, self.action in ("block", "flag", "pass"), "block, flag or pass"),
            ("guard_threshold", self.threshold, 0 < self.threshold <= 1, "a probability above 0, up to 1"),
            ("guard_release", self.release, self.release in ("answer", "sentence"), "answer or sentence"),
        )


def _check(*checks: tuple[str, object, bool, str]) -> None:
    for name, value, holds, hint in checks:
        if not holds:
            raise InputError(f"{name}: {value!r} is not possible; give {hint}")
