"""The end of every alignment run: model folder with metrics, plots and answers; what the user is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yunque.artifacts import LOG, save_model_folder
from yunque.distributed.arguments import RunArguments
from yunque.evaluation.answers import HeldOut
from yunque.evaluation.before_after import BeforeAfter
from yunque.evaluation.plots import plot_before_after, plot_reward_hacking, plot_training
from yunque.models.loading import save_model
from yunque.rl.log import read_log, summarize_log
from yunque.rl.watch import find_parting, watch_metrics, watched

if TYPE_CHECKING:
    from rich.console import Console


def save_aligned(
    run: RunArguments,
    model: Any,
    tokenizer: Any,
    held_out: HeldOut,
    result: BeforeAfter,
    console: Console,
    *,
    stage: str = "ppo",
    merge: bool,
    parents: Sequence[str],
    data: Sequence[Mapping[str, Any]],
    prompt_template: str | None,
    config: Mapping[str, Any],
    truncated_texts: int,
    metrics: Mapping[str, Any] | None = None,
    also: Callable[[Path], object] | None = None,
) -> None:
    """Write the finished run into its output folder and print the comparison; ``also`` adds files of the recipe's own.

    With an unseen scorer the two reward curves are compared, plotted and judged.
    """
    folder = Path(run.output_dir)
    metrics = {**result.metrics, **(metrics or {}), **summarize_log(folder / LOG)}
    unseen = bool(held_out.watch)
    if unseen:
        steps, rewards, opinions = watched(read_log(folder / LOG))
        parting = find_parting(rewards, opinions, steps)
        metrics |= watch_metrics(parting, held_out.watch["before"], held_out.watch["after"], seed=run.seed)

    def write(staging: Path) -> None:
        save_model(model, tokenizer, staging, merge=merge)
        result.write(staging)
        plot_training(folder / LOG, staging)
        plot_before_after(result, staging)
        if unseen:
            plot_reward_hacking(steps, rewards, opinions, parting, staging)
        if also is not None:
            also(staging)

    save_model_folder(
        folder,
        write,
        stage=stage,
        parents=parents,
        data=data,
        prompt_template=prompt_template,
        seed=run.seed,
        config=config,
        metrics=metrics,
    )
    result.print(console)
    if unseen:
        seen = parting or "the unseen scorer did not part from the reward"
        console.print(f"Reward hacking watch: {seen} (reward_hacking.png)")
    if truncated_texts:
        console.print(f"{truncated_texts:,} texts were longer than the classifier reads and lost their start")
    console.print(f"Model, plots (reward.png, kl.png, loss.png) and answers (before_after.csv): {folder}")
