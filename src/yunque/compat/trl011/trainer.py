"""``PPOTrainer`` of TRL 0.11, over the engine of ``yunque.rl``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object
from datasets import Dataset
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from yunque.compat.trl011 import steps
from yunque.compat.trl011.config import PPOConfig
from yunque.compat.trl011.core import PPODecorators, convert_to_scalar, set_seed, stats_to_np
from yunque.compat.trl011.engine import WrappedReference, build_engine, shared_trained_weights
from yunque.compat.trl011.generation import generate_batched, generate_one
from yunque.compat.trl011.models import SUPPORTED_ARCHITECTURES, create_reference_model, upload
from yunque.compat.trl011.pieces import PPOPieces
from yunque.compat.trl011.pipeline_rewards import warn_of_positions, watch_pipelines
from yunque.errors import InputError
from yunque.rl.config import RewardArguments
from yunque.rl.kl import AdaptiveKLController, FixedKLController
from yunque.rl.score_scaling import ScoreScaler

__all__ = ["AdaptiveKLController", "FixedKLController", "PPOConfig", "PPOTrainer"]

_MODEL_CARD = """---
library_name: transformers
tags:
- ppo
- reinforcement-learning
---

# {model_name}

Trained by PPO with `yunque.compat.trl011`. Load it with its value head:

