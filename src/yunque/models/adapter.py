"""The one place that knows encoder-decoder from decoder-only models: inputs, generation, scored positions.

Shapes: B samples, R positions of the longest response, V vocabulary, D hidden size. Slot t of every ``_BR`` array
belongs to response token t: its log-probability, and the value of the state before it.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from yunque.errors import InputError
from yunque.models.positions import position_limit

TokenIds = Sequence[int]

_POSITION_TABLE = re.compile(r"wpe|(embed_positions?|position_embeddings?|pos_embed\w*)")


@dataclass(frozen=True)
class ScoringBatch:
    """Model inputs that score given responses to given queries, with response_BR and its mask_BR (1 = a token)."""

    inputs: dict[str, Tensor]
    response_BR: Tensor
    mask_BR: Tensor


class ModelAdapter(ABC):
    """Turns token lists into model inputs and model outputs into per-response-token tensors."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.config = config = model.config
        self.pad_id: int = tokenizer.pad_token_id
        self.eos_ids: list[int] = end_token_ids(model, tokenizer)
        self.hidden_size: int = _state_size(model)
        self.tokenizer_limit: int = tokenizer.model_max_length
        self.forward_names = forward_names(model)
        is_encoder_decoder = config.is_encoder_decoder
        self.positions = readable_positions(model.get_decoder() if is_encoder_decoder else model, tokenizer)
        self.query_positions = 0
        if is_encoder_decoder:
            window = getattr(config, "attention_window", 1)
            limit = readable_positions(model.get_encoder(), tokenizer)
            # LED pads every text to whole windows, and numbers the padding too
            self.query_positions = limit - limit % max(window if isinstance(window, list) else [window])

    @abstractmethod
    def generation_inputs(self, queries: Sequence[TokenIds], device: torch.device) -> dict[str, Tensor]:
        """Pad ``queries`` to inputs of ``generate``: input_ids and attention_mask, both (B, Q)."""

    @abstractmethod
    def response_start(self, inputs: dict[str, Tensor]) -> int:
        """Column of ``generate``'s output at which responses begin."""

    @abstractmethod
    def scoring_batch(
        self, queries: Sequence[TokenIds], responses: Sequence[TokenIds], device: torch.device
    ) -> ScoringBatch:
        """Pad queries and responses to the inputs of one forward pass that scores every response token."""

    @abstractmethod
    def score(self, model: nn.Module, batch: ScoringBatch) -> tuple[Tensor, Tensor]:
        """Forward ``batch``: logits (B, R, V) that predict each response token, and the last hidden (B, R, D)."""

    @abstractmethod
    def join_text(self, query: str, response: str) -> str:
        """Text of query and response together, as a reward model reads it."""

    @abstractmethod
    def prompt_limit(self, max_new_tokens: int) -> int:
        """Longest prompt, in tokens, beside responses of ``max_new_tokens``.

        Raises:
            InputError: such responses leave no room for a prompt, or do not fit themselves.
        """

    def position_ids(self, attention_mask: Tensor) -> dict[str, Tensor]:
        """Number real tokens only, for models that take positions: a GPT-2 would count the padding too."""
        numbered = "position_ids" in self.forward_names
        return {"position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0)} if numbered else {}

    def _refuse(self, max_new_tokens: int) -> InputError:
        return InputError(
            f"max_new_tokens: responses of {max_new_tokens} tokens go beyond the {self.positions} positions of "
            f"{self.config.model_type}; lower it"
        )


class EncoderDecoder(ModelAdapter):
    """T5, BART and kin: the query goes to the encoder, the response to the decoder after its start token."""

    def generation_inputs(self, queries: Sequence[TokenIds], device: torch.device) -> dict[str, Tensor]:
        """Pad queries on the right, shape (B, Q)."""
        return _padded_inputs(queries, self.pad_id, device, left=False)

    def response_start(self, inputs: dict[str, Tensor]) -> int:
        """The output begins with the decoder's start token."""
        return 1

    def scoring_batch(
        self, queries: Sequence[TokenIds], responses: Sequence[TokenIds], device: torch.device
    ) -> ScoringBatch:
        """Feed start token and response without its last token to the decoder; all tokens are scored."""
        inputs = self.generation_inputs(queries, device)
        response_BR, mask_BR = pad(responses, self.pad_id, device)
        start = torch.full_like(response_BR[:, :1], self.config.decoder_start_token_id)
        inputs["decoder_input_ids"] = torch.cat([start, response_BR[:, :-1]], dim=1)
        return ScoringBatch(inputs, response_BR, mask_BR)

    def score(self, model: nn.Module, batch: ScoringBatch) -> tuple[Tensor, Tensor]:
        """Every decoder position predicts a response token."""
        output = model(**batch.inputs, output_hidden_states=True, use_cache=False)
        return output.logits, output.decoder_hidden_states[-1]

    def join_text(self, query: str, response: str) -> str:
        """Query and response are texts of their own."""
        return f"{query} {response}"

    def prompt_limit(self, max_new_tokens: int) -> int:
        """Prompt and response each have all positions; where these are relative, the tokenizer's limit stands in."""
        if max_new_tokens > self.positions:
            raise self._refuse(max_new_tokens)
        return self.query_positions


class DecoderOnly(ModelAdapter):
    """GPT-2, Llama and kin: query and response are one sequence; queries are padded on the left."""

    def generation_inputs(self, queries: Sequence[TokenIds], device: torch.device) -> dict[str, Tensor]:
        """Pad queries on the left so that every response begins in the same column, shape (B, Q)."""
        return _padded_inputs(queries, self.pad_id, device, left=True)

    def response_start(self, inputs: dict[str, Tensor]) -> int:
        """The output repeats the padded query."""
        return inputs["input_ids"].shape[1]

    def scoring_batch(
        self, queries: Sequence[TokenIds], responses: Sequence[TokenIds], device: torch.device
    ) -> ScoringBatch:
        """Join left-padded queries and right-padded responses; positions count real tokens only."""
        inputs = self.generation_inputs(queries, device)
        response_BR, mask_BR = pad(responses, self.pad_id, device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], response_BR[:, :-1]], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask_BR[:, :-1].long()], dim=1)
        return ScoringBatch(inputs | self.position_ids(inputs["attention_mask"]), response_BR, mask_BR)

    def score(self, model: nn.Module, batch: ScoringBatch) -> tuple[Tensor, Tensor]:
        """The last R columns predict the response; the head runs on them alone."""
        slots = batch.response_BR.shape[1]
        output = model(**batch.inputs, output_hidden_states=True, use_cache=False, **self._last(slots))
        return output.logits[:, -slots:], output.hidden_states[-1][:, -slots:]

    def _last(self, slots: int) -> dict[str, int]:
        return {"logits_to_keep": slots} if "logits_to_keep" in self.forward_names else {}

    def join_text(self, query: str, response: str) -> str:
        """The response continues the query."""
        return query + response

    def prompt_limit(self, max_new_tokens: int) -> int:
        """Prompt and response share the positions."""
        if max_new_tokens >= self.positions:
            raise self._refuse(max_new_tokens)
        return self.positions - max_new_tokens


