"""BART as an encoder and a decoder."""

from __future__ import annotations

from yunque.export.decoder import Decoder, Heads, encoder_attention
from yunque.export.graph import Array, Config, Graph, Matrix, State, fused, fused_bias, transposed

EMBEDDING = "model.shared.weight"
HEAD = "lm_head.weight"
_OFFSET = 2  # of BART's table of positions
_EPSILON = 1e-5  # of its norms, torch's default


def encode(graph: Graph, config: Config, state: State, tied: bool) -> str:
    """The encoder's hidden states; ``tied`` says that the decoder's head is the embedding."""
    ids = graph.input("input_ids", "int64", ("rows", "source"))
    mask = graph.op("Cast", graph.input("attention_mask", "int64", ("rows", "source")), to=6)  # int32
    length = graph.op("Gather", graph.op("Shape", ids), graph.constant(1, "int64"), axis=0)
    positions = graph.op("Range", graph.constant(0, "int64"), length, graph.constant(1, "int64"))
    hidden = _embed(graph, config, state, "model.encoder", ids, positions, tied)
    for layer in range(config.encoder_layers):
        name = f"model.encoder.layers.{layer}"
        own = f"{name}.self_attn"
        heads = _heads(config.d_model // config.encoder_attention_heads, state, own)
        weights, biases = _projected(state, own, "qkv")
        qkv = graph.linear_parts(hidden, f"{own}.qkv", weights, [heads.width] * 3, biases)
        mixed = encoder_attention(graph, qkv, heads, scale=heads.size**-0.5, padding_mask=mask)
        hidden = _add_norm(graph, state, f"{own}.out_proj", f"{own}_layer_norm", mixed, hidden)
        hidden = _feed_forward(graph, config, state, name, hidden)
    return hidden


def cross(graph: Graph, config: Config, state: State, hidden: str) -> list[tuple[list[str], Heads]]:
    """Keys and values of every decoder layer from the encoder's hidden states."""
    size = config.d_model // config.decoder_attention_heads
    layers = []
    for layer in range(config.decoder_layers):
        name = f"model.decoder.layers.{layer}.encoder_attn"
        heads = _heads(size, state, name)
        weights, biases = _projected(state, name, "kv")
        layers.append((graph.linear_parts(hidden, f"{name}.kv", weights, [heads.width] * 2, biases), heads))
    return layers


def decode(decoder: Decoder, config: Config, state: State, tied: bool) -> None:
    """Everything from tokens to logits; ``tied`` says that the head is the embedding."""
    graph = decoder.graph
    cross_bias = decoder.cross_bias()
    hidden = _embed(graph, config, state, "model.decoder", decoder.input_ids, decoder.positions, tied)
    size = config.d_model // config.decoder_attention_heads
    for layer in range(config.decoder_layers):
        name = f"model.decoder.layers.{layer}"
        own, cross = f"{name}.self_attn", f"{name}.encoder_attn"
        qkv = _projection(graph, state, hidden, own, "qkv")
        mixed = decoder.cached_attention(qkv, layer, _heads(size, state, own), scale=size**-0.5)
        hidden = _add_norm(graph, state, f"{own}.out_proj", f"{own}_layer_norm", mixed, hidden)
        queries = _projection(graph, state, hidden, cross, "q")
        heads = _heads(size, state, cross)
        mixed = decoder.cross_attention(queries, layer, heads, scale=size**-0.5, bias=cross_bias)
        hidden = _add_norm(graph, state, f"{cross}.out_proj", f"{cross}_layer_norm", mixed, hidden)
        hidden = _feed_forward(graph, config, state, name, hidden)
    bias = state["final_logits_bias"]
    decoder.logits(hidden, HEAD, state[HEAD], key=EMBEDDING if tied else HEAD, bias=bias)


def _embed(graph: Graph, config: Config, state: State, prefix: str, ids: str, positions: str, tied: bool) -> str:
    name = f"{prefix}.embed_tokens.weight"
    shared = state[name].ctypes.data == state[EMBEDDING].ctypes.data  # unless the model was made untied
    found = graph.embedding(ids, EMBEDDING if shared else name, state[name], HEAD if shared and tied else "")
    if config.scale_embedding:
        found = graph.op("Mul", found, graph.constant(config.d_model**0.5, "float32"))
    table = f"{prefix}.embed_positions.weight"
    placed = graph.op("Gather", graph.weight(table, state[table][_OFFSET:]), positions, axis=0)
    norm = f"{prefix}.layernorm_embedding"
    total = graph.op("Add", found, placed)
    return graph.layer_norm(total, norm, state[f"{norm}.weight"], state[f"{norm}.bias"], _EPSILON)


def _projection(graph: Graph, state: State, value: str, name: str, parts: str) -> str:
    """The projections ``parts``, such as q, k and v, of an attention layer side by side."""
    return graph.linear(value, f"{name}.{parts}", *_projected(state, name, parts))


def _projected(state: State, name: str, parts: str) -> tuple[Matrix, Array | None]:
    weights, biases = ([f"{name}.{part}_proj.{kind}" for part in parts] for kind in ("weight", "bias"))
    return fused(state, *weights), fused_bias(state, *biases)


def _feed_forward(graph: Graph, config: Config, state: State, name: str, hidden: str) -> str:
    up = f"{name}.fc1"
    inner = graph.linear(hidden, up, transposed(state, f"{up}.weight"), state[f"{up}.bias"])
    inner = graph.activation(inner, config.activation_function)
    return _add_norm(graph, state, f"{name}.fc2", f"{name}.final_layer_norm", inner, hidden)


def _add_norm(graph: Graph, state: State, linear: str, norm: str, value: str, skip: str) -> str:
    """Linear layer, residual addition and norm."""
    branch = graph.linear(value, linear, transposed(state, f"{linear}.weight"))
    bias = graph.weight(f"{linear}.bias", state[f"{linear}.bias"])
    parameters = (state[f"{norm}.weight"], state[f"{norm}.bias"])
    return graph.add_layer_norm(branch, skip, norm, *parameters, _EPSILON, bias)[0]


def _heads(size: int, state: State, attention: str) -> Heads:
    """From the weights, since pruned layers may differ."""
    number = state[f"{attention}.q_proj.weight"].shape[0] // size
    return Heads(number, number, size)
