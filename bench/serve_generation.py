"""Tokens per second of exported models beside other engines, in turn: greedy, 128 tokens in, 64 out, batches 1, 8, 32.

    python bench/serve_generation.py                            # ours: fp32 and both int8, both shapes, 2 threads
    python bench/serve_generation.py --peers ../shared/peers    # beside every peer whose environment setup.sh has made
    python bench/serve_generation.py --pruned                   # ours: whole, heads and neurons pruned, masked 2:4

Models are flan-t5-small (77 M) and SmolLM-135M in shape, of random weights, made once under --home. Every engine is a
process that is stopped (SIGSTOP) while another is timed; a round times each once, and the median over --repeats rounds
counts, so a slow minute of the machine meets all alike. The whole call is timed (encoder or prompt included) after a
warm-up of the same size. others_share is the largest share of the machine that other processes took during a timed
call: above some 0.1 wall times mean little; tokens_cpu_s (of the engine's own CPU time) then serves, with --threads 1.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROMPT_TOKENS, NEW_TOKENS = 128, 64
LARGEST_ID = {"t5": 30000, "llama": 49000}
OURS = ("yunque-fp32", "yunque-int8", "yunque-int8-static")
PRUNED = tuple(f"{name}-{kind}" for name in OURS[:2] for kind in ("pruned", "masked"))
SLOW = (
    r"(t5|llama)/(transformers-(fp32|bf16)|llamacpp.*)|llama/(ctranslate2-fp32|openvino-fp32|optimum.*|ort-genai-int4)"
)
"""Never the best of a batch in FACTS: timed with --all only, as the run would take twice as long."""
STOCK = r"t5/optimum-onnx-fp32-stock"  # of the same files as another, and fails
NEEDED = "t5/optimum-onnx-fp32-3files"  # what optimum's int8 files are made from
BFLOAT16 = ("openvino-fp32-auto", "transformers-bf16")

Generate = Callable[[Any, int], Any]
run = partial(subprocess.run, check=True, stdout=2)


# --- models -----------------------------------------------------------------------------------------------------------


def make_model(shape: str, folder: Path) -> None:
    """A model of random weights with a tokenizer that knows every id."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    if shape == "t5":
        size = 32128
        config = hf.T5Config(
            vocab_size=size, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
        )  # fmt: skip
        model: Any = hf.T5ForConditionalGeneration(config)
        # transformers 5 ties every T5 it makes; FLAN-T5's head is its own.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * config.d_model**-0.5)
        model.config.tie_word_embeddings = False
    else:
        size = 49152
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=size, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                num_key_value_heads=3, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=True,
                bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=576**-0.5,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    words = ["<pad>", "</s>", "<unk>", *(f"w{index}" for index in range(3, size))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def export_model(engine: str, source: Path, folder: Path) -> None:
    """Write the ONNX folder of one of our engines, pruned or quantized as its name says."""
    if engine.endswith("static"):
        return export_static(source, folder)
    from yunque import artifacts
    from yunque.compression.schemes import PrecisionPlan, layer_scheme
    from yunque.export.folder import write_folder
    from yunque.export.source import load_source

    if engine.endswith(("pruned", "masked")):
        pruned = source.parent / f"{source.name}_{engine.rsplit('-', 1)[1]}"
        if not pruned.exists():
            prune_model(source, pruned, masked=engine.endswith("masked"))
        source = pruned
    model = load_source(str(source), "main", False)
    plan = PrecisionPlan(default=layer_scheme("onnx_int8_dynamic")) if "int8" in engine else PrecisionPlan()
    artifacts.save_model_folder(
        folder, lambda staging: [write_folder(model, staging, plan), None][1], stage="onnx", parents=[str(source)]
    )


def export_static(source: Path, folder: Path) -> None:
    """With ranges of the inputs from a few prompts, which are as random as the model."""
    texts, pick = folder.with_suffix(".jsonl").absolute(), random.Random(0)
    rows = [" ".join(f"w{pick.randrange(300, 30000)}" for _ in range(PROMPT_TOKENS)) for _ in range(4)]
    texts.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    options: dict[str, Any] = {
        "model_name_or_path": source.absolute(), "scheme": "onnx_int8_static", "output_dir": folder.absolute(),
        "calibration_dataset": texts, "calibration_text_column": "text", "calibration_samples": len(rows),
        "calibration_new_tokens": 4, "parity_prompts": 1, "parity_tokens": 4,
    }  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    run([sys.executable, "compress/quantize.py", *words], cwd=ROOT)


def prune_model(source: Path, folder: Path, *, masked: bool) -> None:
    """The model without 30 % of its neurons and heads, or with 2 of 4 weights set to zero."""
    from yunque.compression.arguments import PruningArguments
    from yunque.compression.pruning import prune
    from yunque.export.source import load_source

    given = {"semi_structured": True} if masked else {"ffn_sparsity": 0.3, "head_sparsity": 0.3}
    model = load_source(str(source), "main", False)
    pruned = prune(model.model, PruningArguments(importance="magnitude", **given), list)
    print("; ".join(pruned.lines()), file=sys.stderr)
    pruned.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


# --- the process of an engine -----------------------------------------------------------------------------------------


def open_ours(folder: Path, threads: int) -> Generate:
    """One of our folders."""
    import numpy as np

    from yunque import runtime

    model = runtime.load(folder, threads=threads)
    assert not isinstance(model, runtime.Classifier)

    def generate(ids: Any, count: int) -> Any:
        answers = model.generate(ids.tolist(), max_new_tokens=count, eos_token_ids=(), batch_size=len(ids))
        return np.array([answer.tokens for answer in answers])

    return generate


def open_peer(name: str, args: argparse.Namespace) -> Generate:
    """An engine of serve_peers.py; ``--prepare`` only makes what it loads."""
    sys.path.insert(0, str(args.peers))
    import serve_peers

    _, kind, artifact, prepare, load, _ = serve_peers.PEERS[name]
    work = str(args.peers_home / "work")
    settings = argparse.Namespace(
        threads=args.threads, kind=kind, model=str(args.source), work=work, inp=PROMPT_TOKENS, new=NEW_TOKENS,
        batches=args.batches, maxb=None, artifact=str(args.folder),
    )  # fmt: skip
    if args.prepare:
        if artifact and not args.folder.is_dir():
            settings.artifact += ".part"
            run(["rm", "-rf", settings.artifact])
            prepare(settings)
            os.rename(settings.artifact, args.folder)
        raise SystemExit(0)
    return load(settings)


def work(args: argparse.Namespace) -> None:
    """Load, then time what the lines of stdin ask for: a reply per line."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    begin = time.perf_counter()
    generate = open_ours(args.folder, args.threads) if "/" not in args.worker else open_peer(args.worker, args)
    import numpy as np

    reply: dict[str, Any] = {"load_s": time.perf_counter() - begin, "rss_loaded_mb": _status_mb("VmRSS")}
    while True:
        print(json.dumps(reply), file=replies, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        shape, batch = args.shapes[0], request["batch"]
        ids = np.random.RandomState(batch).randint(300, LARGEST_ID[shape], (batch, PROMPT_TOKENS)).astype(np.int64)
        machine, own, start = _busy_s(), time.process_time(), time.perf_counter()
        tokens = generate(ids, request["tokens"])
        seconds, cpu = time.perf_counter() - start, time.process_time() - own
        others = max(0.0, _busy_s() - machine - cpu) / (seconds * (os.cpu_count() or 1))
        reply = {"seconds": seconds, "cpu": cpu, "others": others, "peak_rss_mb": _status_mb("VmHWM")}
        if request["return_tokens"]:
            reply["tokens"] = np.asarray(tokens).tolist()


def _busy_s() -> float:
    """CPU seconds that all processes have used."""
    fields = [int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")


def _status_mb(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return round(int(line.split()[1]) * 1024 / 1e6)
    return 0


# --- all engines in turn ----------------------------------------------------------------------------------------------


class Engine:
    """A running engine, stopped while nothing is asked of it."""

    def __init__(self, name: str, python: Path, folder: Path, source: Path, args: argparse.Namespace) -> None:
        self.name, self.folder = name, folder
        self.rows: dict[int, list[dict[str, Any]]] = {}
        self.firsts: list[float] = []
        self.tokens: dict[int, list[list[int]]] = {}
        self.command = [
            str(python), __file__, "--worker", name, "--folder", str(folder), "--source", str(source),
            "--shapes", name.split("/")[0] if "/" in name else args.shape, "--threads", str(args.threads),
            "--peers-home", str(args.peers_home),
            *(["--peers", str(args.peers)] if "/" in name else []),
        ]  # fmt: skip
        self.environment = os.environ | {
            "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_HOME": str(args.peers_home / "work" / "hf"), "CT2_VERBOSE": "-2", "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def prepare(self) -> None:
        """Let a peer convert the model."""
        run([*self.command, "--prepare"], env=self.environment, stderr=subprocess.DEVNULL)

    def start(self) -> None:
        """Load the model."""
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, env=self.environment, text=True, **pipes)
        self.loaded = self._reply()

    def ask(self, batch: int, tokens: int, *, return_tokens: bool = False) -> dict[str, Any]:
        """Time one call."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        request = {"batch": batch, "tokens": tokens, "return_tokens": return_tokens}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self.last = self._reply()
        return self.last

    def warm_up(self, batch: int) -> None:
        """Answer once, and keep the tokens."""
        self.tokens[batch] = self.ask(batch, NEW_TOKENS, return_tokens=True)["tokens"]

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ChildProcessError(f"{self.name}: its process ended with {self.process.wait()}")
        self.process.send_signal(signal.SIGSTOP)
        return dict(json.loads(line))

    def stop(self) -> None:
        """End the process."""
        if hasattr(self, "process"):
            self.process.kill()
            self.process.wait()

    def row(self, reference: dict[int, list[list[int]]]) -> dict[str, Any]:
        """Its figures."""

        def rate(batch: int, key: str) -> float:
            median = statistics.median(one[key] for one in self.rows[batch])
            return round(batch * NEW_TOKENS / median, 1)

        def equal(batch: int) -> float:
            rows = zip(self.tokens[batch], reference[batch], strict=True)
            same = sum(a == b for ours, theirs in rows for a, b in zip(ours, theirs, strict=True))
            return round(same / (batch * NEW_TOKENS), 3)

        return {
            "engine": self.name.split("/")[-1],
            "tokens_s": {batch: rate(batch, "seconds") for batch in self.rows},
            "tokens_cpu_s": {batch: rate(batch, "cpu") for batch in self.rows},
            "first_token_ms": round(1e3 * statistics.median(self.firsts), 1),
            "load_s": round(self.loaded["load_s"], 2),
            "files_mb": round(_folder_bytes(self.folder) / 1e6, 1),
            "rss_loaded_mb": self.loaded["rss_loaded_mb"],
            "peak_rss_mb": self.last["peak_rss_mb"],
            "others_share": round(max(one["others"] for each in self.rows.values() for one in each), 2),
            "tokens_equal_to_fp32": {batch: equal(batch) for batch in self.rows} if reference else {},
        }


def attempt(name: str, call: Callable[..., Any], *values: Any) -> bool:
    """Whether ``call`` succeeded; what is missing or broken is left out with one line."""
    try:
        call(*values)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = f"exit code {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else error
        print(f"left out: {name}: {reason}", file=sys.stderr)
        return False
    return True


def measure(engines: list[Engine], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Load all engines, then time them in turn."""
    running: list[Engine] = []
    try:
        for engine in engines:
            if attempt(engine.name, engine.start):
                running.append(engine)
        for batch in args.batches:
            running = [engine for engine in running if attempt(engine.name, engine.warm_up, batch)]
            if batch == args.batches[0]:
                for engine in running:
                    engine.ask(1, 1)
            for _ in range(args.repeats):
                for engine in running:
                    if batch == args.batches[0]:
                        engine.firsts.append(statistics.median(engine.ask(1, 1)["seconds"] for _ in range(3)))
                    engine.rows.setdefault(batch, []).append(engine.ask(batch, NEW_TOKENS))
            print(f"batch {batch} of {len(running)} engines is done", file=sys.stderr)
        reference = next((engine.tokens for engine in running if engine.name == "yunque-fp32"), {})
        return [engine.row(reference) for engine in running]
    finally:
        for engine in engines:
            engine.stop()


def engines_of(shape: str, args: argparse.Namespace) -> list[Engine]:
    """What is to be timed, its files made."""
    args.shape = shape
    source = args.peers_home / "models" / shape
    maker = [args.peers_home / "optimum" / "bin" / "python", f"{args.peers}/make_models.py", source.parent]
    if not args.peers or not (source.exists() or attempt("the peers' models", run, maker)):
        source = args.home / shape
    if not source.exists():
        _in_process(make_model, shape, source)
    engines = []
    for name in filter(partial(re.fullmatch, args.only), OURS + (PRUNED if args.pruned else ())):
        folder = args.home / f"{shape}_{name.removeprefix('yunque-')}"
        if not folder.exists():
            _in_process(export_model, name, source, folder)
        engines.append(Engine(name, Path(sys.executable), folder, source, args))
    for name, (environment, artifact) in _peers(args).items():
        if not name.startswith(f"{shape}/") or not re.fullmatch(args.only, name.split("/")[1]):
            continue
        folder = args.peers_home / "work" / artifact if artifact else source
        engine = Engine(name, args.peers_home / environment / "bin" / "python", folder, source, args)
        if (folder.exists() or attempt(name, engine.prepare)) and (args.all or name != NEEDED):
            engines.append(engine)
    return engines


def _peers(args: argparse.Namespace) -> dict[str, tuple[str, str | None]]:
    """Environment and folder of every peer that is wanted, by name."""
    if args.peers is None:
        return {}
    sys.path.insert(0, str(args.peers))
    import serve_peers

    left = STOCK if args.all else f"{STOCK}|{SLOW}"
    return {name: peer[0:3:2] for name, peer in serve_peers.PEERS.items() if not re.fullmatch(left, name)}


def _in_process(call: Callable[..., None], *values: Any) -> None:
    """In a process of its own, which takes its memory with it."""
    worker = multiprocessing.get_context("spawn").Process(target=call, args=values)
    worker.start()
    worker.join()
    if worker.exitcode:
        raise SystemExit(1)


def _folder_bytes(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("tokenizer")]
    return sum(path.stat().st_size for path in files)


# --- the report -------------------------------------------------------------------------------------------------------


def figure(args: argparse.Namespace) -> str:
    """What engines are compared by: with one thread nobody spins, and CPU time is the steadier measure."""
    return "tokens_cpu_s" if args.threads == 1 else "tokens_s"


def best_peer(rows: list[dict[str, Any]], batch: int, key: str, *, fp32_only: bool = False) -> dict[str, Any] | None:
    """The fastest engine that is not ours."""
    peers = [row for row in rows if not row["engine"].startswith("yunque")]
    if fp32_only:
        peers = [row for row in peers if "fp32" in row["engine"] and row["engine"] not in BFLOAT16]
    return max(peers, key=lambda row: float(row[key][batch]), default=None)


def ratios(rows: list[dict[str, Any]], batches: list[int], key: str) -> list[dict[str, Any]]:
    """Ours over the best peer at each batch; fp32 over the best that computes in fp32."""
    found = []
    for row in rows:
        if row["engine"] not in OURS:
            continue
        for batch in batches:
            peer = best_peer(rows, batch, key, fp32_only=row["engine"] == "yunque-fp32")
            if peer is not None:
                ratio = round(row[key][batch] / peer[key][batch], 2)
                found.append({"engine": row["engine"], "batch": batch, "best_peer": peer["engine"], "ratio": ratio})
    return found


def table(rows: list[dict[str, Any]], batches: list[int], key: str) -> Iterator[str]:
    """Lines of Markdown."""
    head = ["engine", *(f"batch {batch}" for batch in batches), "first token ms", "load s", "files MB"]
    head += ["RSS loaded MB", "peak RSS MB", "others' share"]
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        fields = ("first_token_ms", "load_s", "files_mb", "rss_loaded_mb", "peak_rss_mb", "others_share")
        cells = [row["engine"], *(row[key][batch] for batch in batches), *(row[field] for field in fields)]
        yield "| " + " | ".join(str(cell) for cell in cells) + " |"


def report(results: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> str:
    """The results as Markdown."""
    key = figure(args)
    unit = "tokens per CPU second" if args.threads == 1 else "tokens per second"
    lines = []
    for shape, rows in results.items():
        title = f"{shape}: {unit}, {PROMPT_TOKENS} tokens in, {NEW_TOKENS} out, {args.threads} threads, "
        lines += [f"### {title}median of {args.repeats}", "", *table(rows, args.batches, key), ""]
        for entry in ratios(rows, args.batches, key):
            lines.append("- {engine}, batch {batch}: {ratio} x {best_peer}".format(**entry))
        whole = {row["engine"]: row for row in rows if row["engine"] in OURS}
        for row in rows:
            former = whole.get(row["engine"].rsplit("-", 1)[0])
            if row["engine"] in PRUNED and former is not None:
                gains = [f"{row[key][batch] / former[key][batch]:.2f} at batch {batch}" for batch in args.batches]
                lines.append(f"- {row['engine']} over {former['engine']}: {', '.join(gains)}")
        lines.append("")
    return "\n".join(lines)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Runs that are timed wait for each other."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Time what the options ask for, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=["t5", "llama"])
    parser.add_argument("--home", type=Path, default=Path("outputs/bench_serve"))
    parser.add_argument("--peers", type=Path, help="folder of serve_peers.py")
    parser.add_argument("--peers-home", type=Path, default=Path(os.environ.get("PEERS_HOME", "/tmp/peers")))
    parser.add_argument("--all", action="store_true", help="slow peers too")
    parser.add_argument("--only", default=".*", help="regular expression on engines")
    parser.add_argument("--pruned", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lock", type=Path, default=Path("/tmp/peers-bench.lock"))
    for hidden in ("--worker", "--folder", "--source"):
        parser.add_argument(hidden, type=Path if hidden != "--worker" else str, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.peers = args.peers and args.peers.resolve()
    if args.peers and not (args.peers / "serve_peers.py").is_file():
        parser.error(f"--peers: {args.peers} holds no serve_peers.py")
    if args.worker:
        work(args)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the engines, which are stopped, must go too
    results = {}
    args.home.mkdir(parents=True, exist_ok=True)
    for shape in args.shapes:
        engines = engines_of(shape, args)
        with lock(args.lock):
            results[shape] = measure(engines, args)
        for row in results[shape]:
            print(json.dumps({"shape": shape, "threads": args.threads, **row}), flush=True)
        key = figure(args)
        content = {of: {"engines": rows, "ratios": ratios(rows, args.batches, key)} for of, rows in results.items()}
        (args.home / "results.json").write_text(json.dumps(content, indent=1) + "\n")
        (args.home / "results.md").write_text(report(results, args))
    print(report(results, args))


if __name__ == "__main__":
    main()
