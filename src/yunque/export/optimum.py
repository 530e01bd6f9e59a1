"""The graphs that optimum-onnx loads: its names of inputs and outputs, caches that go in and come out longer.

``ORTModelForSeq2SeqLM`` takes ``decoder_model`` for the first token and ``decoder_with_past_model`` for the others; of
its merged form it makes the empty cache as wide as d_model / num_heads says, which is wrong for FLAN-T5 small and every
other model whose heads have a width of their own. ``ORTModelForCausalLM`` takes one graph for both, ``model``.
The weights lie in the one file that all graphs of a folder share.
"""

from __future__ import annotations

from yunque.export.decoder import MASKED, Decoder, Heads, NewGraph, Parts, Rotary
from yunque.export.graph import Array, Graph


def graphs(parts: Parts, new_graph: NewGraph) -> dict[str, Graph]:
    """The graphs by the names of their files."""
    if parts.encode is None or parts.cross is None:
        model = new_graph("decoder")
        parts.decode(CausalDecoder(model))
        return {"model": model}
    encoder, first, later = new_graph("encoder"), new_graph("decoder"), new_graph("decoder")
    hidden = parts.encode(encoder)
    encoder.output(hidden, "last_hidden_state", "float32", ("batch_size", "encoder_length", "features"))
    begun = FirstDecoder(first)
    begun.set_cross(parts.cross(first, begun.hidden))
    parts.decode(begun)
    parts.decode(LaterDecoder(later))
    return {"encoder_model": encoder, "decoder_model": first, "decoder_with_past_model": later}


class OptimumDecoder(Decoder):
    """What the three kinds share: attention over keys and values that are longer by the new tokens at every step."""

    prefix = ""  # of the self-attention's keys and values in the names of seq2seq models

    def __init__(self, graph: Graph) -> None:
        """Declare the tokens only; every kind adds its own inputs."""
        self.graph = graph
        self.input_ids = graph.input("input_ids", "int64", ("batch_size", "length"))
        self._mask = ""

    def past(self, layer: int, heads: Heads) -> tuple[str, str] | None:
        """The keys and values [batch, heads, past, size] of the former tokens, as inputs."""
        names = (f"past_key_values.{layer}.{self.prefix}{kind}" for kind in ("key", "value"))
        # optimum-onnx makes a first, empty cache by hidden_size / num_heads: a named size lets it be of another width.
        shape = ("batch_size", heads.num_key_value, "past_length", "head_size")
        key, value = (self.graph.input(name, "float32", shape) for name in names)
        return key, value

    def mask(self, keys: str, window: int) -> str:
        """What the scores [batch, heads, length, total] are added to: very low at keys that a query may not see."""
        raise NotImplementedError

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
        """As ``Decoder.cached_attention``, with the longer keys and values as outputs."""
        graph, group = self.graph, heads.num_query // heads.num_key_value
        if not keys:
            width = heads.num_key_value * heads.size
            queries, keys, values = graph.split(queries, [heads.width, width, width], axis=-1)
        if rotary is not None:
            queries, keys = self.rotate(rotary, queries), self.rotate(rotary, keys)
        new = [self._by_head(value, heads.num_key_value, heads.size) for value in (keys, values)]
        past = self.past(layer, heads)
        whole = []
        for kind, former, value in zip(("key", "value"), past or ("", ""), new, strict=True):
            value = graph.op("Concat", former, value, axis=2) if former else value
            name = f"present.{layer}.{self.prefix}{kind}"
            graph.output(value, name, "float32", ("batch_size", heads.num_key_value, "total_length", heads.size))
            whole.append(name)
        rows = self._by_head(queries, heads.num_query, heads.size)
        if group > 1:  # the queries that share a key-value head stand under each other
            rows = graph.op("Reshape", rows, graph.constant([0, heads.num_key_value, -1, heads.size], "int64"))
        scores = graph.contrib("FusedMatMul", rows, whole[0], transB=1, alpha=scale)
        if group > 1:
            scores = graph.op("Reshape", scores, graph.constant([0, heads.num_query, -1, 0], "int64"))
        scores = graph.op("Add", scores, bias) if bias else scores
        weights = graph.op("Softmax", graph.op("Add", scores, self.mask(whole[0], window)), axis=-1)
        if group > 1:
            weights = graph.op("Reshape", weights, graph.constant([0, heads.num_key_value, -1, 0], "int64"))
        mixed = graph.op("MatMul", weights, whole[1])
        if group > 1:
            mixed = graph.op("Reshape", mixed, graph.constant([0, heads.num_query, -1, heads.size], "int64"))
        mixed = graph.op("Transpose", mixed, perm=[0, 2, 1, 3])
        return graph.op("Reshape", mixed, graph.constant([0, 0, heads.width], "int64"))

    def logits(
        self, hidden: str, name: str, weight: Array, *, key: str, scale: float = 1.0, bias: Array | None = None
    ) -> None:
        """The output ``logits`` [batch, length, vocabulary], of all tokens."""
        graph, (vocabulary, features) = self.graph, weight.shape
        inputs = [graph.op("Reshape", hidden, graph.constant([-1, features], "int64")), graph.weight(name, weight, key)]
        if bias is not None and bias.any():
            inputs.append(graph.weight(f"{name}.bias", bias.reshape(-1)))
        flat = graph.op("Gemm", *inputs, transB=1, alpha=scale)
        shape = graph.op("Concat", graph.op("Shape", self.input_ids), graph.constant([vocabulary], "int64"), axis=0)
        graph.output(graph.op("Reshape", flat, shape), "logits", "float32", ("batch_size", "length", vocabulary))

    def _by_head(self, value: str, heads: int, size: int) -> str:
        """[batch, length, heads * size] as [batch, heads, length, size]."""
        graph = self.graph
        split = graph.op("Reshape", value, graph.constant([0, 0, heads, size], "int64"))
        return graph.op("Transpose", split, perm=[0, 2, 1, 3])

    def _low_where(self, hidden: str) -> str:
        graph = self.graph
        return graph.op("Where", hidden, graph.constant(MASKED, "float32"), graph.constant(0.0, "float32"))

    def _size(self, value: str, axis: int) -> str:
        return self.graph.op("Gather", self.graph.op("Shape", value), self.graph.constant(axis, "int64"), axis=0)

    def _range(self, begin: str, end: str) -> str:
        return self.graph.op("Range", begin, end, self.graph.constant(1, "int64"))

    def _later_keys(self, length: str, total: str, window: int = -1) -> str:
        """[length, total]: true at keys behind a query, or before its window; queries are the last of the keys."""
        graph = self.graph
        queries = self._range(graph.op("Sub", total, length), total)
        queries = graph.op("Unsqueeze", queries, graph.constant([1], "int64"))
        keys = self._range(graph.constant(0, "int64"), total)
        hidden = graph.op("Greater", keys, queries)
        if window > 0:
            first = graph.op("Sub", queries, graph.constant(window, "int64"))
            hidden = graph.op("Or", hidden, graph.op("LessOrEqual", keys, first))
        return hidden


