"""Rehearse every recipe under every launch profile with models of four families, for the table of docs/layouts.md.

    python bench/layout_table.py cells.jsonl                                   # hours; goes on where it was stopped
    python bench/layout_table.py cells.jsonl --recipes finetune dpo --families t5 --profiles zero3
    python bench/layout_table.py cells.jsonl --write docs/layouts.md           # runs nothing, but puts the table there

Two steps on tiny models: the embedded T5, whose head is untied, and a BART (tied), a GPT-2 (tied) and a Llama (untied)
of its vocabulary with random weights. Two ranks, four under fsdp2_tp. A cell is `yunque rehearse` as a user runs it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from yunque.distributed.layouts import PROFILES
from yunque.distributed.rehearse import TOLERANCE

ROOT = Path(__file__).parents[1]
MARKS = ("<!-- bench/layout_table.py: begin -->", "<!-- bench/layout_table.py: end -->")
FAMILIES = ("t5", "llama", "gpt2", "bart")
TARGETS = {"t5": "q v wo", "bart": "q_proj v_proj", "gpt2": "c_attn", "llama": "q_proj v_proj"}
SHORT = "--max_steps 2 --logging_steps 1 --per_device_train_batch_size 2 --max_train_samples 8 --max_test_samples 4"
PROMPTS = "--dataset_name embedded --max_new_tokens 4"
ROLLOUTS = (
    "--max_steps 2 --batch_size 8 --mini_batch_size 4 --ppo_epochs 1 --max_train_samples 8 --max_test_samples 4 "
    "--reward_model_name_or_path embedded --reward_label nothate"
)
LORA = "--use_peft true --lora_r 4 --lora_dropout 0.0 --lora_target_modules {targets}"
RECIPES = {
    "finetune": f"recipes/finetune.py {SHORT} {PROMPTS}",
    "finetune, LoRA": f"recipes/finetune.py {SHORT} {PROMPTS} {LORA}",
    "ppo_detox": f"recipes/ppo_detox.py {ROLLOUTS} {PROMPTS} --use_peft false --merge_adapter false",
    "ppo_detox, LoRA": f"recipes/ppo_detox.py {ROLLOUTS} {PROMPTS} {LORA}",
    "grpo_detox, LoRA": f"recipes/grpo_detox.py {ROLLOUTS} {PROMPTS} {LORA}",
    "dpo": f"recipes/dpo.py {SHORT} --dataset_name {{pairs}}",
    "dpo, LoRA": f"recipes/dpo.py {SHORT} --dataset_name {{pairs}} {LORA}",
    "orpo": f"recipes/orpo.py {SHORT} --dataset_name {{pairs}}",
    "reward_model": f"recipes/reward_model.py {SHORT} --dataset_name {{pairs}} --max_length 64",
    "distill": f"compress/distill.py {SHORT} {PROMPTS} --max_target_length 16",
}


def make_models(folder: Path) -> dict[str, Path]:
    """Folders of the families' models, and pairs of summaries in the folder ``pairs``."""
    import torch
    from transformers import AutoTokenizer, BartConfig, GPT2Config, LlamaConfig
    from transformers import BartForConditionalGeneration as Bart
    from transformers import GPT2LMHeadModel as GPT2
    from transformers import LlamaForCausalLM as Llama

    from yunque.models.embedded import ensure_embedded
    from yunque.models.loading import save_model

    embedded = ensure_embedded(quiet=True)
    tokenizer = AutoTokenizer.from_pretrained(embedded.policy)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    bart = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    bart |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1}
    built: dict[str, Any] = {
        "bart": Bart(BartConfig(**ids, **bart, forced_eos_token_id=None)),
        "gpt2": GPT2(GPT2Config(**ids, n_embd=64, n_layer=2, n_head=4)),
        "llama": Llama(LlamaConfig(**ids, **sizes, tie_word_embeddings=False)),
    }
    for name, model in built.items():
        generator = torch.Generator().manual_seed(0)
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.1, generator=generator)
        save_model(model, tokenizer, folder / name)
    (folder / "pairs").mkdir()
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (embedded.dataset / f"{split}.jsonl").read_text().splitlines()[:16]]
        answers = [row["summary"] for row in rows]
        pairs = zip(answers, [*answers[1:], answers[0]], strict=True)
        lines = [
            json.dumps({"prompt": f"About {row['topic']}:", "chosen": f" {chosen}", "rejected": f" {rejected}"})
            for row, (chosen, rejected) in zip(rows, pairs, strict=True)
        ]
        (folder / "pairs" / f"{split}.jsonl").write_text("\n".join(lines))
    return {name: folder / name for name in built} | {"t5": embedded.policy, "pairs": folder / "pairs"}


