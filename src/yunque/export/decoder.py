"""What the decoder graphs of all families share: their inputs, cached attention, cross attention, the head.

One graph serves prompts and single tokens. Keys and values of row b lie at the start of its slice of the cache,
whatever the other rows hold; the caller gives the same buffer as past and as present, and the graph writes into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from yunque.errors import InputError
from yunque.export import quantized
from yunque.export.graph import Array, Graph

MASKED = float(np.finfo(np.float32).min) / 2  # two of them still add up to a number


@dataclass(frozen=True)
class Heads:
    """The attention heads of one layer."""

    num_query: int
    num_key_value: int
    size: int

    def __post_init__(self) -> None:
        """Check what ONNX Runtime's kernel asks for."""
        if self.size % 8:
            raise InputError(f"model_name_or_path: heads of {self.size} features; ONNX Runtime needs a multiple of 8")

    @property
    def width(self) -> int:
        """Features of all queries."""
        return self.num_query * self.size


@dataclass(frozen=True)
class Parts:
    """What a family's graphs are put together from, in whatever layout; the first two of encoder-decoders only."""

    encode: Callable[[Graph], str] | None  # the encoder's hidden states
    cross: Callable[[Graph, str], list[tuple[list[str], Heads]]] | None  # from them each layer's keys and values
    decode: Callable[[Decoder], None]  # everything from tokens to logits


NewGraph = Callable[[str], Graph]
"""An empty graph of this name over the common weights file."""


@dataclass(frozen=True)
class Rotary:
    """Rotary embeddings: two tables [positions, head size / 2]."""

    cos: Array
    sin: Array


class Decoder:
    """A decoder graph under construction, with the inputs every decoder has."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.input_ids = graph.input("input_ids", "int64", ("rows", "length"))
        self.positions = graph.input("positions", "int64", ("rows", "length"))
        self.last_position = graph.input("last_position", "int32", ("rows",))
        self.total_length = graph.input("total_length", "int32", ())
        self.logit_rows = graph.input("logit_rows", "int64", ("logit_rows",))

    def cached_attention(
        self,
        queries: str,
        layer: int,
        heads: Heads,
        *,
        keys: str = "",
        values: str = "",
        scale: float,
        bias: str = "",
        rotary: Rotary | None = None,
        window: int = -1,
    ) -> str:
        """Causal attention over the cache of ``layer`` and the new tokens, which it puts there.

        ``queries`` holds queries, keys and values side by side when ``keys`` and ``values`` are not given. The same
        node rotates queries and keys when ``rotary`` is given.
        """
        graph = self.graph
        shape = ("rows", heads.num_key_value, "room", heads.size)
        past = [graph.input(f"past_{kind}.{layer}", "float32", shape) for kind in ("key", "value")]
        tables = ("", "")
        if rotary is not None:
            tables = (graph.weight("rotary.cos", rotary.cos), graph.weight("rotary.sin", rotary.sin))
        output, *present = graph.ops(
            "GroupQueryAttention",
            *(queries, keys, values, *past, self.last_position, self.total_length, *tables, "", bias),
            num_outputs=3, domain="com.microsoft", num_heads=heads.num_query, kv_num_heads=heads.num_key_value,
            scale=scale, do_rotary=int(rotary is not None), local_window_size=window,
        )  # fmt: skip
        for kind, value in zip(("key", "value"), present, strict=True):
            graph.output(value, f"present_{kind}.{layer}", "float32", shape)
        return output

    def rotate(self, rotary: Rotary, value: str) -> str:
        """Rotary embeddings of ``value`` [rows, length, heads * size], from elementary operators."""
        graph, half = self.graph, rotary.cos.shape[1]
        by_head = graph.op("Reshape", value, graph.constant([0, 0, -1, 2 * half], "int64"))
        tables = []
        for name, table in (("rotary.cos", rotary.cos), ("rotary.sin", rotary.sin)):
            rows = graph.op("Gather", graph.weight(name, table), self.positions, axis=0)
            tables.append(graph.op("Unsqueeze", rows, graph.constant([2], "int64")))
        cos, sin = tables
        first, second = graph.split(by_head, [half] * 2, axis=-1)
        turned = [
            graph.op("Sub", graph.op("Mul", first, cos), graph.op("Mul", second, sin)),
            graph.op("Add", graph.op("Mul", second, cos), graph.op("Mul", first, sin)),
        ]
        return graph.op("Reshape", graph.op("Concat", *turned, axis=-1), graph.constant([0, 0, -1], "int64"))

    def cross_bias(self) -> str:
        """What ``cross_attention`` adds to its scores: [rows, 1, length, source], 0 at tokens, very low at padding."""
        graph = self.graph
        return self.for_queries(graph.input("cross_bias", "float32", ("rows", 1, 1, "source")))

    def for_queries(self, bias: str) -> str:
        """``bias`` [rows, 1, 1, source] as [rows, 1, length, source], which the kernel asks for."""
        graph = self.graph
        one = graph.constant([1], "int64")
        shape = graph.op("Concat", one, one, graph.op("Shape", self.input_ids, start=1), one, axis=0)
        return graph.op("Expand", bias, shape)

    def cross_attention(self, queries: str, layer: int, heads: Heads, *, scale: float, bias: str) -> str:
        """Attention over the encoder's keys and values of ``layer``, with ``cross_bias``."""
        keys, values = self.cross_cache(layer, heads)
        return self.graph.contrib(
            "MultiHeadAttention", queries, keys, values, "", "", bias, num_heads=heads.num_query, scale=scale
        )

    def cross_cache(self, layer: int, heads: Heads) -> tuple[str, str]:
        """The encoder's keys and values, each [rows, heads, source, size], made once per text."""
        shape = ("rows", heads.num_query, "source", heads.size)
        keys, values = (self.graph.input(f"cross_{kind}.{layer}", "float32", shape) for kind in ("key", "value"))
        return keys, values

    def logits(
        self, hidden: str, name: str, weight: Array, *, key: str, scale: float = 1.0, bias: Array | None = None
    ) -> None:
        """The output ``logits`` [logit rows, vocabulary]: of those rows of [rows * length] only.

        ``weight`` [vocabulary, features] lies in the weights file under ``key``, where a tied embedding already is.
        As its own initializer the head can be packed by the runtime while the embedding stays mapped from the disk.
        """
        graph = self.graph
        flat = graph.op("Reshape", hidden, graph.constant([-1, weight.shape[1]], "int64"))
        wanted = graph.op("Gather", flat, self.logit_rows, axis=0)
        logits = quantized.head(graph, wanted, name, weight, key, scale, bias)
        graph.output(logits, "logits", "float32", ("logit_rows", weight.shape[0]))


