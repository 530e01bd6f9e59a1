"""Language models with a value head behind TRL 0.11's names, and their reference copies."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import torch
from accelerate import PartialState
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM, PromptLearningConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from yunque.compat.trl011 import loading
from yunque.errors import InputError
from yunque.models.loading import keep_head_untied

LAYER_PATTERNS = (
    *("transformer.h.{layer}", "model.decoder.layers.{layer}", "gpt_neox.layers.{layer}", "model.layers.{layer}"),
)
"""Names under which decoder-only models keep their layers."""


class ValueHead(nn.Module):
    """Linear map (B, T, D) -> (B, T, 1) from the last hidden state to a value, in float32, after dropout."""

    def __init__(self, config: Any, summary_dropout_prob: float = 0.1) -> None:
        super().__init__()
        dropout = getattr(config, "summary_dropout_prob", summary_dropout_prob)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.summary = nn.Linear(_hidden_size(config), 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Values (B, T, 1) of hidden states (B, T, D)."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.summary(self.dropout(hidden_states).to(self.summary.weight.dtype))


class PreTrainedModelWrapper(nn.Module):
    """A transformers or PEFT model as ``pretrained_model`` and its value head as ``v_head``."""

    transformers_parent_class: ClassVar[Any]
    lm_head_namings: ClassVar[list[str]]
    supported_args = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")
    supported_pretrained_model_architectures = (PreTrainedModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM)
    is_encoder_decoder: bool = False
    is_sequential_parallel = False
    policy_adapter_name = "default"

    def __init__(
        self,
        pretrained_model: Any,
        *,
        summary_dropout_prob: float = 0.1,
        v_head_initializer_range: float = 0.2,
        v_head_init_strategy: str | None = None,
        score_module: nn.Module | None = None,
        rm_adapter_name: str | None = None,
    ) -> None:
        super().__init__()
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        self.is_peft_model = isinstance(pretrained_model, PeftModel)
        self._check_language_head()
        keep_head_untied(pretrained_model.get_base_model() if self.is_peft_model else pretrained_model)
        if self.is_peft_model:
            self.policy_adapter_name = pretrained_model.active_adapter
        self.v_head = ValueHead(self.config, summary_dropout_prob)
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.v_head.summary.weight, std=v_head_initializer_range)
            nn.init.zeros_(self.v_head.summary.bias)
        elif v_head_init_strategy is not None:
            raise ValueError(f"v_head_init_strategy: {v_head_init_strategy!r} is neither None nor 'normal'")
        self.v_head.to(_head_device(pretrained_model))
        self.rm_adapter_name = rm_adapter_name
        self.supports_rm_adapter = score_module is not None
        if score_module is not None:
            self.score = score_module

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Self:
        """Wrap a model, or load one by hub id or folder, with its value head if it was saved with one.

        ``peft_config`` adds a new adapter, ``is_trainable`` lets the adapter of an adapter folder train,
        ``reward_adapter`` loads a second adapter with a score head; ``supported_args`` go to the value head, the rest
        to transformers.

        Raises:
            ValueError: not a language model of this class, or arguments of the wrong type.
        """
        head_options = {name: kwargs.pop(name) for name in cls.supported_args if name in kwargs}
        peft_config, reward_adapter = kwargs.pop("peft_config", None), kwargs.pop("reward_adapter", None)
        reward_adapter_name = kwargs.pop("reward_adapter_name", "reward_adapter")
        is_trainable = kwargs.pop("is_trainable", False)
        if peft_config is not None and not isinstance(peft_config, PeftConfig):
            raise ValueError(f"peft_config: must be a peft.PeftConfig, not {type(peft_config).__name__}")
        if reward_adapter is not None and not isinstance(reward_adapter, str):
            raise ValueError("reward_adapter: must be a folder or hub id, as a string")
        source = pretrained_model_name_or_path
        if isinstance(source, str | Path):
            source = str(source)
            model = loading.load(cls.transformers_parent_class, source, model_args, kwargs, is_trainable, peft_config)
        elif isinstance(source, cls.supported_pretrained_model_architectures):
            model = source
            _warn_of_loading_options(model, kwargs)
            if peft_config is not None and isinstance(model, PreTrainedModel):
                model = loading.with_new_adapter(model, peft_config, {})
        else:
            raise ValueError(
                "pretrained_model_name_or_path: must be a string, a PreTrainedModel, or a PEFT model made for "
                f"causal or sequence-to-sequence language modelling, not {type(source).__name__}"
            )
        if isinstance(model, PeftModel) and isinstance(model.active_peft_config, PromptLearningConfig):
            raise ValueError("PPO trains weights, not prompts: PromptLearningConfig adapters are not supported")
        if reward_adapter is not None:
            if not isinstance(model, PeftModel):
                raise ValueError("reward_adapter: can only be used with a PEFT model")
            head_options["score_module"] = loading.load_reward_adapter(model, reward_adapter, reward_adapter_name)
            head_options["rm_adapter_name"] = reward_adapter_name
        wrapper = cls(model, **head_options)
        if isinstance(source, str):
            wrapper.post_init(loading.read_value_head(source, kwargs.get("token")))
        return wrapper

    @property
    def current_device(self) -> int | str:
        """Local number of this process' accelerator, or "cpu"."""
        return PartialState().local_process_index if torch.cuda.is_available() else "cpu"

    def post_init(self, state_dict: dict[str, Tensor]) -> None:
        """Load the value head from tensors named ``v_head.*``; nothing happens without them.

        Raises:
            InputError: they are of another head: other names, or another width.
        """
        head = {
            name.removeprefix("v_head."): weight for name, weight in state_dict.items() if name.startswith("v_head.")
        }
        shapes = {name: tuple(weight.shape) for name, weight in head.items()}
        expected = {name: tuple(weight.shape) for name, weight in self.v_head.state_dict().items()}
        if shapes and shapes != expected:
            raise InputError(f"value head: the saved one has {shapes}, this model's has {expected}")
        if head:
            self.v_head.load_state_dict(head)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Logits (B, T, V) in float32, the loss if ``labels`` are given, and values (B, T).

        T counts decoder tokens in an encoder-decoder model. The cache comes fourth with ``return_past_key_values``.
        """
        output = self.pretrained_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **(kwargs | {"output_hidden_states": True}),
        )
        hidden = output.decoder_hidden_states if self.is_encoder_decoder else output.hidden_states
        values = self.v_head(hidden[-1].to(self.v_head.summary.weight.device)).squeeze(-1)
        result = (output.logits.float(), output.loss, values)
        return (*result, output.past_key_values) if return_past_key_values else result

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``generate`` of the wrapped model."""
        return self.pretrained_model.generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped model's method."""
        return self.pretrained_model.prepare_inputs_for_generation(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Call the wrapped model's method."""
        self.pretrained_model.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Call the wrapped model's method."""
        self.pretrained_model.gradient_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        """Call the wrapped model's method."""
        self.pretrained_model.enable_input_require_grads()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped model's tensors (none with PEFT, which saves its own) and the head's as ``v_head.*``."""
        tensors = {} if self.is_peft_model else dict(self.pretrained_model.state_dict(*args, **kwargs))
        return tensors | {f"v_head.{name}": weight for name, weight in self.v_head.state_dict(*args, **kwargs).items()}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write model and value head as safetensors: together, or the head as model.safetensors beside an adapter."""
        state_dict = kwargs.pop("state_dict", None)
        state_dict = self.state_dict() if state_dict is None else state_dict
        if self.is_peft_model:
            self.pretrained_model.save_pretrained(str(save_directory), **kwargs)
            head = {name: weight.detach().cpu().contiguous() for name, weight in state_dict.items()}
            save_file(head, Path(save_directory) / loading.WEIGHTS, metadata={"format": "pt"})
        else:
            self.pretrained_model.save_pretrained(str(save_directory), state_dict=state_dict, **kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save and upload to ``repo_id``, made if missing; options of ``upload``; returns the commit's address."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repo_id, **options)

    def compute_reward_score(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Score every position, (B, T, labels), under the reward adapter.

        Raises:
            ValueError: the model was loaded without ``reward_adapter``.
        """
        if not self.supports_rm_adapter or self.rm_adapter_name is None:
            raise ValueError("reward_adapter: none was given to from_pretrained")
        with torch.no_grad(), _adapter(self.pretrained_model, self.rm_adapter_name, self.policy_adapter_name):
            output = self.pretrained_model(
                input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **kwargs
            )
            return self.score(output.hidden_states[-1])

    def _check_language_head(self) -> None:
        if bool(self.config.is_encoder_decoder) != self.is_encoder_decoder:
            raise ValueError(
                f"{type(self).__name__}: {self.config.model_type} is not the right kind of model; take "
                f"AutoModelFor{'CausalLM' if self.is_encoder_decoder else 'Seq2SeqLM'}WithValueHead"
            )
        if not any(hasattr(self.pretrained_model, name) for name in self.lm_head_namings):
            raise ValueError("The model has no language model head; take one that has")


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A decoder-only language model with a value head."""

    transformers_parent_class = AutoModelForCausalLM
    lm_head_namings: ClassVar[list[str]] = ["lm_head", "embed_out", "output_layer"]


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """An encoder-decoder language model with a value head."""

    transformers_parent_class = AutoModelForSeq2SeqLM
    lm_head_namings: ClassVar[list[str]] = ["lm_head", "embed_out", "output_projection"]
    is_encoder_decoder = True


SUPPORTED_ARCHITECTURES = (AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead)


def create_reference_model(
    model: PreTrainedModelWrapper, num_shared_layers: int | None = None, pattern: str | None = None
) -> Any:
    """Copy ``model`` as it is now, frozen and in eval mode; what does not train is shared, not copied.

    With ``num_shared_layers`` the first layers are frozen in ``model`` itself, and so shared; ``pattern`` names the
    layers ("transformer.h.{layer}").

    Raises:
        ValueError: the layers are not found.
    """
    if num_shared_layers is not None:
        _freeze_below(model, num_shared_layers, pattern)
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return deepcopy(model, shared).requires_grad_(False).eval()


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: Any = None,
    commit_message: str | None = None,
) -> str:
    """Upload a folder to the hub; returns the commit's address."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))


def _freeze_below(model: nn.Module, layer: int, pattern: str | None) -> None:
    """Freeze all that comes before ``layer``, in the order in which the model names its parameters."""
    names = [name for name, _ in model.named_parameters()]
    candidates = [one.format(layer=layer) + "." for one in ([pattern] if pattern is not None else LAYER_PATTERNS)]
    found = [index for index, name in enumerate(names) if any(one in name for one in candidates)]
    if not found:
        raise ValueError(f"num_shared_layers: no parameter is named like {' or '.join(candidates)}; give a pattern")
    for name in names[: found[0]]:
        model.get_parameter(name).requires_grad_(False)


def _hidden_size(config: Any) -> int:
    """Width of the last hidden state; OPT-350m projects it to that of the embedding."""
    width = getattr(config, "word_embed_proj_dim", None)
    return width or config.get_text_config(decoder=True).hidden_size


def _head_device(model: Any) -> torch.device:
    head = model.get_output_embeddings()
    return next(model.parameters()).device if head is None else head.weight.device


def _warn_of_loading_options(model: Any, kwargs: dict[str, Any]) -> None:
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
    if dtype is not None and dtype != model.dtype:
        warnings.warn(
            f"torch_dtype: the model is {model.dtype} and stays so; load it as {dtype}", UserWarning, stacklevel=3
        )
    if kwargs:
        names = ", ".join(kwargs)
        warnings.warn(f"without effect on a model that is loaded already: {names}", UserWarning, stacklevel=3)


@contextmanager
def _adapter(model: Any, name: str, former: str) -> Iterator[None]:
    was_training = model.training
    model.set_adapter(name, inference_mode=True)
    model.eval()
    try:
        yield
    finally:
        model.set_adapter(former)
        model.train(was_training)