```python
from yunque.compat.trl011 import {wrapper}

model = {wrapper}.from_pretrained("{path}")
```
"""


class PPOTrainer(PPOPieces):
    """PPO by TRL 0.11's interface: ``generate``, ``step`` on lists of tensors, ``log_stats``, ``dataloader``."""

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: Any = None,
        ref_model: Any = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[..., Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: LRScheduler | None = None,
        training_data_collator: Callable[..., Any] | None = None,
    ) -> None:
        config = _check_arguments(config, model, ref_model, tokenizer, dataset, lr_scheduler)
        set_seed(config.seed)
        watch_pipelines()
        self.config, self.model, self.tokenizer, self.dataset = config, model, tokenizer, dataset
        self.is_encoder_decoder, self.is_peft_model = model.is_encoder_decoder, model.is_peft_model
        self.accelerator = self._start_accelerator()
        self.is_distributed = self.accelerator.num_processes > 1
        self.current_device = self.accelerator.device
        self._warn_of_odd_models(ref_model, num_shared_layers)
        if ref_model is None and not self.is_peft_model:
            ref_model = create_reference_model(model, num_shared_layers)
        self.ref_model = ref_model
        self.data_collator = training_data_collator or DataCollatorForLanguageModeling(tokenizer, mlm=False)
        self._by_pieces = config.strict or training_data_collator is not None or _has_own_pieces(type(self))
        self._reference = WrappedReference(model, ref_model, config.strict)
        self._engine = build_engine(config, model, tokenizer, self._reference, self.accelerator, optimizer)
        self.optimizer, self.kl_ctl = self._engine.optimizer, self._engine.kl_controller
        self.lr_scheduler = None if lr_scheduler is None else self.accelerator.prepare(lr_scheduler)
        self.dataloader: Any = None
        if dataset is None:
            warnings.warn(
                "dataset: none is given; make your own batches of config.batch_size, and prepare their dataloader "
                "with ppo_trainer.accelerator.prepare on several processes",
                UserWarning,
                stacklevel=2,
            )
        else:
            self.dataloader = self.accelerator.prepare(self.prepare_dataloader(dataset, data_collator))
        scaling: dict[str, Any] = {"use_score_scaling": config.use_score_scaling, "score_clip": config.score_clip}
        scaling["use_score_norm"] = config.use_score_norm and config.use_score_scaling
        self.scaler = ScoreScaler(RewardArguments(**scaling))
        self.current_step, self.compare_step, self.highest_reward = 0, 0, -float("inf")
        PPODecorators.optimize_device_cache = config.optimize_device_cache

    # --- data ---

    def prepare_dataloader(self, dataset: Any, data_collator: Callable[..., Any] | None = None) -> Any:
        """Batches of ``batch_size``, shuffled, the last incomplete one left out.

        Columns that neither the model nor the log knows are removed from a ``datasets.Dataset``, unless
        ``remove_unused_columns`` is off.
        """
        if isinstance(dataset, Dataset) and self.config.remove_unused_columns:
            known = {*inspect.signature(self.model.forward).parameters, "label", "query", "response"}
            dataset = dataset.remove_columns([name for name in dataset.column_names if name not in known])
        return torch.utils.data.DataLoader(
            dataset, batch_size=self.config.batch_size, collate_fn=data_collator, shuffle=True, drop_last=True
        )

    # --- sampling ---

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Generate after one query (Q,), giving (1, tokens), or after a list of them, giving a list of (tokens,).

        Decoder-only answers begin with their query if ``return_prompt``; encoder-decoder ones always begin with the
        start token. With ``generate_ref_response`` the reference's answers come second.

        Raises:
            ValueError: a query is not one-dimensional.
        """
        options: dict[str, Any] = {
            "length_sampler": length_sampler,
            "batch_size": batch_size,
            "return_prompt": return_prompt,
            **generation_kwargs,
        }
        response = self._generate(self.model, query_tensor, **options)
        if not generate_ref_response:
            return response
        with self.reference_model() as reference:
            return response, self._generate(reference, query_tensor, **options)

    def _generate(
        self,
        model: Any,
        queries: Tensor | list[Tensor],
        *,
        length_sampler: Callable[[], int] | None,
        batch_size: int,
        return_prompt: bool,
        pad_to_multiple_of: int | None = None,
        remove_padding: bool = True,
        **options: Any,
    ) -> Any:
        if isinstance(queries, list):
            return generate_batched(
                model,
                self.tokenizer,
                queries,
                options,
                is_encoder_decoder=self.is_encoder_decoder,
                device=self.current_device,
                length_sampler=length_sampler,
                batch_size=batch_size,
                return_prompt=return_prompt,
                pad_to_multiple_of=pad_to_multiple_of,
                remove_padding=remove_padding,
            )
        if queries.dim() != 1:
            raise ValueError(f"query_tensor: give a tensor of shape (tokens,) or a list of them, not {queries.shape}")
        if length_sampler is not None:
            options["max_new_tokens"] = length_sampler()
        response = generate_one(model, queries.to(self.current_device), options)
        return response if return_prompt or self.is_encoder_decoder else response[:, len(queries) :]

    def reference_model(self) -> AbstractContextManager[Any]:
        """The reference with a value head, for the time of the context."""
        return self._reference.wrapper()

    # --- learning ---

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """Update the policy from this process' batch of queries, responses (both (tokens,)) and scores (one number).

        ``response_masks`` switches response tokens off (0). Returns TRL's statistics.

        Raises:
            ValueError: not ``batch_size`` tensors of the right shapes.
            NonFiniteError: NaN or infinity; no weight has been moved by it.
        """
        queries, responses, scores, response_masks = self._step_safety_checker(
            self.config.batch_size, queries, responses, scores, response_masks
        )
        warn_of_positions([float(score) for score in scores])
        all_scores = self.scaler(self._engine.gather([float(score) for score in scores]))
        self._push_if_best(sum(all_scores) / len(all_scores))
        with PPODecorators.empty_device_cache():
            if self._by_pieces or _switches_off(response_masks):
                self._refuse_several_processes()
                here = torch.tensor(self._engine.share(all_scores), device=self.current_device)
                stats = steps.step_by_pieces(self, queries, responses, here, response_masks)
            else:
                stats = self._engine_step(queries, responses, all_scores)
        stats = stats_to_np(stats)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return stats if self.config.log_with == "wandb" else convert_to_scalar(stats)

    def _step_safety_checker(
        self,
        batch_size: int | None,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        masks: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None]:
        """Check the arguments of ``step`` and bring them to the device, scores as tensors of no dimension.

        Raises:
            ValueError: a list is no list of tensors, of the wrong length, or a tensor has a wrong shape.
        """
        given = {"queries": queries, "responses": responses, "scores": scores}
        given |= {} if masks is None else {"response_masks": masks}
        for name, tensors in given.items():
            _check_tensors(name, tensors, batch_size)
        for index, (response, mask) in enumerate(zip(responses, masks or responses, strict=True)):
            if len(response) != len(mask):
                raise ValueError(f"response_masks: number {index} has {len(mask)} tokens, its response {len(response)}")
        device = self.current_device
        queries, responses = [row.to(device) for row in queries], [row.to(device) for row in responses]
        scores = [score.to(device).squeeze() for score in scores]
        return queries, responses, scores, masks and [mask.to(device) for mask in masks]

    def _engine_step(self, queries: list[Tensor], responses: list[Tensor], scores: Sequence[float]) -> dict[str, Any]:
        """Hand the batches of all processes to the engine, responses without the decoder's start token."""
        if self.is_encoder_decoder:
            responses = [self._without_start(response) for response in responses]
        for index, response in enumerate(responses):
            if not len(response):
                raise ValueError(f"responses: number {index} has no token but the decoder's start token")
        engine = self._engine
        engine.config = self.config.engine_config(self.accelerator.num_processes)
        engine.kl_controller, engine.optimizer = self.kl_ctl, self.optimizer
        all_queries = engine.gather([row.tolist() for row in queries])
        all_responses = engine.gather([row.tolist() for row in responses])
        stats = engine.step(all_queries, all_responses, scores)
        arrays = steps.rollout_arrays(engine.rollout, engine.advantages_BR)
        # the engine keeps its ratios as means over tokens, and counts rewards and advantages as part of its forward
        arrays["ppo/policy/ratio"] = torch.tensor([[stats["ppo/policy/ratio"]]])
        parts = {f"time/ppo/{part}": 0.0 for part in ("compute_rewards", "compute_advantages", "calc_stats")}
        return stats | arrays | parts

    def record_step_stats(self, kl_coef: float, **data: Any) -> dict[str, Any]:
        """TRL's statistics, from the tensors of a step."""
        return steps.record_step_stats(kl_coef, data)

    def _start_accelerator(self) -> Accelerator:
        """Start Accelerate and its tracker, and note in the configuration what is known now."""
        config = self.config
        accelerator = Accelerator(
            log_with=config.log_with,
            project_config=ProjectConfiguration(**config.project_kwargs),
            **config.accelerator_kwargs,
        )
        ranks = config.world_size = accelerator.num_processes
        config.global_batch_size = config.batch_size * ranks
        config.global_backward_batch_size = config.mini_batch_size * config.gradient_accumulation_steps * ranks
        config.is_encoder_decoder, config.is_peft_model = self.is_encoder_decoder, self.is_peft_model
        record = config.to_dict()
        accelerator.init_trackers(
            config.tracker_project_name,
            config=record if config.log_with == "tensorboard" else {"trl_ppo_trainer_config": record},
            init_kwargs=config.tracker_kwargs,
        )
        return accelerator

    def _warn_of_odd_models(self, ref_model: Any, num_shared_layers: int | None) -> None:
        if num_shared_layers is not None and (ref_model is not None or self.is_peft_model):
            warnings.warn(
                "num_shared_layers: without effect where ref_model is given, or with PEFT", UserWarning, stacklevel=3
            )
        if not any(weight.requires_grad for weight in self.model.pretrained_model.parameters()):
            warnings.warn(
                "model: nothing but its value head trains; load an adapter with is_trainable=True",
                UserWarning,
                stacklevel=3,
            )

    def _refuse_several_processes(self) -> None:
        if self.is_distributed:
            raise InputError(
                "strict: TRL's arithmetic, response_masks with zeros and own pieces of a step run on one process; "
                "leave them out on several"
            )

    # --- logging and saving ---

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: list[Tensor] | Tensor,
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Send the statistics of a step to the tracker, and with W&B a table of queries, responses and rewards.

        Raises:
            ValueError: ``batch`` lacks a column that W&B is to show.
        """
        columns = list(columns_to_log)
        here = torch.stack([torch.as_tensor(reward).float().reshape(()) for reward in rewards])
        all_rewards = self.accelerator.gather(here.to(self.current_device))
        texts = self._columns(batch, columns) if self.config.log_with == "wandb" else []
        if not self.accelerator.is_main_process:
            return
        if self.config.log_with is not None and not {"query", "response"} & batch.keys():
            warnings.warn("batch: neither query nor response is there to log", UserWarning, stacklevel=2)
        logs = dict(stats)
        if texts:
            import wandb

            rows = [list(row) for row in zip(*texts, all_rewards.tolist(), strict=True)]
            logs["game_log"] = wandb.Table(columns=[*columns, "reward"], rows=rows)
        logs["env/reward_mean"], logs["env/reward_std"] = all_rewards.mean().item(), all_rewards.std().item()
        logs["env/reward_dist"] = all_rewards.cpu().numpy()
        if self.config.log_with == "tensorboard":
            self.current_step += 1
            logs = {name: value for name, value in logs.items() if isinstance(value, int | float | str)}
        self.accelerator.log(logs, step=self.current_step if self.config.log_with == "tensorboard" else None)

    def _columns(self, batch: dict[str, Any], names: Sequence[str]) -> list[list[Any]]:
        missing = [name for name in names if name not in batch]
        if missing:
            raise ValueError(f"columns_to_log: {', '.join(missing)} not in the batch, which has {', '.join(batch)}")
        columns = [list(batch[name]) for name in names]
        return [gather_object(column) for column in columns] if self.is_distributed else columns

    def create_model_card(self, path: str, model_name: str | None = "TRL Model") -> None:
        """Write a README.md that says what the model is and how to load it."""
        Path(path).mkdir(parents=True, exist_ok=True)
        card = _MODEL_CARD.format(model_name=model_name, wrapper=type(self.model).__name__, path=path)
        (Path(path) / "README.md").write_text(card, encoding="utf-8")

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **upload_options: Any,
    ) -> str | None:
        """Save model, value head, tokenizer and model card, once for all processes; upload them if asked to.

        Returns the commit's address where it uploads. Options are those of ``models.upload``.
        """
        if upload_options and not push_to_hub:
            raise ValueError(f"{next(iter(upload_options))}: has no effect without push_to_hub=True")
        address = None
        if self.accelerator.is_main_process:
            self._save_pretrained(str(save_directory))
            if push_to_hub:
                address = upload(save_directory, repo_id or Path(save_directory).name, **upload_options)
        self.accelerator.wait_for_everyone()
        return address

    def push_to_hub(self, repo_id: str, **upload_options: Any) -> str | None:
        """Save to a temporary folder and upload it; returns the commit's address."""
        with TemporaryDirectory() as folder:
            return self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **upload_options)

    def _save_pretrained(self, save_directory: str) -> None:
        self.model.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)
        self.create_model_card(save_directory)

    def _push_if_best(self, mean_score: float) -> None:
        """Upload the model whenever, every ``compare_steps`` steps, the mean score is the best so far."""
        if not self.config.push_to_hub_if_best_kwargs:
            return
        if self.compare_step % self.config.compare_steps == 0 and mean_score > self.highest_reward:
            self.highest_reward = mean_score
            self.push_to_hub(**self.config.push_to_hub_if_best_kwargs)
        self.compare_step += 1


