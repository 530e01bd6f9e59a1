"""Run the embedded detox demo with several seeds, numbers of threads and attention kernels: does its promise hold?

    python bench/demo_robustness.py --output_dir outputs/robustness                            # on the test prompts
    python bench/demo_robustness.py --output_dir outputs/chosen --split validation --seeds 0 1 -- --init_kl_coef 0.3

Every run must halve toxicity at least and keep ROUGE-L within 5 % of what it was. Settings are chosen on the validation
prompts, with the polite summaries as references; options after -- are the recipe's. Runs that are done are kept: the
same command goes on, and a folder of other settings, configuration or models is refused. Prints a Markdown table; exits
1 unless all runs keep the promise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yunque.artifacts import MANIFEST, read_manifest
from yunque.data.corpus import build_corpus
from yunque.models.embedded import ensure_embedded

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "recipes" / "configs" / "ppo_detox_embedded.yaml"
MOST_TOXICITY = 0.5  # after, of before
MOST_ROUGE_LOSS = 0.05  # relative


@dataclass(frozen=True)
class Run:
    """One start of the recipe."""

    seed: int
    threads: int
    attention: str

    def start(self, output_dir: Path, dataset: Path, options: list[str]) -> dict[str, Any]:
        """Train, unless it is done; the metrics of the manifest."""
        folder = output_dir / f"seed{self.seed}_threads{self.threads}_{self.attention}"
        if not (folder / MANIFEST).is_file():
            command = [
                *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu.yaml"),
                *("recipes/ppo_detox.py", "--config", str(CONFIG)),
                *("--seed", str(self.seed), "--attn_implementation", self.attention, "--dataset_name", str(dataset)),
                *("--output_dir", str(folder), "--overwrite_output_dir", *options),
            ]
            environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        return read_manifest(folder).metrics


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("options", nargs="*", help="of the recipe, after --")
    args = parser.parse_args()
    output_dir = args.output_dir.resolve()
    embedded = ensure_embedded()
    dataset = embedded.dataset if args.split == "test" else validation_as_test(output_dir, embedded.dataset)
    refuse_other_settings(output_dir, [args.split, str(embedded.policy.parent), CONFIG.read_text(), *args.options])
    runs = [Run(*values) for values in itertools.product(args.seeds, args.threads, args.attention)]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda run: run.start(output_dir, dataset, args.options), runs))
    print(table(runs, found))
    kept = [keeps(metrics) for metrics in found]
    print(f"\n{sum(kept)} of {len(kept)} runs keep the promise ({args.split} prompts)")
    return 0 if kept and all(kept) else 1


def refuse_other_settings(output_dir: Path, settings: list[str]) -> None:
    """Results of one folder are of one command."""
    path, text = output_dir / "settings.json", json.dumps(settings, indent=1)
    if path.is_file() and path.read_text() != text:
        sys.exit(f"--output_dir {output_dir}: holds runs of other settings; give another folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def validation_as_test(output_dir: Path, dataset: Path) -> Path:
    """A data set whose test split is the corpus' validation split, with its polite summaries."""
    folder = output_dir / "dataset"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_bytes((dataset / "train.jsonl").read_bytes())
    rows = [example.row() | {"summary": example.polite} for example in build_corpus()["validation"]]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def changes(metrics: dict[str, Any]) -> tuple[float, float]:
    """Of toxicity and ROUGE-L, relative to before."""
    return tuple(metrics[f"{name}_after"] / metrics[f"{name}_before"] - 1 for name in ("toxicity", "rougeL"))


def keeps(metrics: dict[str, Any]) -> bool:
    toxicity, rouge = changes(metrics)
    return toxicity <= MOST_TOXICITY - 1 and rouge >= -MOST_ROUGE_LOSS


def table(runs: list[Run], found: list[dict[str, Any]]) -> str:
    lines = [
        "| seed | threads | attention | toxicity | change | ROUGE-L | change | KL, nats | kept |",
        "|---" * 9 + "|",
    ]
    for run, metrics in zip(runs, found, strict=True):
        toxicity, rouge = changes(metrics)
        lines.append(
            f"| {run.seed} | {run.threads} | {run.attention} "
            f"| {metrics['toxicity_before']:.3f} → {metrics['toxicity_after']:.3f} | {toxicity:+.1%} "
            f"| {metrics['rougeL_before']:.3f} → {metrics['rougeL_after']:.3f} | {rouge:+.1%} "
            f"| {metrics['kl_final']:.2f} | {'yes' if keeps(metrics) else 'NO'} |"
        )
    toxicity, rouge = (sorted(values) for values in zip(*map(changes, found), strict=True))
    lines.append(f"\nToxicity {toxicity[0]:+.1%} to {toxicity[-1]:+.1%}, ROUGE-L {rouge[0]:+.1%} to {rouge[-1]:+.1%}.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
