"""Guards: signs that a step went wrong, counted, and the run stopped where one of them stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from yunque.errors import CheckFailed
from yunque.rl.batch import Scored
from yunque.rl.config import GuardArguments

NUM_DUMPS = 3
"""Batches written per guard and run: enough to see what goes on, too few to fill a disk."""

REMEDIES = {
    "kl": "lower learning_rate or ppo_epochs, or raise init_kl_coef",
    "ratio": "lower learning_rate or ppo_epochs, or set max_grad_norm",
    "reward_std": "look whether the reward tells responses apart, or lower learning_rate",
    "empty": "set min_new_tokens, or a reward that does not favour saying nothing",
    "endless": "raise max_new_tokens, or set missing_eos_penalty or length_penalty",
}
"""Names of the guards, and what to change where one of them stopped a run."""


class Guards:
    """Looks at every finished step; the same on every rank, since it sees batches and statistics of all ranks.

    The counters belong to a run's checkpoint: a resumed run fires, dumps and stops where an unbroken one does.
    """

    def __init__(self, args: GuardArguments) -> None:
        self.args = args
        self.in_a_row = dict.fromkeys(REMEDIES, 0)
        self.dumps = dict.fromkeys(REMEDIES, 0)
        self.firing: dict[str, str] = {}

    def check(self, statistics: Mapping[str, float], batch: Sequence[Scored]) -> dict[str, float]:
        """Judge one step: ``guards/<name>`` is 1 where a guard fires, else 0; ``firing`` says what those saw."""
        self.firing = {name: seen for name, seen in self._judge(statistics, batch).items() if seen is not None}
        for name in REMEDIES:
            self.in_a_row[name] = self.in_a_row[name] + 1 if name in self.firing else 0
        return {f"guards/{name}": float(name in self.firing) for name in REMEDIES}

    def dump_paths(self, folder: Path, step: int) -> list[Path]:
        """Files that the batch of ``step`` (counted from 1) belongs into, which count as written."""
        wanted = [name for name in self.firing if self.dumps[name] < NUM_DUMPS]
        for name in wanted:
            self.dumps[name] += 1
        return [folder / f"guard_{name}_step_{step}.jsonl" for name in wanted]

    def warnings(self, step: int) -> list[str]:
        """One line for each guard that fires."""
        patience = self.args.guard_patience
        return [
            f"step {step}: guard {name}: {seen} ({self.in_a_row[name]} of {patience} in a row)"
            for name, seen in self.firing.items()
        ]

    def stop_if_patience_is_over(self, step: int, folder: Path) -> None:
        """Let the run go on, unless a guard has fired ``guard_patience`` times in a row.

        Raises:
            CheckFailed: it has; the message says what it saw and what to change.
        """
        for name, seen in self.firing.items():
            if self.in_a_row[name] >= self.args.guard_patience:
                option = "ratio_threshold" if name == "ratio" else f"guard_{name}"
                raise CheckFailed(
                    f"step {step}: guard {name} fired {self.in_a_row[name]} times in a row: {seen}; "
                    f"see guard_{name}_step_*.jsonl in {folder}, where the last checkpoint stays; "
                    f"{REMEDIES[name]}, or change {option}"
                )

    def state(self) -> dict[str, dict[str, int]]:
        """The counters, for a checkpoint's JSON."""
        return {"in_a_row": dict(self.in_a_row), "dumps": dict(self.dumps)}

    def load_state(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Take up the counters of ``state()``."""
        self.in_a_row |= state["in_a_row"]
        self.dumps |= state["dumps"]

    def _judge(self, statistics: Mapping[str, float], batch: Sequence[Scored]) -> dict[str, str | None]:
        """What each guard saw, None where all is well."""
        args = self.args
        kl, skipped, spread = (statistics[key] for key in ("objective/kl", "ppo/skipped_updates", "scores/raw_std"))
        empty = sum(not _is_visible(row.text) for row in batch) / len(batch)
        endless = sum(not row.response.finished for row in batch) / len(batch)
        # an estimate far below 0 is no better: the samples are not the policy's
        blown_up = args.guard_kl is not None and abs(kl) > args.guard_kl
        collapsed = args.guard_reward_std is not None and len(batch) > 1 and spread < args.guard_reward_std
        return {
            "kl": f"KL of {kl:.1f} nats per response" if blown_up else None,
            "ratio": f"{skipped:.0f} updates skipped over ratio_threshold" if skipped > 0 else None,
            "reward_std": f"the {len(batch)} scores differ by {spread:.1g} only" if collapsed else None,
            "empty": _share(empty, args.guard_empty, "show no text"),
            "endless": _share(endless, args.guard_endless, "were cut off by their length limit"),
        }


def remove_dumps(folder: Path, after_step: int) -> None:
    """Remove batches that a former run, or the steps a resumed one does again, left in ``folder``."""
    for path in [*folder.glob("guard_*_step_*.jsonl"), *folder.glob("nonfinite_step_*.jsonl")]:
        number = path.stem.rpartition("_")[2]
        if number.isdigit() and int(number) > after_step:
            path.unlink()


def _share(share: float, limit: float | None, what: str) -> str | None:
    return f"{share:.0%} of the responses {what}" if limit is not None and share >= limit else None


def _is_visible(text: str) -> bool:
    """Whether anything of a text can be seen: control and zero-width characters cannot."""
    return any(char.isprintable() and not char.isspace() for char in text)