def graphs(parts: Parts, new_graph: NewGraph) -> dict[str, Graph]:
    """The graphs that our runtime reads."""
    found: dict[str, Graph] = {}
    if parts.encode is not None and parts.cross is not None:
        encoder = found["encoder"] = new_graph("encoder")
        for layer, (keys_values, heads) in enumerate(parts.cross(encoder, parts.encode(encoder))):
            cross_keys_and_values(encoder, layer, heads, keys_values)
    found["decoder"] = new_graph("decoder")
    parts.decode(Decoder(found["decoder"]))
    return found


def encoder_attention(
    graph: Graph, qkv: Sequence[str], heads: Heads, *, scale: float, padding_mask: str, bias: str = ""
) -> str:
    """Attention of every token of [rows, length] over the tokens whose ``padding_mask`` (int32) is 1.

    ``qkv`` are queries, keys and values; ``bias`` is added to the scores [1, heads, length, length].
    """
    return graph.contrib(
        "MultiHeadAttention", *qkv, "", padding_mask, bias,
        num_heads=heads.num_query, scale=scale, mask_filter_value=MASKED,
    )  # fmt: skip


def cross_keys_and_values(graph: Graph, layer: int, heads: Heads, keys_values: Sequence[str]) -> None:
    """Declare the encoder's outputs for decoder layer ``layer``: keys and values [rows, source, heads * size].

    Keys lie as values do, a row of memory per token: a step that reads them is bound by memory, and so in its order.
    """
    for kind, part in zip(("key", "value"), keys_values, strict=True):
        split = graph.op("Reshape", part, graph.constant([0, 0, heads.num_query, heads.size], "int64"))
        by_head = graph.op("Transpose", split, perm=[0, 2, 1, 3])
        graph.output(by_head, f"cross_{kind}.{layer}", "float32", ("rows", heads.num_query, "source", heads.size))