def _check_arguments(
    config: Any, model: Any, ref_model: Any, tokenizer: Any, dataset: Any, lr_scheduler: Any
) -> PPOConfig:
    """Say which argument is of the wrong type.

    Raises:
        ValueError: one is.
    """
    wrappers = " or ".join(one.__name__ for one in SUPPORTED_ARCHITECTURES)
    expected: list[tuple[str, Any, Any, str]] = [
        ("config", config, PPOConfig, "a PPOConfig"),
        ("tokenizer", tokenizer, PreTrainedTokenizerBase, "a transformers tokenizer"),
        ("model", model, SUPPORTED_ARCHITECTURES, wrappers),
    ]
    optional = [
        ("ref_model", ref_model, SUPPORTED_ARCHITECTURES, f"{wrappers}, or None"),
        ("dataset", dataset, (torch.utils.data.Dataset, Dataset), "a torch.utils.data.Dataset or datasets.Dataset"),
        ("lr_scheduler", lr_scheduler, LRScheduler, "a torch.optim.lr_scheduler.LRScheduler"),
    ]
    for name, value, kind, what in [*expected, *(one for one in optional if one[1] is not None)]:
        if not isinstance(value, kind):
            raise ValueError(f"{name}: must be {what}, not {type(value).__name__}")
    if ref_model is not None and (shared := shared_trained_weights(model, ref_model)):
        raise ValueError(
            f"ref_model: shares the trained weight {shared[0]} with model; make it with create_reference_model(model)"
        )
    return config


