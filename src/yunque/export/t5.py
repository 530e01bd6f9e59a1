"""T5 and FLAN-T5 (gated or not, head tied or not) as an encoder and a decoder."""

from __future__ import annotations

import numpy as np
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from yunque.export.decoder import Decoder, Heads, encoder_attention
from yunque.export.graph import Array, Config, Graph, State, fused, transposed

EMBEDDING = "shared.weight"
HEAD = "lm_head.weight"


def encode(graph: Graph, config: Config, state: State, tied: bool) -> str:
    """The encoder's hidden states; ``tied`` says that the decoder's head is the embedding."""
    ids = graph.input("input_ids", "int64", ("rows", "source"))
    mask = graph.op("Cast", graph.input("attention_mask", "int64", ("rows", "source")), to=6)  # int32
    hidden = graph.embedding(ids, EMBEDDING, state[EMBEDDING], HEAD if tied else "")
    bias = _encoder_bias(graph, config, state, ids)
    epsilon = config.layer_norm_epsilon
    branch, sublayers = "", _Norms(graph, epsilon)
    for layer in range(config.num_layers):
        name = f"encoder.block.{layer}.layer"
        attention = f"{name}.0.SelfAttention"
        heads = _heads(config, state, attention)
        normed, hidden = sublayers(hidden, branch, f"{name}.0.layer_norm.weight", state)
        weight = fused(state, *(f"{attention}.{part}.weight" for part in "qkv"))
        qkv = graph.linear_parts(normed, f"{attention}.qkv", weight, [heads.width] * 3)
        mixed = encoder_attention(graph, qkv, heads, scale=1.0, padding_mask=mask, bias=bias)
        branch = graph.linear(mixed, f"{attention}.o", transposed(state, f"{attention}.o.weight"))
        normed, hidden = sublayers(hidden, branch, f"{name}.1.layer_norm.weight", state)
        branch = _feed_forward(graph, config, state, f"{name}.1.DenseReluDense", normed)
    return sublayers(hidden, branch, "encoder.final_layer_norm.weight", state)[0]


def cross(graph: Graph, config: Config, state: State, hidden: str) -> list[tuple[list[str], Heads]]:
    """Keys and values of every decoder layer from the encoder's hidden states."""
    layers = []
    for layer in range(config.num_decoder_layers):
        name = f"decoder.block.{layer}.layer.1.EncDecAttention"
        heads = _heads(config, state, name)
        weight = fused(state, f"{name}.k.weight", f"{name}.v.weight")
        layers.append((graph.linear_parts(hidden, f"{name}.kv", weight, [heads.width] * 2), heads))
    return layers


def decode(decoder: Decoder, config: Config, state: State, tied: bool) -> None:
    """Everything from tokens to logits; ``tied`` says that the head is the embedding."""
    graph = decoder.graph
    cross_bias = decoder.cross_bias()
    hidden = graph.embedding(decoder.input_ids, EMBEDDING, state[EMBEDDING], HEAD if tied else "")
    bias = _decoder_bias(decoder, config, state)
    branch, sublayers = "", _Norms(graph, config.layer_norm_epsilon)
    for layer in range(config.num_decoder_layers):
        name = f"decoder.block.{layer}.layer"
        own, cross = f"{name}.0.SelfAttention", f"{name}.1.EncDecAttention"
        normed, hidden = sublayers(hidden, branch, f"{name}.0.layer_norm.weight", state)
        qkv = graph.linear(normed, f"{own}.qkv", fused(state, *(f"{own}.{part}.weight" for part in "qkv")))
        mixed = decoder.cached_attention(qkv, layer, _heads(config, state, own), scale=1.0, bias=bias)
        branch = graph.linear(mixed, f"{own}.o", transposed(state, f"{own}.o.weight"))
        normed, hidden = sublayers(hidden, branch, f"{name}.1.layer_norm.weight", state)
        queries = graph.linear(normed, f"{cross}.q", transposed(state, f"{cross}.q.weight"))
        heads = _heads(config, state, cross)
        mixed = decoder.cross_attention(queries, layer, heads, scale=1.0, bias=cross_bias)
        branch = graph.linear(mixed, f"{cross}.o", transposed(state, f"{cross}.o.weight"))
        normed, hidden = sublayers(hidden, branch, f"{name}.2.layer_norm.weight", state)
        branch = _feed_forward(graph, config, state, f"{name}.2.DenseReluDense", normed, whole=True)
    hidden, _ = sublayers(hidden, branch, "decoder.final_layer_norm.weight", state)
    scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
    decoder.logits(hidden, HEAD, state[HEAD], key=EMBEDDING if tied else HEAD, scale=scale)


