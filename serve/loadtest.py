"""Load test of any OpenAI-compatible server: Poisson arrivals, clients that wait, or a soak; only the base install.

    python serve/loadtest.py --url http://127.0.0.1:8000 --rates 1,2,4,8 --duration 60 --output_dir outputs/load
    python serve/loadtest.py --url http://127.0.0.1:8000 --clients 1,16          # closed loop: tokens/s of 16 beside 1
    python serve/loadtest.py --url http://127.0.0.1:8000 --soak 10 --server_pid $(pgrep -f serve/server.py)

Times count from the scheduled arrival, so a server that stalls is charged for all whom it kept waiting. A soak measures
the capacity first (or takes --capacity), then sends --share of it for so many minutes and exits 1 unless no request
failed, memory grew by less than --max_growth and no slot stayed taken. The API key comes from $YUNQUE_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from typer import echo

from yunque.errors import CheckFailed, InputError, run
from yunque.evaluation.load_report import LoadReport
from yunque.serving.load.client import Client, Outcome
from yunque.serving.load.soak import Watch, check_pid, checks, cpu_s, memory_growth
from yunque.serving.load.summary import Objectives, Summary, summarize
from yunque.serving.load.traffic import Workload, closed_loop, make_prompts, open_loop, read_prompts


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--rates", type=_numbers(float), help="open loop: requests a second, one run for each")
    kind.add_argument("--clients", type=_numbers(int), help="closed loop: clients at once, one run for each")
    kind.add_argument("--soak", type=float, metavar="MINUTES", help="steady traffic, with checks")
    option("--url", default="http://127.0.0.1:8000")
    option("--model", help="name on the server; its first one that writes text when left out")
    option("--chat", action="store_true", help="/v1/chat/completions instead of /v1/completions")
    option("--prompts", type=Path, help="JSONL with the field 'prompt', or one prompt per line")
    option("--num_prompts", type=int, default=200, help="generated when there is no file")
    option("--prompt_words", type=int, default=100, help="of a generated prompt")
    option("--max_tokens", type=int, default=64)
    option("--temperature", type=float, default=0.0)
    option("--warmup", type=float, default=5.0, help="seconds under load before the measured ones")
    option("--duration", type=float, default=30.0, help="measured seconds of each load")
    option("--seed", type=int, default=0)
    option("--timeout", type=float, default=300.0, help="seconds after which the client gives a request up")
    option("--first_token_s", type=float, default=1.0, help="objective for goodput; so are the next two")
    option("--inter_token_s", type=float, default=0.2)
    option("--end_to_end_s", type=float)
    option("--share", type=float, default=0.8, help="soak: of the capacity")
    option("--capacity", type=float, help="soak: requests a second; measured with 16 clients when left out")
    option("--max_growth", type=float, default=0.02, help="soak: of the server's memory")
    option("--settle", type=float, default=10.0, help="soak: seconds for the slots to become free")
    option("--server_pid", type=int, help="of this machine: whose CPU time, and in a soak memory, counts")
    option("--output_dir", type=Path, help="for load.json, load.md and load.html")
    return parser.parse_args()


def main() -> None:
    """Send, measure, report."""
    args = parse()
    check_pid(args.server_pid)
    client = Client(args.url, key=os.environ.get("YUNQUE_API_KEY", ""), timeout_s=args.timeout)
    prompts = (
        read_prompts(args.prompts) if args.prompts else make_prompts(args.num_prompts, args.prompt_words, args.seed)
    )
    work = Workload(
        model=args.model or asyncio.run(_first_model(client)), prompts=prompts, max_tokens=args.max_tokens,
        temperature=args.temperature, chat=args.chat, seed=args.seed, warmup_s=args.warmup, duration_s=args.duration,
    )  # fmt: skip
    objectives = Objectives(
        first_token_s=args.first_token_s, inter_token_s=args.inter_token_s, end_to_end_s=args.end_to_end_s
    )
    settings = {name: value for name, value in asdict(work).items() if name != "prompts"} | asdict(objectives)
    settings["prompts"] = str(args.prompts) if args.prompts else f"{args.num_prompts} of {args.prompt_words} words"
    if args.soak:
        report = asyncio.run(_soak(client, work, objectives, settings, args))
    else:
        report = asyncio.run(_measure(client, work, objectives, settings, args))
    echo(report.markdown())
    if args.output_dir:
        report.save(args.output_dir)
        echo(f"saved {args.output_dir}/load.html, load.md, load.json")
    broken = [check.name for check in report.checks if not check.passed]
    if broken:
        raise CheckFailed(f"not held: {', '.join(broken)}")
    if not any(summary.completed for summary in report.summaries):
        raise CheckFailed("no request was answered")


async def _measure(
    client: Client, work: Workload, objectives: Objectives, settings: dict[str, Any], args: argparse.Namespace
) -> LoadReport:
    summaries: list[Summary] = []
    outcomes: list[Outcome] = []
    facts: dict[str, Any] = {}
    for load in args.rates or args.clients:
        used_s = cpu_s(args.server_pid) if args.server_pid else 0.0
        if args.rates:
            name = f"rate {load:g}"
            outcomes, window = await open_loop(client, work, load)
        else:
            name = f"{load} client{'s' if load > 1 else ''}"
            outcomes, window = await closed_loop(client, work, load)
        summaries.append(_told(summarize(name, outcomes, window, objectives)))
        if args.server_pid:
            tokens = sum(each.tokens for each in outcomes)
            facts[f"tokens per CPU second of the server, {name}"] = round(
                tokens / max(0.01, cpu_s(args.server_pid) - used_s), 1
            )
    return LoadReport(
        args.url, settings, "requests a second" if args.rates else "clients", args.rates or args.clients, summaries,
        outcomes, facts=facts,
    )  # fmt: skip


async def _soak(
    client: Client, work: Workload, objectives: Objectives, settings: dict[str, Any], args: argparse.Namespace
) -> LoadReport:
    capacity = args.capacity
    summaries = []
    if capacity is None:
        outcomes, window = await closed_loop(client, work, 16)
        summaries.append(_told(summarize("16 clients", outcomes, window, objectives)))
        capacity = summaries[0].completed_rate
        if not capacity:
            raise CheckFailed("the server answered no request of 16 clients; see rejected and failed above")
    rate = args.share * capacity
    watch = Watch(client, args.server_pid, every_s=min(1.0, 2.0 * args.soak))  # a tenth of it holds three
    watching = asyncio.create_task(watch.run())
    outcomes, window = await open_loop(client, replace(work, duration_s=60 * args.soak), rate)
    watching.cancel()
    summaries.append(_told(summarize(f"rate {rate:.3g}", outcomes, window, objectives)))
    after = await watch.settled(args.settle)
    found = checks(outcomes, memory_growth(watch.samples, window), after, args.max_growth)
    facts = {"capacity (requests/s)": round(capacity, 3), "share": args.share, "minutes": args.soak}
    return LoadReport(args.url, settings, "requests a second", [rate], summaries, outcomes, found, watch.samples, facts)


async def _first_model(client: Client) -> str:
    try:
        status, body = await client.get("/v1/models")
        if status != 200:
            raise InputError(f"--url: /v1/models answers {status}; is the key of the server in $YUNQUE_API_KEY?")
        return str(next(model["id"] for model in json.loads(body)["data"] if model.get("kind") != "classifier"))
    except OSError as error:
        raise InputError(f"--url: no server answers there ({type(error).__name__})") from error
    except (StopIteration, ValueError, KeyError) as error:
        raise InputError("--model: /v1/models names none that writes text; name one") from error


def _told(summary: Summary) -> Summary:
    rejected, failed = sum(summary.rejected.values()), sum(summary.failed.values())
    echo(
        f"{summary.load}: {summary.completed} of {summary.requests} answered ({rejected} refused, {failed} failed), "
        f"{summary.tokens_s:.0f} tokens/s, first token p50 {1e3 * summary.first_token.p50:.0f} ms, "
        f"p99 {1e3 * summary.first_token.p99:.0f} ms"
    )
    return summary


def _numbers(kind: type) -> Callable[[str], list[Any]]:
    def parse_list(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        if min(values) <= 0:
            raise argparse.ArgumentTypeError("give numbers above 0")
        return values

    return parse_list


if __name__ == "__main__":
    run(main)
