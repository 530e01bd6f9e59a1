"""The model to export: found, loaded in float32, its adapter merged in, its family known."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from yunque import artifacts
from yunque.errors import InputError
from yunque.export import decoder, optimum
from yunque.export.decoder import Parts
from yunque.export.graph import ACTIVATIONS, Config, Graph, State
from yunque.export.quantized import Precision
from yunque.export.weights import WeightFile
from yunque.models.adapter_folders import adapter_config, check_vocabulary, has_virtual_tokens, put_on, tokenizer_source
from yunque.models.arguments import ModelArguments
from yunque.models.loading import (
    base_arguments,
    load_adapted_classifier,
    load_base_of,
    load_classifier,
    load_config,
    no_tokenizer,
)
from yunque.models.merging import merged
from yunque.runtime.spec import Kind

_LANGUAGE_FAMILIES: dict[str, tuple[Kind, str]] = {
    "t5": ("seq2seq", "t5"),
    "bart": ("seq2seq", "bart"),
    "gpt2": ("causal", "gpt2"),
    "llama": ("causal", "llama"),
    "mistral": ("causal", "llama"),
    "qwen2": ("causal", "llama"),
    "qwen3": ("causal", "llama"),
}
"""Kind and module by ``model_type``."""
_CLASSIFIERS = ("bert", "distilbert", "roberta")
_ACTIVATION_FIELDS = ("dense_act_fn", "activation_function", "hidden_act", "activation")


@dataclass(frozen=True)
class Source:
    """A loaded model in float32 without adapter, and its tokenizer."""

    name: str
    kind: Kind
    model: Any
    tokenizer: Any
    base_name: str | None  # of an adapter that was merged
    args: ModelArguments = field(default_factory=ModelArguments)

    @cached_property
    def reference(self) -> Any:
        """What the export is compared with: an adapter on its base, unmerged, as it lies in the user's files."""
        if self.base_name is None:
            return self.model
        model = _load_adapted(self.name, self.kind == "classifier", self.args)[0]
        return model.float().eval()

    @property
    def config(self) -> Config:
        """The model's configuration."""
        return self.model.config

    def state(self) -> dict[str, NDArray[np.float32]]:
        """The weights by name, without a copy."""
        return {name: tensor.detach().numpy() for name, tensor in self.model.state_dict().items()}

    def graphs(
        self, weights: WeightFile, precision: Precision | None = None, *, for_optimum: bool = False
    ) -> dict[str, Graph]:
        """Write the model's graphs, its weights into ``weights``; for our runtime or for optimum-onnx.

        All is float32 unless ``precision`` says otherwise.

        Raises:
            InputError: an activation or another choice of the configuration that the graphs cannot express.
        """
        activations = [getattr(self.config, name) for name in _ACTIVATION_FIELDS if hasattr(self.config, name)]
        for activation in activations:
            if activation not in ACTIVATIONS:
                known = ", ".join(sorted(ACTIVATIONS))
                raise InputError(f"model_name_or_path: activation {activation} cannot be exported; {known} can")
        state, precision = self.state(), precision or Precision()

        def new_graph(name: str) -> Graph:
            return Graph(name, weights, precision)

        if self.kind == "classifier":
            from yunque.export import classifiers

            made = classifiers.graphs(self.config, state, new_graph, token_types=for_optimum)
            return {"model": made["classifier"]} if for_optimum else made
        layout = optimum if for_optimum else decoder
        return layout.graphs(self._parts(state), new_graph)

    def _parts(self, state: State) -> Parts:
        family: Any = importlib.import_module(f"yunque.export.{_LANGUAGE_FAMILIES[self.config.model_type][1]}")
        tied = _address(self.model.get_output_embeddings()) == _address(self.model.get_input_embeddings())
        options: Mapping[str, Any] = {"model": self.model} if family.__name__.endswith(".llama") else {}
        config = self.config
        is_seq2seq = self.kind == "seq2seq"
        return Parts(
            (lambda graph: family.encode(graph, config, state, tied)) if is_seq2seq else None,
            (lambda graph, hidden: family.cross(graph, config, state, hidden)) if is_seq2seq else None,
            lambda writer: family.decode(writer, config, state, tied, **options),
        )


