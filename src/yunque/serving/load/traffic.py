"""Traffic: requests at the times of a Poisson process (open loop) or of clients that wait for answers (closed loop)."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yunque.errors import InputError
from yunque.serving.load.client import Client, Outcome

_TEXT = (
    "anna asks ben about the report that the board wants before noon and he says it needs another hour because new "
    "numbers came late from the office in york where nobody answered his call on friday after lunch so they meet again "
    "with coffee to read every page of it together then send their answer by mail for good"
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked, and for how long it is measured."""

    model: str
    prompts: Sequence[str]
    max_tokens: int = 64
    temperature: float = 0.0
    chat: bool = False
    seed: int = 0
    warmup_s: float = 5.0
    duration_s: float = 30.0

    def __post_init__(self) -> None:
        """Check every value."""
        if self.duration_s <= 0 or self.warmup_s < 0:
            raise InputError("--duration: give seconds above 0, and --warmup seconds from 0")
        if self.max_tokens < 1:
            raise InputError("--max_tokens: give 1 or more")
        if not self.prompts:
            raise InputError("--prompts: no prompt in it")

    def path_and_body(self, prompt: str) -> tuple[str, dict[str, Any]]:
        """Route and JSON of a request."""
        body: dict[str, Any] = {
            "model": self.model, "max_tokens": self.max_tokens, "temperature": self.temperature, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        if self.chat:
            return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]}
        return "/v1/completions", body | {"prompt": prompt}


@dataclass(frozen=True)
class Window:
    """The measured seconds of ``time.perf_counter``, after the warm-up."""

    start_s: float
    end_s: float

    def holds(self, moment_s: float) -> bool:
        """Whether a moment is measured."""
        return self.start_s <= moment_s < self.end_s


def read_prompts(file: Path) -> list[str]:
    """Prompts of a JSONL file's field ``prompt``, or of the lines of any other file.

    Raises:
        InputError: the file cannot be read, or a row has no such field.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {file}: cannot be read: {error}") from error
    if file.suffix != ".jsonl":
        return lines
    try:
        return [str(json.loads(line)["prompt"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--prompts {file}: each line needs a JSON object with the field 'prompt'") from error


def make_prompts(count: int, num_words: int, seed: int) -> list[str]:
    """Prompts of ``num_words`` plain words each, all different."""
    generator, words = random.Random(seed), _TEXT.split()
    return [" ".join(generator.choices(words, k=num_words)) for _ in range(count)]


def poisson_times(rate: float, until_s: float, seed: int) -> list[float]:
    """Arrivals at ``rate`` a second on average, in seconds from 0 to ``until_s``."""
    generator = random.Random(seed)
    times, now = [], generator.expovariate(rate)
    while now < until_s:
        times.append(now)
        now += generator.expovariate(rate)
    return times


async def open_loop(client: Client, work: Workload, rate: float) -> tuple[list[Outcome], Window]:
    """Send at the scheduled times whatever the server does, and wait for all answers.

    Times count from the schedule, so that a server that stalls is charged for every request it kept waiting.
    """
    prompts = _in_turn(work)
    start = time.perf_counter() + 0.05
    outcomes, tasks = [], []
    for moment in poisson_times(rate, work.warmup_s + work.duration_s, work.seed):
        outcome = Outcome(start + moment, prompt=next(prompts))
        await asyncio.sleep(max(0.0, outcome.scheduled_s - time.perf_counter()))
        tasks.append(asyncio.create_task(client.complete(*work.path_and_body(outcome.prompt), outcome)))
        outcomes.append(outcome)
    await asyncio.gather(*tasks)
    return outcomes, Window(start + work.warmup_s, start + work.warmup_s + work.duration_s)


async def closed_loop(client: Client, work: Workload, num_clients: int) -> tuple[list[Outcome], Window]:
    """Clients that send the next prompt when the answer has come, until the time is over."""
    prompts = _in_turn(work)
    start = time.perf_counter()
    end = start + work.warmup_s + work.duration_s
    outcomes: list[Outcome] = []

    async def one() -> None:
        while (now := time.perf_counter()) < end:
            outcomes.append(outcome := Outcome(now, prompt=next(prompts)))
            await client.complete(*work.path_and_body(outcome.prompt), outcome)
            if not outcome.ok:
                await asyncio.sleep(0.1)  # a server that refuses at once is not to be flooded

    await asyncio.gather(*(one() for _ in range(num_clients)))
    return outcomes, Window(start + work.warmup_s, end)


def _in_turn(work: Workload) -> Iterator[str]:
    order = random.Random(work.seed)
    while True:
        yield from order.sample(list(work.prompts), len(work.prompts))
