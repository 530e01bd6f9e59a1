"""Tokens per second of an exported model beside transformers: greedy, 128 tokens in, 64 out, batches of 1, 8 and 32.

    python bench/serve_generation.py                          # flan-t5-small shape, fp32, 2 threads
    python bench/serve_generation.py --shape llama --peers    # SmolLM-135M shape; --peers also runs transformers
    python bench/serve_generation.py --profile                # where a step's time goes: graph, NumPy

Random weights, made once under --home; the same work as the peers of ../shared/peers/serve_peers.py: the whole call is
timed (encoder or prompt included), one warm-up, the median of --repeats; load is the time to open the folder with its
hashes, RSS is the process's after loading (ours) or its peak. One JSON line per engine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_TOKENS, NEW_TOKENS = 128, 64


def make_model(shape: str, folder: Path) -> None:
    """A model of random weights with a tokenizer that knows every id."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    if shape == "t5":
        size = 32128
        config = T5Config(
            vocab_size=size, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
        )  # fmt: skip
        model: Any = T5ForConditionalGeneration(config)
        # transformers 5 ties every T5 it makes; FLAN-T5's head is its own.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * config.d_model**-0.5)
        model.config.tie_word_embeddings = False
    else:
        size = 49152
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                num_key_value_heads=3, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=True,
                bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=576**-0.5,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    words = {f"w{index}": index for index in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", unk_token="w2").save_pretrained(
        folder
    )


def export_model(source: Path, folder: Path) -> None:
    from yunque.export.arguments import ExportArguments
    from yunque.export.folder import export

    export(ExportArguments(model_name_or_path=str(source), output_dir=str(folder), parity_prompts=2))


def open_ours(folder: Path, threads: int) -> Callable[[Any, int], Any]:
    from yunque import runtime

    model = runtime.load(folder, threads=threads)
    assert not isinstance(model, runtime.Classifier)

    def generate(ids: Any, count: int) -> Any:
        answers = model.generate(ids.tolist(), max_new_tokens=count, eos_token_ids=(), batch_size=len(ids))
        return np.array([answer.tokens for answer in answers])

    return generate


def open_transformers(folder: Path, threads: int) -> Callable[[Any, int], Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.set_num_threads(threads)
    is_t5 = json.loads((folder / "config.json").read_text())["model_type"] == "t5"
    model = (AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM).from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None

    def generate(ids: Any, count: int) -> Any:
        tokens = torch.from_numpy(ids)
        with torch.inference_mode():
            output = model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False
            )
        return output[:, -count:].numpy()

    return generate


ENGINES = {"yunque": open_ours, "transformers": open_transformers}


def measure(engine: str, folder: Path, args: argparse.Namespace, queue: Any) -> None:
    """Time one engine in a process of its own."""
    begin = time.perf_counter()
    generate = ENGINES[engine](folder, args.threads)
    loaded = time.perf_counter() - begin
    row: dict[str, Any] = {
        "engine": engine, "shape": args.shape, "threads": args.threads, "load_s": round(loaded, 2),
        "rss_loaded_mb": round(_rss_bytes() / 1e6), "files_mb": round(_folder_bytes(folder) / 1e6, 1), "tokens_s": {},
    }  # fmt: skip
    row["tokens"] = {}
    for batch in args.batches:
        ids = np.random.RandomState(batch).randint(300, 30000, (batch, PROMPT_TOKENS)).astype(np.int64)
        row["tokens"][batch] = generate(ids, NEW_TOKENS).tolist()
        if args.profile:
            _profile(generate, ids)
        if batch == 1:
            row["first_token_ms"] = round(1e3 * _median(lambda ids=ids: generate(ids, 1), 5), 1)
        seconds = _median(lambda ids=ids: generate(ids, NEW_TOKENS), args.repeats)
        row["tokens_s"][batch] = round(batch * NEW_TOKENS / seconds, 1)
    row["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    queue.put(row)


def _median(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _profile(generate: Callable[[Any, int], Any], ids: Any) -> None:
    import cProfile
    import pstats

    profile = cProfile.Profile()
    profile.runcall(generate, ids, NEW_TOKENS)
    pstats.Stats(profile).sort_stats("tottime").print_stats(12)


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if not path.name.startswith("tokenizer"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("t5", "llama"), default="t5")
    parser.add_argument("--home", type=Path, default=Path("outputs/bench_serve"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="time transformers fp32 too")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    source, folder = args.home / args.shape, args.home / f"{args.shape}_onnx"
    spawn = multiprocessing.get_context("spawn")  # an own process each: memory and threads of one engine only
    for path, make, values in ((source, make_model, (args.shape, source)), (folder, export_model, (source, folder))):
        if not path.exists():
            worker = spawn.Process(target=make, args=values)
            worker.start()
            worker.join()
            if worker.exitcode:
                raise SystemExit(1)
    answers: dict[str, Any] = {}
    for engine in ENGINES if args.peers else ("yunque",):
        queue = spawn.Queue()
        worker = spawn.Process(target=measure, args=(engine, folder if engine == "yunque" else source, args, queue))
        worker.start()
        while queue.empty() and worker.is_alive():
            time.sleep(0.1)
        if not worker.is_alive() and worker.exitcode:
            raise SystemExit(1)
        row = queue.get()
        worker.join()
        answers[engine] = row.pop("tokens")
        print(json.dumps(row), flush=True)
    if len(answers) == 2:
        equal = {
            batch: round(float((np.array(tokens) == np.array(answers["transformers"][batch])).mean()), 4)
            for batch, tokens in answers["yunque"].items()
        }
        print(json.dumps({"share_of_tokens_equal": equal}))


if __name__ == "__main__":
    main()
