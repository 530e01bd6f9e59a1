"""What continuous batching gives: a server of one folder, one client and 16, beside one that answers one by one.

    python bench/serve_load.py --model_name_or_path outputs/onnx_int8
    python bench/serve_load.py --model_name_or_path FOLDER --threads 1   # on a busy machine: read tokens_cpu_s

Starts serve/server.py twice, as it is and with --max_rows 1, and sends closed loops of the load test's own client to
both: prompts of 128 words and answers of up to 64 tokens, which for the random models of bench/serve_generation.py
are as many tokens (--prompts words: w300 to w30000). One JSON line, medians over --rounds: tokens a second and per CPU
second of the server, first tokens in ms, and the ratios of the project's targets: 16 clients batched over 16 clients
one by one, and the first token's p99 of 16 clients (``closed``: all ask again at once; ``steady``: Poisson at 80 % of
that rate) over that of one client. Answers of all runs are compared: batching must not change a greedy token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from yunque.errors import CheckFailed, run
from yunque.serving.load.client import Client, Outcome
from yunque.serving.load.soak import cpu_s
from yunque.serving.load.summary import Objectives, summarize
from yunque.serving.load.traffic import Workload, closed_loop, make_prompts, open_loop

ROOT = Path(__file__).parents[1]
PROMPTS, WORDS = 64, 128


@contextmanager
def serving(folder: Path, *options: object) -> Iterator[tuple[Client, int]]:
    """A client of a server that is ready, and the server's process; its log goes to a file, which is never full."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "serve/server.py", f"m={folder}", "--port", str(port), *map(str, options)]
    client = Client(f"http://127.0.0.1:{port}")
    with TemporaryFile("w+") as log, subprocess.Popen(command, cwd=ROOT, stderr=log) as process:
        try:
            while not asyncio.run(is_ready(client)):
                if process.poll() is not None:
                    log.seek(0)
                    raise CheckFailed(f"the server did not start: {log.read()[-2000:]}")
                time.sleep(0.1)
            yield client, process.pid
        finally:
            process.terminate()


async def is_ready(client: Client) -> bool:
    """Whether the server listens and its model is warm."""
    try:
        return (await client.get("/ready"))[0] == 200
    except OSError:
        return False


def measure(
    client: Client, pid: int, work: Workload, clients: int, rate: float
) -> tuple[dict[str, Any], list[Outcome]]:
    """Rates and first tokens of a closed loop, or of Poisson arrivals where ``rate`` is above 0."""
    used_s = cpu_s(pid)
    loop = open_loop(client, work, rate) if rate else closed_loop(client, work, clients)
    outcomes, window = asyncio.run(loop)
    found = summarize("", outcomes, window, Objectives())
    if found.rejected or found.failed or not found.completed:
        raise CheckFailed(f"{clients} clients: refused {found.rejected}, failed {found.failed}, {found.completed} done")
    row = {
        "requests_s": round(found.completed_rate, 3),
        "tokens_s": round(found.tokens_s, 1),
        "tokens_cpu_s": round(sum(each.tokens for each in outcomes) / (cpu_s(pid) - used_s), 1),
        "first_token_p50_ms": round(1e3 * found.first_token.p50, 1),
        "first_token_p99_ms": round(1e3 * found.first_token.p99, 1),
        "requests": found.requests,
    }
    return row, outcomes


def prompts(kind: str) -> Sequence[str]:
    """As many words as tokens for the random models, plain words for others."""
    if kind == "plain":
        return make_prompts(PROMPTS, WORDS, seed=0)
    pick = random.Random(0)
    return [" ".join(f"w{pick.randrange(300, 30000)}" for _ in range(WORDS)) for _ in range(PROMPTS)]


def one_round(args: argparse.Namespace, work: Workload, answers: dict[str, set[str]]) -> dict[str, Any]:
    """Both servers once, and their ratios; answers are added to those of former rounds."""
    rows: dict[str, Any] = {}

    def note(name: str, client: Client, pid: int, clients: int, rate: float = 0.0) -> None:
        rows[name], outcomes = measure(client, pid, work, clients, rate)
        for each in outcomes:
            answers.setdefault(each.prompt, set()).add(each.text)

    with serving(args.model_name_or_path.absolute(), "--threads", args.threads) as (client, pid):
        note("one_client", client, pid, 1)
        note("closed", client, pid, args.clients)
        note("steady", client, pid, args.clients, 0.8 * rows["closed"]["requests_s"])
    with serving(args.model_name_or_path.absolute(), "--threads", args.threads, "--max_rows", 1) as (client, pid):
        note("one_by_one", client, pid, args.clients)
    unloaded = rows["one_client"]["first_token_p99_ms"]
    for rate in ("tokens_s", "tokens_cpu_s"):
        rows[f"{rate}_ratio"] = round(rows["closed"][rate] / rows["one_by_one"][rate], 2)
    for load in ("closed", "steady"):
        rows[f"first_token_p99_ratio_{load}"] = round(rows[load]["first_token_p99_ms"] / unloaded, 2)
    return rows


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of every number, over all rounds."""
    return {
        name: medians([each[name] for each in rounds])
        if isinstance(value, dict)
        else round(statistics.median(each[name] for each in rounds), 2)
        for name, value in rounds[0].items()
    }


def main() -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", choices=("words", "plain"), default="words")
    args = parser.parse_args()
    work = Workload(model="m", prompts=prompts(args.prompts), max_tokens=64, warmup_s=5.0, duration_s=args.seconds)
    answers: dict[str, set[str]] = {}
    rounds = [one_round(args, work, answers) for _ in range(args.rounds)]
    changed = [prompt for prompt, texts in answers.items() if len(texts) > 1]
    result = {
        "threads": args.threads, "clients": args.clients, "time": time.strftime("%Y-%m-%d %H:%M"), **medians(rounds),
        "ratios_of_rounds": [{name: each[name] for name in each if "ratio" in name} for each in rounds],
        "prompts": len(answers), "prompts_with_different_answers": len(changed),
    }  # fmt: skip
    print(json.dumps(result))
    if changed:
        raise CheckFailed(f"{len(changed)} prompts got different greedy answers")


if __name__ == "__main__":
    run(main)
