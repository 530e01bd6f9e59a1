"""Speed and memory of the PPO loop on the shapes of TRL's baseline (../shared/peers/trl_ppo_baseline.py).

    OMP_NUM_THREADS=1 python bench/ppo_step.py --arch seq2seq --shape small --steps 3
    python bench/ppo_step.py --peer-python /tmp/peers/trl/bin/python --repeats 3     # TRL in turn, and the ratio
    pip install --no-deps --target /tmp/peers/trl011 trl==0.11.4 tyro docstring_parser shtab typeguard
    python bench/ppo_step.py --peer-path /tmp/peers/trl011                # TRL 0.11.4 on this environment's own stack

Models have random weights, the reward is a small random RoBERTa; no network. Prints one JSON line a run. On a shared
machine compare ``samples_per_cpu_s`` of runs with one thread: CPU seconds leave the neighbours out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {
    ("seq2seq", "small"): {
        "d_model": 512,
        "num_layers": 8,
        "num_heads": 6,
        "d_kv": 64,
        "d_ff": 1024,
        "vocab_size": 32128,
    },
    ("seq2seq", "tiny"): {"d_model": 128, "num_layers": 2, "num_heads": 4, "d_kv": 32, "d_ff": 256, "vocab_size": 2048},
    ("causal", "small"): {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 512, "vocab_size": 50257},
    ("causal", "tiny"): {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 2048},
}
PEER = Path(__file__).resolve().parents[2] / "shared" / "peers" / "trl_ppo_baseline.py"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=["seq2seq", "causal"], default="seq2seq")
    parser.add_argument("--shape", choices=["small", "tiny"], default="small")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--mini-batch", type=int, default=4)
    parser.add_argument("--no-lora", action="store_true", help="train all weights")
    parser.add_argument("--lora-modules", help="regular expression of the layers to adapt; TRL's choice if unset")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print where one step's CPU time goes, and nothing else")
    parser.add_argument("--peer-python", help="interpreter with TRL 0.11.4; runs both in turn and prints the ratio")
    parser.add_argument("--peer-path", help="folder with TRL 0.11.4, to be imported by this interpreter instead")
    parser.add_argument("--peer-option", action="append", default=[], help="passed on, e.g. --per-prompt-generate")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs with a peer")
    return parser.parse_args()


def word_tokenizer(size: int):
    """A word-level tokenizer of exactly ``size`` ids, as the baseline's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{index}": index for index in range(3, size)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 512}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def build_policy(options: argparse.Namespace):
    """The baseline's policy model with LoRA r=32 on q, v (GPT-2: c_attn), and its tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, T5Config

    shape, special = SHAPES[options.arch, options.shape], {"pad_token_id": 0, "eos_token_id": 1}
    if options.arch == "seq2seq":
        config = T5Config(feed_forward_proj="gated-gelu", decoder_start_token_id=0, **special, **shape)
        model = AutoModelForSeq2SeqLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(GPT2Config(bos_token_id=1, **special, **shape))
    if not options.no_lora:
        seq2seq = options.arch == "seq2seq"
        targets, task = (["q", "v"], "SEQ_2_SEQ_LM") if seq2seq else (["c_attn"], "CAUSAL_LM")
        targets = options.lora_modules or targets
        lora = LoraConfig(
            r=32, lora_alpha=32, lora_dropout=0.05, target_modules=targets, task_type=task, fan_in_fan_out=not seq2seq
        )
        model = get_peft_model(model, lora)
    return model, word_tokenizer(shape["vocab_size"])


def build_reward(adapter):
    """The baseline's reward: a small random RoBERTa that reads query and response."""
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    from yunque.rl.config import RewardArguments
    from yunque.rl.rewards import ClassifierReward, ClassifierScorer

    torch.manual_seed(7)
    config = RobertaConfig(
        vocab_size=2048, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        max_position_embeddings=514, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        id2label={0: "nothate", 1: "hate"}, label2id={"nothate": 0, "hate": 1},
    )  # fmt: skip
    model = RobertaForSequenceClassification(config)
    scorer = ClassifierScorer(model, word_tokenizer(2048), batch_size=16, device=torch.device("cpu"))
    return ClassifierReward(scorer, adapter, RewardArguments())


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Run the training loop and time its steps by wall clock and by this process's CPU seconds."""
    import numpy as np
    import torch
    import transformers
    from accelerate import Accelerator

    from yunque.distributed.arguments import RunArguments
    from yunque.models.adapter import adapter_for
    from yunque.models.arguments import GenerationArguments
    from yunque.models.policy import Policy, Reference
    from yunque.rl.config import PPOConfig
    from yunque.rl.loop import Prompts, TrainingLoop
    from yunque.rl.trainer import PPOTrainer

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, tokenizer = build_policy(options)
    adapter = adapter_for(model, tokenizer)
    policy = Policy(model, adapter)
    config = PPOConfig(batch_size=options.batch, mini_batch_size=options.mini_batch, max_new_tokens_low=32)
    trainer = PPOTrainer(
        config, policy, Reference(policy), Accelerator(cpu=True), seed=0, total_steps=options.steps + 1
    )
    rng = np.random.default_rng(0)
    count = options.batch * (options.steps + 1)
    queries = [rng.integers(3, model.config.vocab_size, rng.integers(64, 201)).tolist() for _ in range(count)]
    loop = TrainingLoop(
        trainer,
        Prompts(queries, [tokenizer.decode(query) for query in queries]),
        build_reward(adapter),
        tokenizer.decode,
        generation=GenerationArguments(max_new_tokens=64, min_new_tokens=5),
        run=RunArguments(),
        total_steps=options.steps + 1,
        resolved_config={},
    )
    loop.step(0)
    if options.profile:
        return profile(loop)
    wall, cpu = time.perf_counter(), time.process_time()
    logs = [loop.step(step) for step in range(1, options.steps + 1)]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    samples = options.batch * options.steps
    names = ("generate", "reward", "forward_pass", "optimize_step")
    parts = {name: statistics.mean(log[f"time/ppo/{name}"] for log in logs) for name in names}
    return {
        "impl": "yunque", "torch": torch.__version__, "transformers": transformers.__version__,
        "arch": options.arch, "shape": options.shape, "lora": not options.no_lora, "threads": options.threads,
        "batch": options.batch, "mini_batch": options.mini_batch, "steps": options.steps,
        "samples_per_s": round(samples / wall, 4), "samples_per_cpu_s": round(samples / cpu, 4),
        **{f"s_{name}": round(seconds, 3) for name, seconds in parts.items()},
        "response_tokens": round(statistics.mean(log["tokens/responses_len_mean"] for log in logs), 1),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }  # fmt: skip