def adapter_for(model: Any, tokenizer: Any) -> ModelAdapter:
    """Choose the adapter of a model by its configuration."""
    return (EncoderDecoder if model.config.is_encoder_decoder else DecoderOnly)(model, tokenizer)


def pad(rows: Sequence[TokenIds], value: int, device: torch.device, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Pad token lists to one LongTensor (B, longest) and a boolean mask of the same shape."""
    longest = max((len(row) for row in rows), default=0)
    padded = torch.full((len(rows), longest), value, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for index, row in enumerate(rows):
        span = slice(longest - len(row), longest) if left else slice(0, len(row))
        padded[index, span] = torch.as_tensor(row, dtype=torch.long)
        mask[index, span] = True
    return padded.to(device), mask.to(device)


def forward_names(model: Any) -> set[str]:
    """Names of what the language model, under an adapter too, takes in a forward pass."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(type(base).forward).parameters)


def readable_positions(model: Any, tokenizer: Any) -> int:
    """Tokens that ``model`` reads at once: by its own position tables, else its configuration, else the tokenizer.

    Rows of a table that tokens never reach do not count: those up to the padding's (RoBERTa and kin number positions
    from behind it) and a fixed offset (BART, OPT).
    """
    config = model.config.get_text_config(decoder=True)
    tables = [
        module.num_embeddings - _unreached_rows(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _POSITION_TABLE.fullmatch(name.rpartition(".")[2])
    ]
    stated = [position_limit(config), getattr(config, "max_seq_len", None)]
    limit = min(tables or [number for number in stated if number] or [tokenizer.model_max_length])
    return int(min(limit, tokenizer.model_max_length))


def _unreached_rows(table: nn.Embedding) -> int:
    offset = getattr(table, "offset", 0)
    return int(offset or (0 if table.padding_idx is None else table.padding_idx + 1))


def _state_size(model: Any) -> int:
    """Width of the last hidden states: what the head reads, which may be narrower than the layers (OPT-350M)."""
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        return int(head.in_features)
    return int(model.config.get_text_config(decoder=True).hidden_size)


def _padded_inputs(queries: Sequence[TokenIds], pad_id: int, device: torch.device, *, left: bool) -> dict[str, Tensor]:
    input_ids, mask = pad(queries, pad_id, device, left=left)
    return {"input_ids": input_ids, "attention_mask": mask.long()}


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Collect the ids that end an answer, for training, evaluation, export and serving alike.

    They are those of the tokenizer, of the generation configuration and of the configuration together: chat models
    (Llama 3, Gemma 3, Phi 3.5) name the token that ends a turn in one of them only. The first is the one that training
    puts after an answer. Ids outside the vocabulary, such as a configuration's untouched default, end nothing.

    Raises:
        InputError: none of the three names one.
    """
    config = model.config.get_text_config(decoder=True)
    generation = getattr(model, "generation_config", None)
    named = [tokenizer.eos_token_id, getattr(generation, "eos_token_id", None), config.eos_token_id]
    ids = dict.fromkeys(token for part in named for token in (part if isinstance(part, list | tuple) else [part]))
    found = [token for token in ids if token is not None and 0 <= token < config.vocab_size]
    if not found:
        raise InputError("model_name_or_path: neither model nor tokenizer names an end-of-sequence token")
    return found


def record_end_tokens(model: Any, tokenizer: Any) -> None:
    """Let transformers' own ``generate`` end answers of ``model``, once saved, where training and evaluation do."""
    ids = end_token_ids(model, tokenizer)
    known = model.generation_config.eos_token_id
    if set(ids) != set(known if isinstance(known, list) else [known]):
        model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
