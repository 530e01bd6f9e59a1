"""The training loop: sample responses, score them, update the policy, log, checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from yunque.artifacts import CHECKPOINTS, LOG
from yunque.data.loading import ROW
from yunque.distributed import rehearsal
from yunque.distributed.arguments import RunArguments
from yunque.distributed.checkpoint import Checkpoints, Score, StopSignal, Training
from yunque.distributed.identity import check_same_run, check_steps, run_identity
from yunque.errors import InputError, Stopped, disk_full, is_disk_full
from yunque.models.arguments import GenerationArguments
from yunque.rl.batch import Scored, dump, score_statistics
from yunque.rl.config import GuardArguments, RewardArguments
from yunque.rl.guards import Guards, remove_dumps
from yunque.rl.log import RunLog
from yunque.rl.rewards import Columns, Reward
from yunque.rl.rollout import Response, generate
from yunque.rl.score_scaling import ScoreScaler
from yunque.rl.statistics import peak_memory_bytes
from yunque.rl.trainer import NonFiniteError, PPOTrainer, Sampled


@dataclass(frozen=True)
class Prompts:
    """What responses are sampled for: token ids and texts of the same queries, and the groups they belong to if any.

    ``columns`` are those of the data set, which rewards may read.
    """

    input_ids: Sequence[Sequence[int]]
    texts: Sequence[str]
    groups: Sequence[str] | None = None
    columns: Columns = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: Any, groups: Sequence[str] | None = None) -> Prompts:
        """Prompts of a prepared data set, with the columns that its loading kept."""
        rows = [json.loads(row) for row in dataset[ROW]] if ROW in dataset.column_names else []
        columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
        return cls(dataset["input_ids"], dataset["query"], groups, columns)

    def columns_of(self, rows: Sequence[int]) -> Columns:
        """The columns of these rows."""
        return {name: [values[row] for row in rows] for name, values in self.columns.items()}

    def rows(self, step: int, batch_size: int, seed: int) -> list[int]:
        """Row numbers of one step's batch: every epoch its own permutation, batches running over epoch ends.

        A function of its arguments alone, so that a resumed run goes on where the former one stopped.
        """
        epochs: dict[int, np.ndarray] = {}
        rows = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            epoch, index = divmod(position, len(self.texts))
            if epoch not in epochs:
                epochs[epoch] = np.random.default_rng([seed, epoch]).permutation(len(self.texts))
            rows.append(int(epochs[epoch][index]))
        return rows


class TrainingLoop:
    """Ties prompts, trainer and reward into a run that can be stopped and resumed at any step."""

    def __init__(
        self,
        trainer: PPOTrainer,
        prompts: Prompts,
        reward: Reward,
        decode: Callable[[Sequence[int]], str],
        *,
        generation: GenerationArguments,
        run: RunArguments,
        total_steps: int,
        resolved_config: Mapping[str, Any],
        scaler: ScoreScaler | None = None,
        guards: Guards | None = None,
    ) -> None:
        self.trainer, self.prompts, self.reward, self.decode = trainer, prompts, reward, decode
        self.generation, self.run, self.total_steps = generation, run, total_steps
        self.identity = run_identity(resolved_config)
        self.scaler = scaler or ScoreScaler(RewardArguments())
        self.guards = guards or Guards(GuardArguments())
        self.folder = Path(run.output_dir)
        self.accelerator = trainer.accelerator
        self.checkpoints = Checkpoints(
            self.folder / CHECKPOINTS, self.accelerator, keep=run.save_total_limit, asynchronous=run.async_save
        )
        self._rewards: list[float] = []  # of the steps since the last checkpoint

    def train(self) -> None:
        """Run the remaining steps.

        Raises:
            Stopped: a signal came; the state of the last finished step is saved.
            NonFiniteError: NaN or infinity; the batch that met it lies in ``output_dir``.
            CheckFailed: a guard fired ``guard_patience`` times in a row; its batches lie in ``output_dir``.
            InputError: ``resume`` finds a checkpoint of another configuration; a reward function fails.
        """
        first = self._resume() if self.run.resume else 0
        if self.accelerator.is_main_process:
            remove_dumps(self.folder, after_step=first)
        try:
            self._train(first)
        except Exception as error:
            if is_disk_full(error):
                raise disk_full(self.folder, error) from error
            raise

    def _train(self, first: int) -> None:
        log = RunLog(self.folder / LOG, self.accelerator, first_step=first, total_steps=self.total_steps)
        with log, StopSignal() as signal, self.checkpoints:
            for step in range(first, self.total_steps):
                statistics = self.step(step)
                log.write(step + 1, statistics)
                self._rewards.append(statistics["scores/raw_mean"])
                done = step + 1
                for warning in self.guards.warnings(done):
                    log.warn(warning)
                self.guards.stop_if_patience_is_over(done, self.folder)
                stop = signal.agreed(self.accelerator)
                if stop or done % self.run.save_steps == 0 or done == self.total_steps:
                    self._save(done)
                if stop:
                    self.checkpoints.mark_stopped(done, self.total_steps)
                    raise Stopped(f"saved step {done} of {self.total_steps} in {self.folder}; go on with --resume")

    def step(self, step: int) -> dict[str, float]:
        """Sample, score and learn from one batch."""
        started = time.perf_counter()
        rows = self._rows(step)
        queries = [self.prompts.input_ids[row] for row in rows]
        samples = [step * len(rows) + index for index in range(len(rows))]
        responses_here = self._sample(self.trainer.share(queries), self.trainer.share(samples))
        sampled = time.perf_counter()
        batch = self._score(self.trainer.share(rows), responses_here)
        scores = self.scaler([row.score for row in batch])
        scored = time.perf_counter()
        try:
            statistics = self.trainer.step(
                queries,
                [row.response.tokens for row in batch],
                scores,
                groups=self.prompts.groups and [self.prompts.groups[row] for row in rows],
                sampled=_sampled([row.response for row in batch]),
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; see {self._dump(f'nonfinite_step_{step + 1}.jsonl', batch)}") from error
        statistics |= score_statistics(batch)
        statistics |= self.guards.check(statistics, batch)
        for path in self.guards.dump_paths(self.folder, step + 1):
            self._dump(path.name, batch)
        elapsed = time.perf_counter() - started
        return statistics | {
            "epoch": (step + 1) * len(rows) / self.trainer.config.num_generations / len(self.prompts.texts),
            "tokens/responses_unfinished": float(np.mean([not row.response.finished for row in batch])),
            "time/ppo/generate": sampled - started,
            "time/ppo/reward": scored - sampled,
            "samples_per_s": len(rows) / elapsed,
            "peak_memory_bytes": float(peak_memory_bytes(self.accelerator.device)),
        }

    def _rows(self, step: int) -> list[int]:
        """Row numbers of one step's prompts, each repeated for the responses it gets."""
        config = self.trainer.config
        rows = self.prompts.rows(step, config.batch_size // config.num_generations, self.run.seed)
        return [row for row in rows for _ in range(config.num_generations)]

    def _sample(self, queries: Sequence[Sequence[int]], samples: Sequence[int]) -> list[Response]:
        with self.trainer.whole(reference=False) as (policy, _), self.accelerator.autocast():
            answers = generate(
                policy.model,
                self.trainer.adapter,
                queries,
                self.generation,
                seed=self.run.seed,
                samples=samples,
                shortest_limit=self.trainer.config.max_new_tokens_low,
                device=self.accelerator.device,
                value_head=policy.v_head,
            )
        return rehearsal.replay(samples, answers)

    def _score(self, rows: Sequence[int], responses: Sequence[Response]) -> list[Scored]:
        """Score this rank's responses to the prompts of ``rows`` and return those of all ranks.

        Raises:
            InputError: a reward function failed, on any rank; every rank raises it, so that none waits for another.
        """
        try:
            here: Sequence[Scored | InputError] = self._score_here(rows, responses)
        except InputError as error:
            here = [error]
        gathered = self.trainer.gather(here)
        for row in gathered:
            if isinstance(row, InputError):
                raise row
        return [row for row in gathered if isinstance(row, Scored)]

    def _score_here(self, rows: Sequence[int], responses: Sequence[Response]) -> list[Scored]:
        queries = [self.prompts.texts[row] for row in rows]
        texts = [self.decode(response.tokens) for response in responses]
        num_tokens = [len(response.tokens) for response in responses]
        given = self.reward.scores(queries, texts, num_tokens, self.prompts.columns_of(rows))
        scores = given.total.astype(float)
        penalty = self.trainer.config.missing_eos_penalty
        if penalty is not None:
            scores -= penalty * np.array([not response.finished for response in responses])
        parts = [{name: float(part[row]) for name, part in given.parts.items()} for row in range(len(texts))]
        watch = [None] * len(texts) if given.watch is None else given.watch.tolist()
        columns = zip(queries, responses, texts, scores.tolist(), parts, watch, strict=True)
        return [Scored(*row) for row in columns]

    def _save(self, step: int) -> None:
        state = {
            "kl_coef": self.trainer.kl_controller.value,
            "score_moments": self.scaler.state(),
            "guards": self.guards.state(),
            "identity": self.identity,
        }
        score = Score("reward", float(np.mean(self._rewards)))
        self._rewards.clear()
        self.checkpoints.save(step, self._training(), state, score=score)

    def _training(self) -> Training:
        return Training(self.trainer.policy, self.trainer.optimizer, [self.trainer.scheduler])

    def _resume(self) -> int:
        found = self.checkpoints.newest()
        if found is None:
            return 0
        state = found.state
        check_same_run(self.identity, state.get("identity", {}), found.path)
        check_steps(found.step, self.total_steps, found.path)
        self.checkpoints.load(found, self._training())
        self.trainer.kl_controller.value = state["kl_coef"]
        self.scaler.load_state(state["score_moments"])
        self.guards.load_state(state["guards"])
        self.trainer.steps_done = found.step
        return found.step

    def _dump(self, name: str, batch: Sequence[Scored]) -> Path:
        path = self.folder / name
        if self.accelerator.is_main_process:
            dump(path, batch)
        return path


def _sampled(responses: Sequence[Response]) -> Sampled | None:
    """What decoding computed of a batch, or None where a forward pass is more exact."""
    logprobs = [response.logprobs for response in responses if response.logprobs is not None]
    values = [response.values for response in responses if response.values is not None]
    return Sampled(logprobs, values or None) if len(logprobs) == len(responses) else None
