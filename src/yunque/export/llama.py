"""Llama and what is built like it (Mistral, Qwen2, Qwen3) as a decoder."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from yunque.errors import InputError
from yunque.export.decoder import Decoder, Heads, Rotary
from yunque.export.graph import Config, Graph, State, fused, fused_bias, transposed
from yunque.models.positions import fixed_rotary_limit

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_ROTARY_KINDS = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
_FUSED_ROTARY_MULTIPLE = 16
"""Head sizes the rotary part of the attention kernel takes."""


def decode(decoder: Decoder, config: Config, state: State, tied: bool, model: PreTrainedModel) -> None:
    """Everything from tokens to logits; ``tied`` says that the head is the embedding.

    Raises:
        InputError: rotary embeddings of an unknown kind, heads of an odd size.
    """
    graph = decoder.graph
    rotary = _rotary(config, model)
    residual = graph.embedding(decoder.input_ids, EMBEDDING, state[EMBEDDING], HEAD if tied else "")
    branch = ""
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        gain = f"{name}.input_layernorm.weight"
        normed, residual = _norm(graph, config, state, residual, branch, gain)
        branch = _attention(decoder, config, state, f"{name}.self_attn", layer, normed, rotary)
        gain = f"{name}.post_attention_layernorm.weight"
        normed, residual = _norm(graph, config, state, residual, branch, gain)
        branch = _feed_forward(graph, config, state, f"{name}.mlp", normed)
    hidden, _ = _norm(graph, config, state, residual, branch, "model.norm.weight")
    decoder.logits(hidden, HEAD, state[HEAD], key=EMBEDDING if tied else HEAD)


def _norm(graph: Graph, config: Config, state: State, residual: str, branch: str, name: str) -> tuple[str, str]:
    if not branch:
        return graph.rms_norm(residual, name, state[name], config.rms_norm_eps), residual
    return graph.add_rms_norm(branch, residual, name, state[name], config.rms_norm_eps)


def _attention(
    decoder: Decoder, config: Config, state: State, name: str, layer: int, value: str, rotary: Rotary
) -> str:
    graph = decoder.graph
    size = rotary.cos.shape[1] * 2
    width, key_width = (state[f"{name}.{part}_proj.weight"].shape[0] for part in "qk")
    heads = Heads(width // size, key_width // size, size)
    weights, biases = ([f"{name}.{part}_proj.{kind}" for part in "qkv"] for kind in ("weight", "bias"))
    qkv = graph.linear(value, f"{name}.qkv", fused(state, *weights), fused_bias(state, *biases))
    options = {"scale": size**-0.5, "window": _window(config, layer)}
    has_norms = f"{name}.q_norm.weight" in state
    if not has_norms and size % _FUSED_ROTARY_MULTIPLE == 0:
        mixed = decoder.cached_attention(qkv, layer, heads, rotary=rotary, **options)
    else:
        queries, keys, values = graph.split(qkv, [width, key_width, key_width], axis=-1)
        if has_norms:
            queries, keys = (
                _norm_heads(graph, config, state, f"{name}.{part}_norm.weight", part_value, size)
                for part, part_value in (("q", queries), ("k", keys))
            )
        queries, keys = (decoder.rotate(rotary, part) for part in (queries, keys))
        mixed = decoder.cached_attention(queries, layer, heads, keys=keys, values=values, **options)
    bias = state.get(f"{name}.o_proj.bias")
    return graph.linear(mixed, f"{name}.o_proj", transposed(state, f"{name}.o_proj.weight"), bias)


def _norm_heads(graph: Graph, config: Config, state: State, name: str, value: str, size: int) -> str:
    """RMS norm of every head of ``value`` [rows, length, heads * size] by itself."""
    by_head = graph.op("Reshape", value, graph.constant([0, 0, -1, size], "int64"))
    normed = graph.rms_norm(by_head, name, state[name], config.rms_norm_eps)
    return graph.op("Reshape", normed, graph.constant([0, 0, -1], "int64"))


def _feed_forward(graph: Graph, config: Config, state: State, name: str, value: str) -> str:
    weights, biases = ([f"{name}.{part}_proj.{kind}" for part in ("gate", "up")] for kind in ("weight", "bias"))
    both = graph.linear(value, f"{name}.gate_up", fused(state, *weights), fused_bias(state, *biases))
    opened, lifted = graph.split(both, [state[weight].shape[0] for weight in weights], axis=-1)
    inner = graph.op("Mul", graph.activation(opened, config.hidden_act), lifted)
    bias = state.get(f"{name}.down_proj.bias")
    return graph.linear(inner, f"{name}.down_proj", transposed(state, f"{name}.down_proj.weight"), bias)


def _window(config: Config, layer: int) -> int:
    """How many tokens the layer looks back; -1 is all of them."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds[layer] == "sliding_attention" if kinds is not None else config.model_type == "mistral"
    return int(window) if window and slides else -1


def _rotary(config: Config, model: PreTrainedModel) -> Rotary:
    """Tables of the model's own rotary module, for every position that the export reads."""
    module = model.model.rotary_emb
    if module.rope_type not in _ROTARY_KINDS:
        raise InputError(
            f"model_name_or_path: rotary embeddings of kind {module.rope_type} cannot be exported; "
            f"{', '.join(_ROTARY_KINDS)} can"
        )
    positions = torch.arange(fixed_rotary_limit(config))[None]
    with torch.no_grad():
        cos, sin = module(torch.zeros(1), positions)
    half = cos.shape[-1] // 2
    return Rotary(cos[0, :, :half].contiguous().numpy(), sin[0, :, :half].contiguous().numpy())