class CausalDecoder(OptimumDecoder):
    """A decoder-only model, whose padding is on the left: an empty cache begins a text."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self._attention_mask = graph.input("attention_mask", "int64", ("batch_size", "total_length"))
        self.positions = graph.input("position_ids", "int64", ("batch_size", "length"))
        self._masks: dict[int, str] = {}

    def mask(self, keys: str, window: int) -> str:
        """[batch, 1, length, total], made once per size of the window."""
        if window not in self._masks:
            graph = self.graph
            length, total = self._size(self.input_ids, 1), self._size(self._attention_mask, 1)
            padding = graph.op("Equal", self._attention_mask, graph.constant(0, "int64"))
            padding = graph.op("Unsqueeze", padding, graph.constant([1, 2], "int64"))
            hidden = graph.op("Or", self._later_keys(length, total, window), padding)
            self._masks[window] = self._low_where(hidden)
        return self._masks[window]


class _Seq2SeqDecoder(OptimumDecoder):
    """A decoder whose texts all begin in the same step, so that none has padding."""

    prefix = "decoder."

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self._encoder_mask = graph.input("encoder_attention_mask", "int64", ("batch_size", "encoder_length"))

    def cross_bias(self) -> str:
        """As ``Decoder.cross_bias``, from the mask of the encoder's tokens."""
        graph = self.graph
        padding = graph.op("Equal", self._encoder_mask, graph.constant(0, "int64"))
        return self.for_queries(self._low_where(graph.op("Unsqueeze", padding, graph.constant([1, 2], "int64"))))

    def _place(self, past: str) -> None:
        """Positions [1, length] behind ``past`` tokens, which all rows share."""
        graph = self.graph
        total = graph.op("Add", past, self._size(self.input_ids, 1))
        self.total_length = total
        self.positions = graph.op("Unsqueeze", self._range(past, total), graph.constant([0], "int64"))


class FirstDecoder(_Seq2SeqDecoder):
    """Begins a text: makes the cross-attention's keys and values and gives them back."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.hidden = graph.input("encoder_hidden_states", "float32", ("batch_size", "encoder_length", "features"))
        self._cross: list[tuple[str, str]] = []
        self._place(graph.constant(0, "int64"))

    def set_cross(self, layers: list[tuple[list[str], Heads]]) -> None:
        """Take every layer's keys and values, which become outputs [batch, heads, source, size]."""
        graph = self.graph
        for layer, (parts, heads) in enumerate(layers):
            names = []
            for kind, part in zip(("key", "value"), parts, strict=True):
                name = f"present.{layer}.encoder.{kind}"
                shape = ("batch_size", heads.num_query, "encoder_length", heads.size)
                graph.output(self._by_head(part, heads.num_query, heads.size), name, "float32", shape)
                names.append(name)
            self._cross.append((names[0], names[1]))

    def cross_cache(self, layer: int, heads: Heads) -> tuple[str, str]:
        """Its own outputs."""
        return self._cross[layer]

    def past(self, layer: int, heads: Heads) -> None:
        """Nothing came before."""

    def mask(self, keys: str, window: int) -> str:
        """[length, length], made once."""
        if not self._mask:
            length = self._size(self.input_ids, 1)
            self._mask = self._low_where(self._later_keys(length, length, window))
        return self._mask


class LaterDecoder(_Seq2SeqDecoder):
    """Goes on with a text."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self._place(self._size("past_key_values.0.decoder.key", 2))

    def cross_cache(self, layer: int, heads: Heads) -> tuple[str, str]:
        """What the first step gave back, declared behind the layer's own: optimum-onnx goes by the order."""
        graph = self.graph
        shape = ("batch_size", heads.num_query, "encoder_length", heads.size)
        keys, values = (
            graph.input(f"past_key_values.{layer}.encoder.{kind}", "float32", shape) for kind in ("key", "value")
        )
        return keys, values

    def mask(self, keys: str, window: int) -> str:
        """[length, total], made once; it hides something where several tokens are given at once."""
        if not self._mask:
            total = self._size(keys, 2)
            self._mask = self._low_where(self._later_keys(self._size(self.input_ids, 1), total, window))
        return self._mask