def load_source(name: str, revision: str, trust_remote_code: bool, *, to_export: bool = True) -> Source:
    """Load what ``name`` (hub id, model folder or adapter folder) holds.

    Raises:
        InputError: no such model, an architecture that cannot be exported where that is wanted, weights that are
            quantized already, an adapter that cannot be merged.
    """
    args = ModelArguments(model_name_or_path=name, model_revision=revision, trust_remote_code=trust_remote_code)
    _refuse_onnx(name)
    adapter = adapter_config(name)
    base = adapter["base_model_name_or_path"] if adapter else name
    config = load_config(base, base_arguments(args, adapter))
    is_classifier = adapter.get("task_type") == "SEQ_CLS" if adapter else _is_classifier(config)
    kind = _kind(config, is_classifier, to_export)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"model_name_or_path: {base} is quantized already; export its float model")
    if adapter:
        adapted, tokenizer = _load_adapted(name, is_classifier, args)
        model = _merged(adapted)
    elif is_classifier:
        model, tokenizer = load_classifier(name, "model_name_or_path")
    else:
        model, tokenizer = load_base_of(name, None, args), _load_tokenizer(name, args)
    check_vocabulary(model, tokenizer, name)
    if to_export and not getattr(tokenizer, "is_fast", False):
        raise InputError(f"model_name_or_path: the tokenizer of {name} has no tokenizer.json, which the runtime reads")
    return Source(name, kind, model.float().eval(), tokenizer, base if adapter else None, args)


def _kind(config: Config, is_classifier: bool, to_export: bool) -> Kind:
    if not to_export:
        return "classifier" if is_classifier else "seq2seq" if config.is_encoder_decoder else "causal"
    if is_classifier and config.model_type in _CLASSIFIERS:
        return "classifier"
    if not is_classifier and config.model_type in _LANGUAGE_FAMILIES:
        return _LANGUAGE_FAMILIES[config.model_type][0]
    what = "sequence classifier" if is_classifier else "language model"
    raise InputError(
        f"model_name_or_path: a {what} of type {config.model_type} cannot be exported; language models of type "
        f"{', '.join(sorted(_LANGUAGE_FAMILIES))} and sequence classifiers of type {', '.join(_CLASSIFIERS)} can"
    )


def _is_classifier(config: Config) -> bool:
    names = config.architectures or []
    return any(name.endswith("ForSequenceClassification") for name in names) or (
        not names and config.model_type in _CLASSIFIERS
    )


def _load_adapted(name: str, is_classifier: bool, args: ModelArguments) -> tuple[PeftModel, Any]:
    """The adapter of folder ``name`` on its base, and its tokenizer."""
    adapter = adapter_config(name)
    assert adapter is not None, "the caller has looked"
    if has_virtual_tokens(adapter):
        raise InputError(
            f"model_name_or_path: {name} holds virtual tokens (prompt tuning), which are no weights to merge; "
            "export a LoRA adapter or a whole model"
        )
    if is_classifier:
        return load_adapted_classifier(name, adapter, "model_name_or_path")
    return put_on(load_base_of(name, adapter, args), name, adapter), _load_tokenizer(name, args)


def _load_tokenizer(name: str, args: ModelArguments) -> Any:
    """The tokenizer of ``name``, or of its base where an adapter came without; it needs no pad token."""
    adapter = adapter_config(name)
    where = tokenizer_source(name, adapter)
    try:
        revision = "main" if Path(where).exists() else base_arguments(args, adapter).model_revision
        return AutoTokenizer.from_pretrained(where, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise no_tokenizer(where, error) from error


def _merged(adapted: PeftModel) -> PreTrainedModel:
    try:
        return merged(adapted.float())
    except InputError as error:
        raise InputError(str(error).replace("merge_adapter", "model_name_or_path", 1)) from error


def float_model(name: str) -> str:
    """``name`` or, where it is an ONNX folder of ours, the model it was made from, if that is still the same.

    Raises:
        InputError: an ONNX folder whose model is gone, has changed or cannot be told; the message names it.
    """
    if not _is_onnx(name) or artifacts.manifest_of(name) is None:
        return name
    parent = artifacts.lineage(name)[1]
    if parent.manifest is None or parent.problem:
        problem = f" ({parent.problem})" if parent.problem else ""
        raise InputError(
            f"model_name_or_path: {name} is an ONNX folder, made from {parent.path}{problem}; give the float model"
        )
    return parent.path


def _is_onnx(name: str) -> bool:
    folder = Path(name)
    return folder.is_dir() and any(folder.glob("*.onnx")) and not any(folder.glob("*.safetensors"))


def _refuse_onnx(name: str) -> None:
    if _is_onnx(name):
        raise InputError(f"model_name_or_path: {name} is an ONNX folder already; give the model it was made from")


def _address(layer: Any) -> int:
    return int(layer.weight.data_ptr())