def profile(loop) -> dict[str, object]:
    """Shares of torch's operators in the time that one step spends in any of them, and how often each is called."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        loop.step(1)
    operators = sorted(recorded.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
    total = sum(entry.self_cpu_time_total for entry in operators)
    rows = {entry.key: (round(entry.self_cpu_time_total / total, 3), entry.count) for entry in operators[:12]}
    return {"share_and_calls": rows}


def compare(options: argparse.Namespace) -> dict[str, object]:
    """Run TRL and this loop in turn, each in a process of its own; medians and ratios."""
    shared = ["--arch", options.arch, "--shape", options.shape, "--steps", str(options.steps)]
    shared += ["--batch", str(options.batch), "--mini-batch", str(options.mini_batch)]
    shared += ["--threads", str(options.threads), *(["--no-lora"] if options.no_lora else [])]
    commands = {
        "trl": [options.peer_python or sys.executable, str(PEER), *shared, *options.peer_option],
        "yunque": [sys.executable, __file__, *shared],
    }
    paths = {"trl": {"PYTHONPATH": options.peer_path} if options.peer_path else {}, "yunque": {}}
    runs: dict[str, list[dict[str, float]]] = {"trl": [], "yunque": []}
    for _ in range(options.repeats):
        for name, command in commands.items():
            process = subprocess.run(command, env=os.environ | paths[name], capture_output=True, text=True)
            if process.returncode:
                raise SystemExit(f"{name} failed: {process.stderr.strip().splitlines()[-1]}")
            output = process.stdout
            runs[name].append(json.loads(output.strip().splitlines()[-1]))
            print(json.dumps(runs[name][-1]))
    median = {
        key: {name: statistics.median(run[key] for run in runs[name]) for name in runs}
        for key in ("samples_per_cpu_s", "samples_per_s", "peak_rss_mb")
    }
    ratios = {f"{key}_ratio": round(value["yunque"] / value["trl"], 3) for key, value in median.items()}
    return {"arch": options.arch, "shape": options.shape, "peer_options": options.peer_option, **median, **ratios}


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = arguments()
    print(json.dumps(compare(options) if options.peer_python or options.peer_path else measure(options)))


if __name__ == "__main__":
    main()
