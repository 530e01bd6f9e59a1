"""Sequence classifiers: BERT, RoBERTa and DistilBERT as one graph."""

from __future__ import annotations

from dataclasses import dataclass

from yunque.export.decoder import Heads, NewGraph, encoder_attention
from yunque.export.graph import Array, Config, Graph, State, fused, fused_bias, transposed


@dataclass(frozen=True)
class _Names:
    """Where a family keeps what."""

    embeddings: str
    layer: str  # with the layer's number in it
    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    up: str
    down: str
    output_norm: str


_BERT = _Names(
    "embeddings", "encoder.layer.{}",
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip
_DISTILBERT = _Names(
    "embeddings", "transformer.layer.{}",
    "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
    "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm",
)  # fmt: skip
_LAYER_NORM_EPSILON = 1e-12  # of DistilBERT, which fixes it in its code


def graphs(config: Config, state: State, new_graph: NewGraph, *, token_types: bool = False) -> dict[str, Graph]:
    """One graph: ``input_ids`` and ``attention_mask`` (padding on the right) to ``logits`` [rows, labels].

    With ``token_types`` a model that tells the two texts of a pair apart gets ``token_type_ids`` too.
    """
    graph = new_graph("classifier")
    ids = graph.input("input_ids", "int64", ("rows", "length"))
    mask = graph.op("Cast", graph.input("attention_mask", "int64", ("rows", "length")), to=6)  # int32
    distil = config.model_type == "distilbert"
    names = _DISTILBERT if distil else _BERT
    hidden = _embed(graph, config, state, ids, names, token_types)
    for layer in range(config.num_hidden_layers):
        hidden = _block(graph, config, state, f"{config.model_type}.{names.layer.format(layer)}", names, hidden, mask)
    first = graph.op("Gather", hidden, graph.constant(0, "int64"), axis=1)
    graph.output(_head(graph, config, state, first), "logits", "float32", ("rows", config.num_labels))
    return {"classifier": graph}


def _embed(graph: Graph, config: Config, state: State, ids: str, names: _Names, token_types: bool) -> str:
    prefix = f"{config.model_type}.{names.embeddings}"
    words, places = f"{prefix}.word_embeddings.weight", f"{prefix}.position_embeddings.weight"
    table = state[places]
    if config.model_type == "roberta":
        table = table[config.pad_token_id + 1 :]  # its positions begin behind the padding's
    types = f"{prefix}.token_type_embeddings.weight"
    token_types = token_types and types in state and state[types].shape[0] > 1
    if types in state and not token_types:
        table = table + state[types][0]  # one text: one token type
    length = graph.op("Gather", graph.op("Shape", ids), graph.constant(1, "int64"), axis=0)
    positions = graph.op("Range", graph.constant(0, "int64"), length, graph.constant(1, "int64"))
    found = graph.embedding(ids, words, state[words])
    placed = graph.op("Gather", graph.weight(f"{prefix}.position_embeddings", table), positions, axis=0)
    norm = f"{prefix}.LayerNorm"
    total = graph.op("Add", found, placed)
    if token_types:
        given = graph.input("token_type_ids", "int64", ("rows", "length"))
        total = graph.op("Add", total, graph.op("Gather", graph.weight(types, state[types]), given, axis=0))
    return graph.layer_norm(total, norm, state[f"{norm}.weight"], state[f"{norm}.bias"], _epsilon(config))


def _block(graph: Graph, config: Config, state: State, name: str, names: _Names, hidden: str, mask: str) -> str:
    epsilon = _epsilon(config)
    size = config.hidden_size // config.num_attention_heads
    parts = [f"{name}.{part}" for part in (names.query, names.key, names.value)]
    number = state[f"{parts[0]}.weight"].shape[0] // size  # from the weights, since pruned layers may differ
    weight, bias = fused(state, *(f"{p}.weight" for p in parts)), fused_bias(state, *(f"{p}.bias" for p in parts))
    heads = Heads(number, number, size)
    qkv = graph.linear_parts(hidden, f"{name}.qkv", weight, [heads.width] * 3, bias)
    mixed = encoder_attention(graph, qkv, heads, scale=size**-0.5, padding_mask=mask)
    hidden = _add_norm(graph, state, name, names.attention_output, names.attention_norm, mixed, hidden, epsilon)
    up = f"{name}.{names.up}"
    inner = graph.linear(hidden, up, transposed(state, f"{up}.weight"), state[f"{up}.bias"])
    inner = graph.activation(inner, config.activation if config.model_type == "distilbert" else config.hidden_act)
    return _add_norm(graph, state, name, names.down, names.output_norm, inner, hidden, epsilon)


def _add_norm(
    graph: Graph, state: State, name: str, linear: str, norm: str, value: str, skip: str, epsilon: float
) -> str:
    """Linear layer, residual addition and norm."""
    branch = graph.linear(value, f"{name}.{linear}", transposed(state, f"{name}.{linear}.weight"))
    gain, shift = _parameters(state, f"{name}.{norm}")
    bias_name = graph.weight(f"{name}.{linear}.bias", state[f"{name}.{linear}.bias"])
    return graph.add_layer_norm(branch, skip, f"{name}.{norm}", gain, shift, epsilon, bias_name)[0]


def _epsilon(config: Config) -> float:
    return _LAYER_NORM_EPSILON if config.model_type == "distilbert" else config.layer_norm_eps


def _parameters(state: State, name: str) -> tuple[Array, Array]:
    return state[f"{name}.weight"], state[f"{name}.bias"]


def _head(graph: Graph, config: Config, state: State, first: str) -> str:
    """From the first token's hidden state [rows, features] to the logits."""
    dense, activation, out = {
        "roberta": ("classifier.dense", "tanh", "classifier.out_proj"),
        "bert": ("bert.pooler.dense", "tanh", "classifier"),
        "distilbert": ("pre_classifier", "relu", "classifier"),
    }[config.model_type]
    pooled = graph.linear(first, dense, transposed(state, f"{dense}.weight"), state[f"{dense}.bias"])
    pooled = graph.activation(pooled, activation)
    return graph.linear(pooled, out, transposed(state, f"{out}.weight"), state[f"{out}.bias"])
