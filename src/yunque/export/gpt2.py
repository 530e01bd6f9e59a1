"""GPT-2 as a decoder."""

from __future__ import annotations

from yunque.export.decoder import Decoder, Heads
from yunque.export.graph import Config, Graph, State, untransposed

EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"


def decode(decoder: Decoder, config: Config, state: State, tied: bool) -> None:
    """Everything from tokens to logits; ``tied`` says that the head is the embedding."""
    graph = decoder.graph
    places = "transformer.wpe.weight"
    found = graph.embedding(decoder.input_ids, EMBEDDING, state[EMBEDDING], HEAD if tied else "")
    placed = graph.op("Gather", graph.weight(places, state[places]), decoder.positions, axis=0)
    residual = graph.op("Add", found, placed)
    norm = _Norms(graph, config, state)
    branch = ("", "")
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}"
        normed, residual = norm(residual, branch, f"{name}.ln_1")
        # GPT-2's layers keep their weights as [in, out], queries, keys and values already side by side.
        qkv = graph.linear(
            normed, f"{name}.qkv", untransposed(state, f"{name}.attn.c_attn.weight"), state[f"{name}.attn.c_attn.bias"]
        )
        mixed = decoder.cached_attention(qkv, layer, _heads(config, state, name), scale=_scale(config, layer))
        branch = _product(graph, state, mixed, f"{name}.attn.c_proj")
        normed, residual = norm(residual, branch, f"{name}.ln_2")
        up = f"{name}.mlp.c_fc"
        inner = graph.linear(normed, up, untransposed(state, f"{up}.weight"), state[f"{up}.bias"])
        inner = graph.activation(inner, config.activation_function)
        branch = _product(graph, state, inner, f"{name}.mlp.c_proj")
    hidden, _ = norm(residual, branch, "transformer.ln_f")
    decoder.logits(hidden, HEAD, state[HEAD], key=EMBEDDING if tied else HEAD)


class _Norms:
    """The norm before each sublayer, with the former sublayer's bias and addition in the same node."""

    def __init__(self, graph: Graph, config: Config, state: State) -> None:
        self.graph = graph
        self.epsilon = config.layer_norm_epsilon
        self.state = state

    def __call__(self, residual: str, branch: tuple[str, str], name: str) -> tuple[str, str]:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        value, value_bias = branch
        if not value:
            return self.graph.layer_norm(residual, name, weight, bias, self.epsilon), residual
        return self.graph.add_layer_norm(value, residual, name, weight, bias, self.epsilon, value_bias)


def _product(graph: Graph, state: State, value: str, name: str) -> tuple[str, str]:
    """``value`` times the weight of ``name``, and its bias for the next norm to add."""
    product = graph.linear(value, name, untransposed(state, f"{name}.weight"))
    return product, graph.weight(f"{name}.bias", state[f"{name}.bias"])


def _heads(config: Config, state: State, name: str) -> Heads:
    size = config.n_embd // config.n_head
    number = state[f"{name}.attn.c_proj.weight"].shape[0] // size  # from the weights, since pruned layers may differ
    return Heads(number, number, size)


def _scale(config: Config, layer: int) -> float:
    scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale
