"""Which predicted damage foretells the measured gates: rank correlations over single layers and over random plans.

    python bench/sensitivity.py --model_name_or_path outputs/ppo_detox --scheme mixed --output_dir outputs/sensitivity \
      --gate_dataset_name outputs/prompts --toxicity_model_name_or_path embedded --keep_gate "toxicity<=+0.01" \
      "rougeL>=-1.0" --max_verdict_samples 500

Damages of the layers, one at a time, are measured on the search split. Then every layer alone in the first candidate,
and random plans of all candidates, are exported, answer the verdict split greedily, and are compared with the model: a
plan's prediction is the sum over its layers. `--write_prompts FOLDER` writes more prompts of the embedded corpus, which
no training has seen, and stops.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yunque.arguments import parse
from yunque.compression.mixed_arguments import KeepGateArguments
from yunque.compression.quantization_arguments import QuantizationArguments
from yunque.errors import run

PREDICTIONS = ("kl", "nll", "changed", "expected", "first_order", "greedy")


@dataclass
class BenchArguments:
    """How many plans are measured."""

    random_plans: int = field(default=24, metadata={"help": "Random plans of all candidates."})


def main() -> None:
    """Measure, predict, correlate."""
    if "--write_prompts" in sys.argv:
        write_prompts(Path(sys.argv[sys.argv.index("--write_prompts") + 1]))
        return
    order, args, bench = parse(
        QuantizationArguments, KeepGateArguments, BenchArguments, description=__doc__, repeatable=("keep_gate",)
    )

    from yunque.evaluation.keep_gate import measure_layers, prepare_work

    work = prepare_work(order, args)
    measured = measure_layers(work)
    damages = {(one.layer, one.scheme): one.damage for one in measured}
    groups = {"single layers": singles(work), "random plans": drawn(work, bench.random_plans, order.seed)}
    rows = [row(work, group, plan, damages) for group, plans in groups.items() for plan in plans]
    table = {group: correlations([one for one in rows if one["group"] == group]) for group in groups}
    output = Path(order.output_dir or ".") / "correlations.json"
    output.write_text(json.dumps({"correlations": table, "plans": rows}, indent=2) + "\n", encoding="utf-8")
    for group, found in table.items():
        print(f"\n{group} ({len(groups[group])}): Spearman's rank correlation of prediction and measurement")
        truths = list(next(iter(found.values())))
        print(f"{'':28}" + "".join(f"{name:>22}" for name in truths))
        for name, values in found.items():
            shown = ("" if values[truth] is None else format(values[truth], "+.2f") for truth in truths)
            print(f"{name:28}" + "".join(f"{value:>22}" for value in shown))
    print(f"\nwritten: {output}")


def write_prompts(folder: Path) -> None:
    """Rows of the embedded corpus beyond those of its own splits, all references polite."""
    from yunque.data.corpus import SPLIT_SIZES, build_corpus

    corpus = build_corpus(0, SPLIT_SIZES | {"test_search": 3000, "test_verdict": 3000})
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in (("test_search", "validation"), ("test_verdict", "test")):
        lines = (json.dumps(example.row(), ensure_ascii=False) for example in corpus[split])
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"written: {folder}: 3,000 rows to search with (validation), 3,000 for the verdict (test)")


def singles(work: Any) -> list[dict[str, str]]:
    """Each layer alone in the first candidate that it can be in."""
    plans = []
    for layer, schemes in work.schemes.items():
        quantized = [name for name, scheme in schemes.items() if scheme.is_quantized]
        plans += [{layer: quantized[0]}] if quantized else []
    return plans


def drawn(work: Any, count: int, seed: int) -> list[dict[str, str]]:
    """Plans from nearly all in the last candidates to nearly all in the first."""
    rng, plans = random.Random(seed), []
    for number in range(count):
        low = (number + 0.5) / count
        plan = {}
        for layer, schemes in work.schemes.items():
            names = list(schemes)
            half = max(1, len(names) // 2)
            plan[layer] = rng.choice(names[:half] if rng.random() < low else names[half:] or names)
        plans.append(plan)
    return plans


def row(work: Any, group: str, plan: Mapping[str, str], damages: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    """What was predicted of a plan, and what exporting and evaluating it has shown."""
    from yunque.compression.schemes import PrecisionPlan

    known = [damages[pair] for pair in plan.items() if pair in damages]
    metrics = list(known[0].greedy)
    predicted: dict[str, float] = {}
    for name in PREDICTIONS:
        values = [getattr(damage, name) for damage in known]
        if name == "changed":
            predicted[name] = sum(values)
        elif name in ("kl", "nll"):
            predicted[name] = sum(value.mean for value in values)
        else:
            for metric in metrics:
                predicted[f"{name} {metric}"] = sum(value[metric].mean for value in values)
    layers = {layer: work.schemes[layer][scheme] for layer, scheme in plan.items()}
    given = PrecisionPlan(layers={layer: scheme for layer, scheme in layers.items() if scheme.is_quantized})
    split = work.args.verdict_split
    judged = work.plans.judge(given, split, 0.95)
    ours, theirs = work.plans.aligned(split), work.plans.evaluation(given, split)
    changed = sum(a != b for a, b in zip(ours.answers, theirs.answers, strict=True)) / len(ours.answers)
    measured = {"changed answers": changed, "worst gate's excess": judged.excess}
    for metric in metrics:
        measured[f"change of {metric}"] = float((theirs.scores[metric] - ours.scores[metric]).mean())
    print(f"{group}: {changed:.1%} of the answers changed; {'; '.join(judged.lines())}", flush=True)
    return {"group": group, "plan": dict(plan), "predicted": predicted, "measured": measured}


def correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Of every prediction with everything measured."""
    from yunque.metrics.ranks import spearman

    return {
        name: {
            truth: spearman([one["predicted"][name] for one in rows], [one["measured"][truth] for one in rows])
            for truth in rows[0]["measured"]
        }
        for name in rows[0]["predicted"]
    }


if __name__ == "__main__":
    run(main)
