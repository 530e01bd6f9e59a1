"""Continuous batching beside one request at a time, over the engine alone (no HTTP).

    python bench/serve_batching.py --model_name_or_path outputs/bench_serve/t5_int8 --threads 2

Prompts of 96 to 160 random tokens, 48 to 80 new tokens, greedy. Printed, one JSON line each: tokens/s of one client
that asks again when it has its answer, and of 16 such clients, by the clock and per second of CPU time (the figure to
compare on a busy machine, with --threads 1: waiting threads spin); the first-token latency of a client alone, and of
Poisson arrivals at --load times the 16 clients' rate of requests; how many answers are, token by token, those of the
model alone. The first seconds of each run (--settle_s) are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from yunque.runtime import GenerationOptions, load
from yunque.serving.engine import Engine
from yunque.serving.engine_settings import EngineSettings
from yunque.serving.metrics import EngineMetrics, Metrics
from yunque.serving.requests import Request

PROMPTS = 64


@dataclass
class Run:
    """What clients saw after the settling time."""

    begin: float
    tokens: int = 0
    cpu_s: float = 0.0
    taken_s: float = 0.0
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    answers: dict[int, list[int]] = field(default_factory=dict)


async def ask(engine: Engine, number: int, request: Request, run: Run) -> None:
    arrived = last = time.perf_counter()
    tokens: list[int] = []
    async for event in engine.submit(request):
        now = time.perf_counter()
        if arrived >= run.begin:
            (run.gaps_s if tokens else run.first_s).append(now - last)
        last = now
        tokens += event.tokens
    run.answers[number] = tokens


async def closed_loop(engine: Engine, requests: list[Request], clients: int, seconds: float, settle: float) -> Run:
    run = Run(time.perf_counter() + settle)
    end = run.begin + seconds
    made = engine.metrics.all.registry

    def new_tokens() -> float:
        return made.get_sample_value("yunque_new_tokens_total", {"model": "bench"}) or 0.0

    async def client(place: int) -> None:
        number = place
        while time.perf_counter() < end:
            await ask(engine, number % PROMPTS, requests[number % PROMPTS], run)
            number += clients

    tasks = [asyncio.create_task(client(place)) for place in range(clients)]
    await asyncio.sleep(settle)
    begin, cpu, tokens = time.perf_counter(), time.process_time(), new_tokens()
    await asyncio.sleep(seconds)
    run.taken_s, run.cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    run.tokens = int(new_tokens() - tokens)
    await asyncio.gather(*tasks)  # what runs out is not counted
    return run


async def open_loop(engine: Engine, requests: list[Request], rate: float, seconds: float, settle: float) -> Run:
    run, rng = Run(time.perf_counter() + settle), np.random.RandomState(1)
    tasks, number, due = [], 0, time.perf_counter()
    while due < run.begin + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(engine, number % PROMPTS, requests[number % PROMPTS], run)))
        number += 1
        due += rng.exponential(1 / rate)
    await asyncio.gather(*tasks)
    return run


def milliseconds(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{share}": round(1e3 * float(np.percentile(values, share)), 1) for share in (50, 95, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--settle_s", type=float, default=4.0)
    parser.add_argument("--load", type=float, default=0.8)
    args = parser.parse_args()
    model = load(args.model_name_or_path, threads=args.threads)
    rng = np.random.RandomState(0)
    vocabulary = model.spec.vocab_size
    requests = []
    for _ in range(PROMPTS):
        prompt = rng.randint(3, vocabulary, rng.randint(96, 161)).tolist()
        options = GenerationOptions(max_new_tokens=int(rng.randint(48, 81)), eos_token_ids=())
        requests.append(Request(prompt=prompt, options=options))
    begin = time.perf_counter()
    engine = Engine(model, EngineSettings(threads=args.threads), EngineMetrics(Metrics(), "bench"))
    engine.start()
    warm_s = round(time.perf_counter() - begin, 2)
    one = asyncio.run(closed_loop(engine, requests, 1, args.seconds, args.settle_s))
    many = asyncio.run(closed_loop(engine, requests, args.clients, args.seconds, args.settle_s))
    mean = float(np.mean([request.options.max_new_tokens for request in requests]))
    rate = args.load * many.tokens / many.taken_s / mean
    loaded = asyncio.run(open_loop(engine, requests, rate, args.seconds, args.settle_s))
    answers = {**many.answers, **loaded.answers}
    same = sum(
        model.generate([requests[number].prompt], requests[number].options)[0].tokens == tokens
        for number, tokens in answers.items()
    )
    alone, together = one.tokens / one.taken_s, many.tokens / many.taken_s
    cpu_alone, cpu_together = one.tokens / one.cpu_s, many.tokens / many.cpu_s
    times = float(np.percentile(loaded.first_s or [0], 99) / np.median(one.first_s or [1]))
    for row in (
        {"warm_up_s": warm_s, "capacity": vars(engine.capacity)},
        {"tokens_s": [round(alone, 1), round(together, 1)], "times": round(together / alone, 2)},
        {"tokens_cpu_s": [round(cpu_alone, 1), round(cpu_together, 1)], "times": round(cpu_together / cpu_alone, 2)},
        {"first_token_ms_alone": milliseconds(one.first_s), "between": milliseconds(one.gaps_s)},
        {"first_token_ms_clients": milliseconds(many.first_s), "between": milliseconds(many.gaps_s)},
        {"first_token_ms_loaded": milliseconds(loaded.first_s), "between": milliseconds(loaded.gaps_s)},
        {"requests_s_loaded": round(rate, 2), "requests": len(loaded.first_s), "p99_times": round(times, 2)},
        {"same_tokens_as_alone": f"{same} of {len(answers)}"},
    ):
        print(json.dumps(row))
    engine.close()


if __name__ == "__main__":
    main()
