"""Two policies trained towards opposite ends of one measure, compared with each other on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from yunque.artifacts import Manifest, lineage
from yunque.errors import InputError
from yunque.evaluation.before_after import Answers, Measure, print_answers, show_change, write_rows
from yunque.metrics.bootstrap import bootstrap, paired_bootstrap
from yunque.metrics.diversity import distinct_n

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class FormerRun:
    """The answers that a finished run's folder holds, in the order of its prompts, and the run's name and KL."""

    name: str
    queries: list[str]
    answers: Answers
    kl: float


@dataclass(frozen=True)
class PolicyComparison:
    """Both policies' answers, the prompts on which they differ most first, and the metrics over them."""

    names: tuple[str, str]
    rows: list[dict[str, Any]]
    metrics: dict[str, Any]
    measure: Measure

    def write(self, folder: Path) -> list[Path]:
        """Write the rows as JSON lines and CSV, named after the two policies, and return the two paths."""
        return write_rows(self.rows, folder / "_".join(self.names))

    def print(self, console: Console, rows: int = 5) -> None:
        """Print the metrics with their 95 % intervals and the ``rows`` prompts on which the answers differ most."""
        first, second = self.names
        console.print(self._summary_table())
        shown = [
            (row["query"], row[f"response_{first}"], row[f"response_{second}"], *self._values(row))
            for row in self.rows[:rows]
        ]
        title = f"The {len(shown)} of {len(self.rows):,} prompts on which the policies differ most"
        headers = ("Prompt", first.capitalize(), second.capitalize(), self.measure.label)
        print_answers(console, title, headers, shown, [row["query"] for row in self.rows])

    def _values(self, row: Mapping[str, Any]) -> tuple[float, float]:
        first, second = (row[f"{self.measure.name}_{name}"] for name in self.names)
        return first, second

    def _summary_table(self) -> Table:
        from rich import box
        from rich.table import Table

        first, second = self.names
        table = Table(title=f"The two policies on the same {len(self.rows):,} prompts", box=box.SIMPLE_HEAD)
        for header in ("Metric", "Base", first.capitalize(), second.capitalize(), "Difference [95 % interval]"):
            table.add_column(header, justify="left" if header == "Metric" else "right")
        name = self.measure.name
        for key, label in (
            (name, f"{self.measure.label} (mean probability)"),
            ("kl", "KL to the base (nats/answer)"),
            ("distinct_2", "Distinct pairs of words (share)"),
        ):
            values = [self.metrics[f"{key}_{side}"] for side in ("base", first, second)]
            change = self.metrics.get(f"{key}_difference", {"mean": values[1] - values[2]})
            table.add_row(label, *(format(value, "z.3f") for value in values), show_change(change, "z.3f"))
        wins = self.metrics["win_rate"]
        table.add_row(f"Prompts on which {first} is ahead (share)", "", "", "", show_change(wins, "z.3f", sign=""))
        return table


def read_former_run(
    folder: str,
    option: str,
    measure: Measure,
    *,
    towards: tuple[str, str],
    same: Mapping[str, Any],
    parents: Sequence[str],
) -> FormerRun:
    """Read the run in ``folder`` for a comparison with a run of another direction.

    ``towards`` is the option that gives the direction and its value here, ``same`` are the options that both runs must
    share, ``parents`` the model folders or hub ids that both come from.

    Raises:
        InputError: not a finished run with such an option and its answers, the same direction, other options, other
            parents or parents that have changed since; the message begins with ``option``.
    """
    name, ours = towards
    try:
        ancestors = lineage(folder)
        manifest = ancestors[0].manifest
        theirs = manifest.config.get(name) if manifest is not None else None
        if manifest is None or not isinstance(theirs, str):
            raise InputError(f"{folder} is not a run with --{name}")
        if theirs == ours:
            raise InputError(f"{folder} went towards {theirs} too; give a run of the other direction")
        for key, value in same.items():
            if manifest.config.get(key) != value:
                raise InputError(f"{folder} was made with {key} {manifest.config.get(key)}, this run has {value}")
        _check_parents(folder, manifest, parents)
        for ancestor in ancestors[1:]:
            if ancestor.path in [parent["path"] for parent in manifest.parents] and ancestor.problem:
                raise InputError(f"{folder} comes from {ancestor.path}, which {ancestor.problem}")
        queries, answers = _read_answers(Path(folder), measure)
        return FormerRun(theirs, queries, answers, float(manifest.metrics["kl_final"]))
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(f"{option}: the answers in {folder} cannot be read ({reason})") from error


def check_same_prompts(former: FormerRun, queries: Sequence[str], option: str) -> None:
    """Check that ``former`` answered ``queries``, in their order.

    Raises:
        InputError: other prompts, or another number of them.
    """
    if former.queries == list(queries):
        return
    common = sum(ours == theirs for ours, theirs in zip(queries, former.queries, strict=False))
    raise InputError(
        f"{option}: that run was evaluated on other prompts ({len(former.queries):,}, of which {common:,} are those of"
        f" this run's {len(queries):,}); give both runs the same data and prompt options"
    )


def compare_policies(
    queries: Sequence[str],
    base: Answers,
    policies: Mapping[str, tuple[Answers, float]],
    *,
    measure: Measure,
    seed: int,
) -> PolicyComparison:
    """Compare two policies, by name (answers, final KL in nats per answer), with each other and with their base.

    Differences are the first policy's value less the second's; a prompt with equal values is half a win.
    """
    first, second = policies
    everyone = {"base": base} | {name: answers for name, (answers, _) in policies.items()}
    measured = {name: answers.probabilities for name, answers in everyone.items()}
    gaps = measured[first] - measured[second]
    metrics: dict[str, Any] = {}
    for name, answers in everyone.items():
        metrics[f"{measure.name}_{name}"] = float(measured[name].mean())
        metrics[f"distinct_2_{name}"] = distinct_n(answers.texts, 2)
        metrics[f"kl_{name}"] = float(policies[name][1]) if name in policies else 0.0
    difference = paired_bootstrap(measured[second], measured[first], seed=seed)
    metrics[f"{measure.name}_difference"] = difference.as_dict()
    metrics["win_rate"] = bootstrap((np.sign(gaps) + 1) / 2, seed=seed).as_dict()
    rows = [
        {"query": queries[row]}
        | {f"response_{name}": answers.texts[row] for name, answers in everyone.items()}
        | {f"{measure.name}_{name}": float(values[row]) for name, values in measured.items()}
        | {"prompt": int(row)}
        for row in np.argsort(-gaps, kind="stable")
    ]
    return PolicyComparison((first, second), rows, metrics, measure)


def _check_parents(folder: str, manifest: Manifest, parents: Sequence[str]) -> None:
    known = [parent["path"] for parent in manifest.parents]
    ours = [str(Path(name).resolve()) if Path(name).is_dir() else name for name in parents]
    for there, here in zip(known, ours, strict=False):
        if there != here:
            raise InputError(f"{folder} comes from {there}, this run from {here}; give a run with the same models")


def _read_answers(folder: Path, measure: Measure) -> tuple[list[str], Answers]:
    lines = (folder / "before_after.jsonl").read_text(encoding="utf-8").split("\n")
    rows = sorted((json.loads(line) for line in lines if line), key=lambda row: row["prompt"])
    answers = Answers(
        [row["response_after"] for row in rows],
        np.array([row["reward_after"] for row in rows], dtype=np.float64),
        np.array([row[f"{measure.name}_after"] for row in rows], dtype=np.float64),
    )
    return [row["query"] for row in rows], answers
