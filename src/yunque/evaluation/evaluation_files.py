"""The folder of an evaluation: what may be continued or replaced there, ``evaluation.json``, ``generations.jsonl``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from yunque import artifacts, provenance
from yunque.errors import InputError
from yunque.evaluation.arguments import EvaluationArguments
from yunque.evaluation.progress import Progress, differing, write_atomically
from yunque.evaluation.scoring import SCALE, UNITS, AnsweredRow, score
from yunque.evaluation.settings import Setting
from yunque.evaluation.work import Work

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
RESULT = "evaluation.json"
GENERATIONS = "generations.jsonl"
SWEEP = "sweep.json"
_PARTS = ".parts"


class EvaluationFolder:
    """Where one setting's evaluation goes; complete once evaluation.json is there, which is written last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished = False
        self.identity: dict[str, Any] = {}
        self.answers = Progress(path / _PARTS / "answers", {})
        self.toxicity = Progress(path / _PARTS / "toxicity", {})
        self.kl = Progress(path / _PARTS / "kl", {})

    def check(self, args: EvaluationArguments, model: str) -> None:
        """Check that the run may write here, changing nothing.

        Raises:
            InputError: a file, a read-only place, the evaluated folder, a former evaluation that is to be kept.
        """
        overwrite, resume = args.overwrite_output_dir, args.resume
        artifacts.check_output_dir(self.path, overwrite=overwrite, resume=resume, inputs=[model])
        if overwrite or resume:
            return
        if (self.path / RESULT).exists():
            raise InputError(
                f"output_dir: {self.path} holds an evaluation; give another folder or --overwrite_output_dir"
            )
        if (self.path / _PARTS).exists():
            raise InputError(
                f"output_dir: {self.path} holds an unfinished evaluation; continue it with --resume or start again"
                " with --overwrite_output_dir"
            )

    def identify(self, work: Work, setting: Setting) -> None:
        """Say what is going to be evaluated, and remove a former evaluation that it replaces.

        Raises:
            InputError: ``resume``, but what lies there is another evaluation.
        """
        args = work.args
        answers = {
            "model": fingerprint(str(work.model.model_name_or_path)),
            "prompts": work.prompts.fingerprint(),
            **setting.as_dict(),
            **{name: getattr(args, name) for name in ("seed", "per_device_eval_batch_size", "reference_loss")},
            **{name: getattr(work.model, name) for name in ("dtype", "load_in_4bit", "attn_implementation")},
        }
        classifier = args.toxicity_model_name_or_path
        judged = {
            **answers,
            "toxicity_model": None if classifier is None else fingerprint(classifier),
            "toxicity_label": None if classifier is None else args.toxicity_label,
        }
        aligned = args.kl_model_name_or_path
        diverging = {**answers, "kl_model": None if aligned is None else fingerprint(aligned)}
        checked = {"format_schema": args.format_schema, "format_pattern": args.format_pattern}
        speed = {"measure_speed": [*args.speed_batch_sizes, args.speed_new_tokens] if args.measure_speed else None}
        self.identity = json.loads(json.dumps({**judged, **diverging, **checked, **speed}))
        self.answers, self.toxicity, self.kl = (
            Progress(self.path / _PARTS / name, identity)
            for name, identity in (("answers", answers), ("toxicity", judged), ("kl", diverging))
        )
        result = self.path / RESULT
        if result.exists() and not args.overwrite_output_dir:
            self._refuse(differing(json.loads(result.read_text(encoding="utf-8"))["identity"], self.identity))
            self.finished = True
            return
        replaced = args.overwrite_output_dir and (result.exists() or not args.resume)
        if not replaced:
            self._refuse(self.answers.differences())
        if work.accelerator.is_main_process:
            self._make_room(replaced)

    def _make_room(self, replaced: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if replaced:
            for name in (RESULT, GENERATIONS):
                (self.path / name).unlink(missing_ok=True)
        if replaced or self.answers.differences():
            self.answers.remove()
        for progress in (self.toxicity, self.kl):
            if replaced or progress.differences():
                progress.remove()

    def _refuse(self, differences: Sequence[str]) -> None:
        if differences:
            raise InputError(
                f"resume: the evaluation in {self.path} differs in {', '.join(differences)}; give another folder or"
                " --overwrite_output_dir"
            )


def finish(
    work: Work, setting: Setting, folder: EvaluationFolder, rows: Sequence[AnsweredRow], measured: dict[str, Any]
) -> dict[str, Any]:
    """Score the rows and write both files, evaluation.json last; its content.

    Raises:
        InputError: as ``score``.
    """
    metrics, notes = score(rows, work.checks)
    if work.judge is not None and work.judge.truncated_texts:
        notes.append("toxicity: some answers were longer than the classifier reads; their ends were judged")
    if work.args.reference_loss and any(row.references for row in rows) and "nll" not in metrics:
        notes.append("nll and perplexity are left out: this folder's engine does not give them")
    lines = "".join(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder.path / GENERATIONS, lines)
    result = {
        "schema": SCHEMA,
        "model": _model(work),
        "data": work.prompts.rows.source | {"prompts_sha256": work.prompts.fingerprint()},
        "prompt_template": work.prompts.template,
        "decoding": setting.as_dict() | {"seed": work.args.seed, "batch_size": work.args.per_device_eval_batch_size},
        "toxicity_model": _judge(work),
        "kl_model": None if work.aligned is None else _named(work.aligned.name),
        "metrics": metrics,
        "scale": {name: SCALE[name] for name in metrics if name in SCALE},
        "units": {name: UNITS[name] for name in metrics if name in UNITS},
        "speed": _speed(work, folder, measured),
        "notes": [*work.prompts.notes, *notes],
        "generations": {"file": GENERATIONS, "sha256": artifacts.sha256_bytes(lines.encode())},
        "versions": provenance.collect_versions(),
        "hardware": provenance.collect_hardware(),
        "git_commit": provenance.collect_git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["yunque", "evaluate", *work.argv]),
        "identity": folder.identity,
    }
    write_atomically(folder.path / RESULT, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    for progress in (folder.answers, folder.toxicity, folder.kl):
        progress.remove()
    (folder.path / _PARTS).rmdir()
    return result


def write_sweep(root: Path, settings: Sequence[Setting], folders: Sequence[EvaluationFolder]) -> None:
    """Write what the settings of one run came to beside their folders: decoding and mean of each metric."""
    runs = []
    for setting, folder in zip(settings, folders, strict=True):
        metrics = json.loads((folder.path / RESULT).read_text(encoding="utf-8"))["metrics"]
        means = {name: value["mean"] if isinstance(value, dict) else value for name, value in metrics.items()}
        runs.append({"folder": folder.path.name, "decoding": setting.as_dict(), "metrics": means})
    write_atomically(root / SWEEP, json.dumps({"schema": SCHEMA, "runs": runs}, indent=2) + "\n")


def show(console: Console, path: Path, result: dict[str, Any]) -> None:
    """Print the metrics with their intervals, speed and notes."""
    from rich import box
    from rich.table import Table

    source, decoding = result["data"], result["decoding"]
    rows = f"{source['rows']:,} rows of {source['name']} ({source['split']})"
    table = Table(title=f"{result['model']['path']}\n{rows}, {decoding['method']}", box=box.SIMPLE_HEAD)
    for header in ("Metric", "Mean [95 % interval]", "Std", "Median", "95 %"):
        table.add_column(header, justify="left" if header == "Metric" else "right")
    for name, value in result["metrics"].items():
        if not isinstance(value, dict):
            table.add_row(name, f"{value:.4g}", "", "", "")
            continue
        low, high = ("?" if value[end] is None else f"{value[end]:.4g}" for end in ("low", "high"))
        quantiles = value["quantiles"]
        shown = (value["std"], quantiles["0.5"], quantiles["0.95"])
        table.add_row(name, f"{value['mean']:.4g} [{low}, {high}]", *(f"{number:.4g}" for number in shown))
    console.print(table)
    speed = result["speed"]
    first = speed["first_token_s"]
    console.print(
        f"{speed['tokens_per_s']:,.0f} tokens/s a rank in batches of {decoding['batch_size']}, first token "
        + ("not measured" if first is None else f"{1000 * first['median']:.0f} ms")
        + f", peak memory {speed['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )
    if fresh := speed["fresh_process"]:
        rates = ", ".join(f"{rate:,.0f} at batch {size}" for size, rate in fresh["tokens_per_s"].items())
        console.print(
            f"in a fresh process: ready after {fresh['start_s']:.1f} s, peak memory"
            f" {fresh['peak_memory_bytes'] / 2**20:,.0f} MiB, tokens/s {rates}"
        )
    for note in result["notes"]:
        console.print(f"note: {note}", markup=False)
    console.print(f"written: {path / RESULT}, {path / GENERATIONS}", markup=False)


def _model(work: Work) -> dict[str, Any]:
    name = str(work.model.model_name_or_path)
    manifest = artifacts.manifest_of(name)
    is_local = Path(name).is_dir()
    return {
        "path": str(Path(name).resolve()) if is_local else name,
        "revision": None if is_local else work.model.model_revision,
        "manifest_sha256": None if manifest is None else artifacts.sha256_file(Path(name) / artifacts.MANIFEST),
        "stage": None if manifest is None else manifest.stage,
        **work.described,
    }


def _judge(work: Work) -> dict[str, Any] | None:
    judge = work.judge
    return None if judge is None else {**_named(judge.name), "label": judge.label}


def _named(name: str) -> dict[str, Any]:
    manifest = Path(name) / artifacts.MANIFEST
    return {
        "path": str(Path(name).resolve()) if Path(name).is_dir() else name,
        "manifest_sha256": artifacts.sha256_file(manifest) if manifest.is_file() else None,
    }


def fingerprint(name: str) -> str:
    """What tells a model from another under the same path: its manifest, else its files' names, sizes and times."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    if (folder / artifacts.MANIFEST).is_file():
        return artifacts.sha256_file(folder / artifacts.MANIFEST)
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    return artifacts.sha256_bytes(json.dumps(stats).encode())


def _speed(work: Work, folder: EvaluationFolder, measured: dict[str, Any]) -> dict[str, Any]:
    """Figures of this machine, which the metrics leave out: they differ from run to run."""
    records = folder.answers.records().values()
    seconds, cpu_seconds, tokens = (
        sum(record[name] for record in records) for name in ("seconds", "cpu_seconds", "new_tokens")
    )
    latencies = measured["first_token_s"]
    return {
        "generation_s": seconds,
        "new_tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "tokens_per_cpu_s": tokens / cpu_seconds if cpu_seconds else None,
        "first_token_s": {
            "median": float(np.median(latencies)),
            "p90": float(np.quantile(latencies, 0.9)),
            "num_prompts": len(latencies),
        }
        if latencies
        else None,
        "peak_memory_bytes": measured["peak_memory_bytes"],
        "fresh_process": measured["fresh_process"],
        "num_ranks": work.accelerator.num_processes,
        "num_threads": torch.get_num_threads(),
        "device": work.accelerator.device.type,
    }
