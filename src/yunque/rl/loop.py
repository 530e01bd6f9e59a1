"""The training loop: sample responses, score them, update the policy, log, checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yunque.artifacts import CHECKPOINTS, LOG
from yunque.distributed.arguments import RunArguments
from yunque.distributed.checkpoint import Checkpoints, StopSignal
from yunque.errors import InputError, Stopped, disk_full, is_disk_full
from yunque.models.arguments import GenerationArguments
from yunque.rl.log import RunLog
from yunque.rl.rollout import Response, generate
from yunque.rl.statistics import peak_memory_bytes
from yunque.rl.trainer import NonFiniteError, PPOTrainer

Reward = Callable[[Sequence[str], Sequence[str]], np.ndarray]

_MAY_CHANGE = {"output_dir", "overwrite_output_dir", "resume", "save_steps", "save_total_limit", "report_to"}
"""Options that a resumed run may set anew: none of them changes the curve."""


@dataclass(frozen=True)
class Prompts:
    """What responses are sampled for: token ids and texts of the same queries."""

    input_ids: Sequence[Sequence[int]]
    texts: Sequence[str]

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
    ) -> None:
        self.trainer, self.prompts, self.reward, self.decode = trainer, prompts, reward, decode
        self.generation, self.run, self.total_steps = generation, run, total_steps
        self.resolved_config = dict(resolved_config)
        self.folder = Path(run.output_dir)
        self.accelerator = trainer.accelerator
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, self.accelerator, keep=run.save_total_limit)

    def train(self) -> None:
        """Run the remaining steps.

        Raises:
            Stopped: a signal came; the state of the last finished step is saved.
            NonFiniteError: NaN or infinity; the batch that met it lies in ``output_dir``.
            InputError: ``resume`` finds a checkpoint of another configuration.
        """
        first = self._resume() if self.run.resume else 0
        try:
            self._train(first)
        except Exception as error:
            if is_disk_full(error):
                raise disk_full(self.folder, error) from error
            raise

    def _train(self, first: int) -> None:
        log = RunLog(self.folder / LOG, self.accelerator, first_step=first, total_steps=self.total_steps)
        with log, StopSignal() as signal:
            for step in range(first, self.total_steps):
                log.write(step + 1, self.step(step))
                done = step + 1
                stop = signal.agreed(self.accelerator)
                if stop or done % self.run.save_steps == 0:
                    self._save(done)
                if stop and done < self.total_steps:
                    raise Stopped(f"saved step {done} of {self.total_steps} in {self.folder}; go on with --resume")

    def step(self, step: int) -> dict[str, float]:
        """Sample, score and learn from one batch."""
        started = time.perf_counter()
        rows = self.prompts.rows(step, self.trainer.config.batch_size, self.run.seed)
        queries = [self.prompts.input_ids[row] for row in rows]
        samples = [step * len(rows) + index for index in range(len(rows))]
        responses_here = self._sample(self.trainer.share(queries), self.trainer.share(samples))
        sampled = time.perf_counter()
        scores_here = self._score(self.trainer.share([self.prompts.texts[row] for row in rows]), responses_here)
        responses, scores = self.trainer.gather(responses_here), self.trainer.gather(scores_here)
        scored = time.perf_counter()
        try:
            statistics = self.trainer.step(queries, [response.tokens for response in responses], scores)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; see {self._dump(step, rows, responses, scores)}") from error
        elapsed = time.perf_counter() - started
        return statistics | {
            "epoch": (step + 1) * len(rows) / len(self.prompts.texts),
            "tokens/responses_unfinished": float(np.mean([not response.finished for response in responses])),
            "time/ppo/generate": sampled - started,
            "time/ppo/reward": scored - sampled,
            "samples_per_s": len(rows) / elapsed,
            "peak_memory_bytes": float(peak_memory_bytes(self.accelerator.device)),
        }

    def _sample(self, queries: Sequence[Sequence[int]], samples: Sequence[int]) -> list[Response]:
        with self.accelerator.autocast():
            return generate(
                self.trainer.unwrapped.model,
                self.trainer.adapter,
                queries,
                self.generation,
                seed=self.run.seed,
                samples=samples,
                shortest_limit=self.trainer.config.max_new_tokens_low,
                device=self.accelerator.device,
            )

    def _score(self, queries: Sequence[str], responses: Sequence[Response]) -> list[float]:
        scores = self.reward(queries, [self.decode(response.tokens) for response in responses]).astype(float)
        penalty = self.trainer.config.missing_eos_penalty
        if penalty is not None:
            scores -= penalty * np.array([not response.finished for response in responses])
        return scores.tolist()

    def _save(self, step: int) -> None:
        state = {"kl_coef": self.trainer.kl_controller.value, "config": self.resolved_config}
        self.checkpoints.save(step, state)

    def _resume(self) -> int:
        state = self.checkpoints.latest()
        if state is None:
            return 0
        for name, value in json.loads(json.dumps(self.resolved_config)).items():
            before = state["config"].get(name)
            if name not in _MAY_CHANGE and before != value:
                raise InputError(
                    f"{name}: the checkpoint in {self.folder} was made with {before}, now it is {value}; "
                    f"set it back or start afresh with --overwrite_output_dir"
                )
        self.checkpoints.load(state["step"])
        self.trainer.kl_controller.value = state["kl_coef"]
        self.trainer.steps_done = state["step"]
        return state["step"]

    def _dump(self, step: int, rows: Sequence[int], responses: Sequence[Response], scores: Sequence[float]) -> Path:
        path = self.folder / f"nonfinite_step_{step + 1}.jsonl"
        if self.accelerator.is_main_process:
            with path.open("w", encoding="utf-8") as file:
                for row, response, score in zip(rows, responses, scores, strict=True):
                    record = {"query": self.prompts.texts[row], "tokens": response.tokens, "score": score}
                    file.write(json.dumps(record) + "\n")
        return path
