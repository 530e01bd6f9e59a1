"""How much of one GPU's speed is left on many: a model on paper, from compute and communication of one step.

Every device works on the same number of rows, however many devices there are. A collective of S bytes over M nodes of
G devices runs in NCCL's two levels: through NVLink inside a node, and with each device's own network card between
nodes, which moves 1 / G of the bytes (see docs/scaling.md for the formulas and what they leave out).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from yunque.distributed.plan import Request
from yunque.distributed.plan_layouts import Layout
from yunque.distributed.plan_model import Weight, build, read_config, weights_of

DEVICES = (8, 64, 512)
Strategy = Literal["ddp", "fsdp2", "hybrid"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp2", "hybrid")

_DDP_BUCKET_BYTES = 25 * 2**20
_FLOAT32, _BFLOAT16 = 4, 2


@dataclass(frozen=True)
class Cluster:
    """Speed of a device and its links, one direction each; the defaults are an H100 node with NDR InfiniBand."""

    flops_per_s: float = 989e12  # dense bf16, data sheet
    mfu: float = 0.4  # share of it that one device reaches
    devices_per_node: int = 8
    nvlink_bytes_per_s: float = 450e9
    network_bytes_per_s: float = 50e9  # 400 Gb/s for each device
    achieved: float = 0.8  # share of a link's bandwidth that a large collective reaches
    latency_s: float = 10e-6  # of one hop of one collective


@dataclass(frozen=True)
class Efficiency:
    """Share of linear speed-up: with no communication hidden behind compute, and with all of it hidden."""

    strategy: Strategy
    devices: int
    compute_s: float
    communication_s: float

    @property
    def exposed(self) -> float:
        """Nothing overlaps."""
        return self.compute_s / (self.compute_s + self.communication_s)

    @property
    def overlapped(self) -> float:
        """All overlaps."""
        return self.compute_s / max(self.compute_s, self.communication_s)


def volumes(weights: Iterable[Weight], layout: Layout) -> dict[str, int]:
    """Bytes of each collective in one optimizer step, as ``accounting.Meter`` counts them."""
    several = list(weights)
    trained = sum(weight.count for weight in several if weight.trains)
    every = sum(weight.count for weight in several)
    if layout.data_ranks == 1:
        return {}
    if layout.profile in ("ddp", "tp"):
        return {"all_reduce": _FLOAT32 * trained}
    if layout.profile in ("zero1", "zero2"):  # DeepSpeed averages with all-reduce on gloo, reduces on NCCL
        return {"all_reduce": _BFLOAT16 * trained, "all_gather": _BFLOAT16 * trained}
    return {"all_gather": 2 * _BFLOAT16 * every, "reduce_scatter": _BFLOAT16 * trained}


def efficiency(
    strategy: Strategy, devices: int, volume: Mapping[str, float], flops: float, layers: int, cluster: Cluster
) -> Efficiency:
    """Efficiency of ``devices``, each with ``volume`` bytes by collective and ``flops`` in a step."""
    inside = min(devices, cluster.devices_per_node)
    nodes = max(1, devices // cluster.devices_per_node)
    reduced, scattered, gathered = (volume.get(name, 0.0) for name in ("all_reduce", "reduce_scatter", "all_gather"))
    if strategy == "hybrid":  # gather and scatter inside the node, then average each device's shard between nodes
        seconds = _pass(gathered + scattered, inside, 1, cluster) + 2 * _between(scattered / inside, nodes, cluster)
        collectives = 3 * layers
    else:
        seconds = _pass(gathered + scattered + 2 * reduced, inside, nodes, cluster)
        collectives = 3 * layers if strategy == "fsdp2" else 2 * math.ceil(reduced / _DDP_BUCKET_BYTES)
    hops = inside - 1 + math.ceil(math.log2(nodes))
    seconds += collectives * hops * cluster.latency_s
    return Efficiency(strategy, devices, flops / (cluster.flops_per_s * cluster.mfu), seconds)


def table(request: Request, cluster: Cluster | None = None) -> list[Efficiency]:
    """Efficiency of every strategy on every number of devices, for the optimizer step of one forward pass.

    Raises:
        InputError: no such model.
    """
    cluster = cluster or Cluster()
    config = read_config(request.model)
    weights = weights_of(build(config, request.model), request.model, value_head=request.method == "ppo")
    text = config.get_text_config(decoder=True)
    layers = text.num_hidden_layers + (getattr(text, "num_decoder_layers", 0) if config.is_encoder_decoder else 0)
    tokens = request.batch.rows * (request.batch.prompt_tokens + request.batch.answer_tokens)
    # forward 2, gradients of activations 2, gradients of weights 2: the last only of what trains (Kaplan et al., 2020)
    flops = tokens * sum((6 if weight.trains else 4) * weight.count for weight in weights)
    found = []
    for strategy in STRATEGIES:
        profile = "ddp" if strategy == "ddp" else "fsdp2"
        for devices in DEVICES:
            volume = volumes(weights, Layout(profile, devices))
            found.append(efficiency(strategy, devices, volume, flops, layers, cluster))
    return found


def describe(rows: Iterable[Efficiency], cluster: Cluster) -> str:
    """Lines for the terminal."""
    lines = [
        f"scaling on paper: {cluster.flops_per_s / 1e12:,.0f} TFLOP/s at {cluster.mfu:.0%}, "
        f"{cluster.devices_per_node} GPUs a node, NVLink {cluster.nvlink_bytes_per_s / 1e9:,.0f} GB/s, network "
        f"{cluster.network_bytes_per_s / 1e9:,.0f} GB/s a GPU, {cluster.achieved:.0%} of them reached",
        f"{'strategy':<10}{'GPUs':>6}{'compute':>11}{'links':>11}{'nothing hidden':>16}{'all hidden':>12}",
    ]
    for row in rows:
        lines.append(
            f"{row.strategy:<10}{row.devices:>6}{1e3 * row.compute_s:>8.1f} ms{1e3 * row.communication_s:>8.1f} ms"
            f"{row.exposed:>16.1%}{row.overlapped:>12.1%}"
        )
    return "\n".join(lines)


def _pass(size: float, inside: int, nodes: int, cluster: Cluster) -> float:
    """Seconds of one pass (gather or scatter) of ``size`` bytes: (G-1)/G S inside a node, (M-1)/M S/G between nodes."""
    share = (inside - 1) / inside * size / (cluster.nvlink_bytes_per_s * cluster.achieved)
    return share + _between(size / inside, nodes, cluster)


def _between(size: float, nodes: int, cluster: Cluster) -> float:
    return (nodes - 1) / nodes * size / (cluster.network_bytes_per_s * cluster.achieved)