def rehearse(recipe: str, profile: str, family: str, models: dict[str, Path], report: Path) -> dict[str, Any]:
    """What the command says of one cell."""
    given = RECIPES[recipe].format(pairs=models["pairs"], targets=TARGETS[family]).split()
    model = "--teacher_name_or_path" if recipe == "distill" else "--model_name_or_path"
    command = [sys.executable, "-m", "yunque", "rehearse", profile, *given, model, str(models[family])]
    command += ["--ranks", "4" if profile == "fsdp2_tp" else "2", "--json", str(report)]
    report.unlink(missing_ok=True)
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    cell: dict[str, Any] = {"recipe": recipe, "profile": profile, "family": family}
    if report.is_file():
        found = json.loads(report.read_text())
        names = ("start_difference", "largest_difference", "equal", "answers", "same_answers")
        return cell | {name: found[name] for name in names} | {"losses": len(found["losses"])}
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    return cell | {"refused": errors[0].removeprefix("error: ") if run.returncode == 2 and errors else None}


def table(cells: Iterable[dict[str, Any]]) -> str:
    """The table in Markdown, with reasons of what was refused below it."""
    known = {(cell["recipe"], cell["family"], cell["profile"]): cell for cell in cells}
    profiles = [profile for profile in PROFILES if profile != "cpu"]
    reasons: list[str] = []
    lines = [f"| recipe, family | {' | '.join(f'`{profile}`' for profile in profiles)} |", "|---" * 9 + "|"]
    for recipe in RECIPES:
        for family in FAMILIES:
            row = [_words(known.get((recipe, family, profile)), reasons) for profile in profiles]
            if set(row) != {"-"}:
                lines.append(f"| {recipe}, {family} | {' | '.join(row)} |")
    notes = [f"{letter}. {reason}" for letter, reason in zip("abcdefghijklmnopqrstuvwxyz", reasons, strict=False)]
    return "\n".join([*lines, "", *notes])


def _words(cell: dict[str, Any] | None, reasons: list[str]) -> str:
    if cell is None:
        return "-"
    if "losses" not in cell:
        reason = cell["refused"] or "failed"
        if reason not in reasons:
            reasons.append(reason)
        return f"no [{'abcdefghijklmnopqrstuvwxyz'[reasons.index(reason)]}]"
    verdict = "" if cell["largest_difference"] <= TOLERANCE["bf16"] else " DIFFER"
    return f"{cell['start_difference']:.0e}; {cell['losses']}{verdict} {cell['largest_difference']:.0e}"


def write(table: str, page: Path) -> None:
    """Put the table, with when and on what it was made, between the marks of ``page``."""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "deepspeed"))
    made = f"{datetime.date.today()}, {versions}, {cpus[0].partition(': ')[2] if cpus else 'unknown CPU'}."
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    page.write_text(f"{before}{MARKS[0]}\n\n{made}\n\n{table}\n\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> None:
    """Run the cells that are missing, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, help="one JSON line a cell; those that it holds are not run again")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--profiles", nargs="+", choices=PROFILES[1:], default=list(PROFILES[1:]))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table of the cells into this page")
    args = parser.parse_args()
    cells = [json.loads(line) for line in args.cells.read_text().splitlines()] if args.cells.is_file() else []
    if args.write:
        write(table(cells), args.write)
        return
    done = {(cell["recipe"], cell["profile"], cell["family"]) for cell in cells}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        for family in args.families:
            for profile in args.profiles:
                for recipe in args.recipes:
                    if (recipe, profile, family) not in done:
                        cell = rehearse(recipe, profile, family, models, Path(folder) / "report.json")
                        print(json.dumps(cell), flush=True)
                        with args.cells.open("a") as file:
                            file.write(json.dumps(cell) + "\n")


if __name__ == "__main__":
    main()
