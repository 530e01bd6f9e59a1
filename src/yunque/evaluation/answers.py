"""Answers of a policy and of its reference to held-out prompts, scored, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from yunque.evaluation.before_after import Answers
from yunque.models.arguments import GenerationArguments
from yunque.models.policy import Policy, Reference
from yunque.rl.loop import Prompts
from yunque.rl.rewards import Reward
from yunque.rl.rollout import Response, generate
from yunque.rl.trainer import PPOTrainer

FIRST_SAMPLE = 2**62  # random streams of held-out prompts lie beyond those of training


class HeldOut:
    """Held-out prompts and how to answer them; both models draw from the same random streams, as pairs should.

    What the answers' probabilities mean (toxicity, sentiment) follows from the label that ``reward`` measures.
    ``watch`` collects the scores of its unseen scorer, if it has one: name of the answers -> (num_prompts,).
    """

    def __init__(
        self,
        trainer: PPOTrainer,
        prompts: Prompts,
        reward: Reward,
        decode: Callable[[Sequence[int]], str],
        generation: GenerationArguments,
        batch_size: int,
    ) -> None:
        self.trainer, self.prompts, self.reward, self.decode = trainer, prompts, reward, decode
        self.generation, self.batch_size = generation, batch_size
        self.watch: dict[str, np.ndarray] = {}
        self.rows = list(trainer.share(range(len(prompts.texts))))

    def answers(self, model: nn.Module, name: str) -> tuple[Answers, list[Response]]:
        """Answers of ``model`` to all prompts on every rank, and this rank's responses."""
        responses: list[Response] = []
        accelerator = self.trainer.accelerator
        for rows in self._batches(f"answers {name}"):
            with accelerator.autocast():
                responses += generate(
                    model,
                    self.trainer.adapter,
                    [self.prompts.input_ids[row] for row in rows],
                    self.generation,
                    seed=self.trainer.seed,
                    samples=[FIRST_SAMPLE + row for row in rows],
                    device=accelerator.device,
                )
        texts = [self.decode(response.tokens) for response in responses]
        num_tokens = [len(response.tokens) for response in responses]
        queries = [self.prompts.texts[row] for row in self.rows]
        given = self.reward.scores(queries, texts, num_tokens, self.prompts.columns_of(self.rows))
        assert given.probabilities is not None, "recipes refuse a reward that measures nothing"
        scored = self.trainer.gather(list(zip(texts, given.total.tolist(), given.probabilities.tolist(), strict=True)))
        all_texts, rewards, probabilities = (list(column) for column in zip(*scored, strict=True))
        if given.watch is not None:
            self.watch[name] = np.array(self.trainer.gather(given.watch.tolist()))
        return Answers(all_texts, np.array(rewards), np.array(probabilities)), responses

    def before_and_after(self) -> tuple[Answers, Answers, float]:
        """Answers of the reference and of the policy, and the policy's final KL to the reference in nats per answer."""
        with self.trainer.whole() as (policy, reference):
            with reference.model() as model:
                before, _ = self.answers(model, "before")
            after, responses = self.answers(policy.model, "after")
            return before, after, self.divergence(policy, reference, responses)

    @torch.no_grad()
    def divergence(self, policy: Policy, reference: Reference, responses: Sequence[Response]) -> float:
        """Mean over all prompts of log p(response) - log r(response), in nats: KL(policy || reference) by its samples.

        ``responses`` are this rank's, sampled from the policy.
        """
        kl: list[float] = []
        accelerator, temperature = self.trainer.accelerator, self.generation.temperature
        for rows in self._batches("kl"):
            here = [responses[row - self.rows[0]].tokens for row in rows]
            queries = [self.prompts.input_ids[row] for row in rows]
            batch = self.trainer.adapter.scoring_batch(queries, here, accelerator.device)
            with accelerator.autocast():
                ours, theirs = policy(batch, temperature), reference.score(batch, temperature)
            kl += ((ours.logprobs_BR - theirs.logprobs_BR) * batch.mask_BR).sum(dim=1).tolist()
        return float(torch.tensor(self.trainer.gather(kl), dtype=torch.float64).mean())

    def _batches(self, name: str) -> list[list[int]]:
        batches = [self.rows[start : start + self.batch_size] for start in range(0, len(self.rows), self.batch_size)]
        return tqdm(batches, desc=name, unit="batch", leave=False, disable=not self.trainer.accelerator.is_main_process)