class _Norms:
    """The norm before each sublayer, with the former sublayer's addition in the same node."""

    def __init__(self, graph: Graph, epsilon: float) -> None:
        self.graph = graph
        self.epsilon = epsilon

    def __call__(self, hidden: str, branch: str, name: str, state: State) -> tuple[str, str]:
        if not branch:
            return self.graph.rms_norm(hidden, name, state[name], self.epsilon), hidden
        return self.graph.add_rms_norm(branch, hidden, name, state[name], self.epsilon)


def _heads(config: Config, state: State, attention: str) -> Heads:
    """From the weights, since pruned layers may differ."""
    number = state[f"{attention}.q.weight"].shape[0] // config.d_kv
    return Heads(number, number, config.d_kv)


def _feed_forward(graph: Graph, config: Config, state: State, name: str, value: str, *, whole: bool = False) -> str:
    """``whole``: both inner projections as one product, as a step of few tokens wants."""
    if config.is_gated_act:
        gate, up = f"{name}.wi_0.weight", f"{name}.wi_1.weight"
        sizes = [state[gate].shape[0], state[up].shape[0]]
        if whole:
            opened, lifted = graph.split(graph.linear(value, f"{name}.wi", fused(state, gate, up)), sizes, axis=-1)
        else:
            opened, lifted = graph.linear_parts(value, f"{name}.wi", fused(state, gate, up), sizes)
        inner = graph.op("Mul", graph.activation(opened, config.dense_act_fn), lifted)
    else:
        inner = graph.linear(value, f"{name}.wi", transposed(state, f"{name}.wi.weight"))
        inner = graph.activation(inner, config.dense_act_fn)
    return graph.linear(inner, f"{name}.wo", transposed(state, f"{name}.wo.weight"))


# --- relative positions -----------------------------------------------------------------------------------------------


def _bias_table(config: Config, table: Array, *, bidirectional: bool) -> Array:
    """The bias [heads, distances] by clipped distance key - query: beyond the largest distance nothing changes."""
    largest = config.relative_attention_max_distance
    distances = torch.arange(-largest, (largest if bidirectional else 0) + 1)
    buckets = T5Attention._relative_position_bucket(
        distances, bidirectional=bidirectional, num_buckets=config.relative_attention_num_buckets, max_distance=largest
    )
    return np.ascontiguousarray(table[buckets.numpy()].T)


def _encoder_bias(graph: Graph, config: Config, state: State, ids: str) -> str:
    """[1, heads, length, length]."""
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    length = graph.op("Gather", graph.op("Shape", ids), graph.constant(1, "int64"), axis=0)
    positions = graph.op("Range", graph.constant(0, "int64"), length, graph.constant(1, "int64"))
    keys = graph.op("Unsqueeze", positions, graph.constant([0], "int64"))
    queries = graph.op("Unsqueeze", positions, graph.constant([1], "int64"))
    index = _distance_index(graph, config, keys, queries)
    table = graph.weight(name, _bias_table(config, state[name], bidirectional=True))
    return graph.op("Unsqueeze", graph.op("Gather", table, index, axis=1), graph.constant([0], "int64"))


def _decoder_bias(decoder: Decoder, config: Config, state: State) -> str:
    """[rows, heads, length, total length], since every row is at its own position."""
    graph = decoder.graph
    name = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    total = graph.op("Cast", decoder.total_length, to=7)  # int64
    keys = graph.op("Range", graph.constant(0, "int64"), total, graph.constant(1, "int64"))
    queries = graph.op("Unsqueeze", decoder.positions, graph.constant([2], "int64"))
    index = _distance_index(graph, config, keys, queries)
    table = graph.weight(name, _bias_table(config, state[name], bidirectional=False))
    return graph.op("Transpose", graph.op("Gather", table, index, axis=1), perm=[1, 0, 2, 3])


def _distance_index(graph: Graph, config: Config, keys: str, queries: str) -> str:
    """Column of the bias table for every query and key; later keys, which causality hides, get some column."""
    largest = config.relative_attention_max_distance
    distance = graph.op("Sub", keys, queries)
    low, high = graph.constant(-largest, "int64"), graph.constant(largest, "int64")
    if graph.name == "decoder":
        high = graph.constant(0, "int64")
    return graph.op("Add", graph.op("Clip", distance, low, high), graph.constant(largest, "int64"))
