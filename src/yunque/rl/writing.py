"""What a writer is: it turns prompts into texts and says which of two answers is better."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from yunque.models.arguments import GenerationArguments


@dataclass(frozen=True)
class Request:
    """One text to be written: the prompt, and the number of its random stream (equal numbers, equal texts)."""

    prompt: str
    stream: int


class Writer(Protocol):
    """Writes and compares texts; ``identity`` enters content hashes, ``source`` the manifest's parents."""

    identity: str
    source: str

    def write(self, requests: Sequence[Request], options: GenerationArguments) -> Iterator[tuple[int, str | None]]:
        """Position and text of each request as it is done; None where the prompt is longer than the model reads.

        Raises:
            Stopped: the run was asked to stop, or an endpoint does not answer; what was done has been given out.
        """
        ...

    def log_odds(self, prompts: Sequence[str], max_new_tokens: int) -> list[float | None]:
        """How much more A than B is the answer to each prompt; None where that cannot be told.

        Log-odds in nats of a local model; +1 or -1 of an endpoint, which answers in at most ``max_new_tokens``.
        """
        ...


def stream(*parts: str | int) -> int:
    """Number of a random stream, from names that stay the same whatever else is in the run."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