def _check_tensors(name: str, tensors: Any, batch_size: int | None) -> None:
    if not isinstance(tensors, list):
        raise ValueError(f"{name}: must be a list of tensors, not {type(tensors).__name__}")
    if not tensors or (batch_size is not None and len(tensors) != batch_size):
        raise ValueError(f"{name}: {len(tensors)} examples do not match the batch size ({batch_size})")
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: number {index} is no tensor but {type(tensor).__name__}")
        if name == "scores":
            if tensor.dim() > 1 or tensor.numel() != 1:
                raise ValueError(f"scores: number {index} has shape {tuple(tensor.shape)}; give one number each")
        elif tensor.dim() != 1 or not len(tensor):
            raise ValueError(f"{name}: number {index} has shape {tuple(tensor.shape)}; give (tokens,), 1 or more")


def _switches_off(response_masks: list[Tensor] | None) -> bool:
    return response_masks is not None and not all(bool(mask.all()) for mask in response_masks)


def _has_own_pieces(trainer: type[PPOTrainer]) -> bool:
    """Whether a subclass replaces a piece of the step, which the engine would not call."""
    pieces = [name for name, value in vars(PPOPieces).items() if inspect.isfunction(value)] + ["record_step_stats"]
    return any(getattr(trainer, name) is not getattr(PPOTrainer, name) for name in pieces)
