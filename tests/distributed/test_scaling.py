import pytest

from yunque.distributed.plan_layouts import Layout
from yunque.distributed.plan_model import Weight
from yunque.distributed.scaling import DEVICES, Cluster, describe, efficiency, volumes

FAST = Cluster(
    flops_per_s=1e12, mfu=0.5, nvlink_bytes_per_s=400e9, network_bytes_per_s=50e9, achieved=1.0, latency_s=0.0
)
GIGABYTE = 1e9


def test_all_reduce_takes_two_passes_in_two_levels():
    found = efficiency("ddp", 64, {"all_reduce": GIGABYTE}, 5e11, 10, FAST)
    # 2 passes of (7/8 S / NVLink + 7/8 S/8 / network) on 8 nodes of 8
    assert found.communication_s == pytest.approx(2 * (7 / 8 / 400 + 7 / 8 / 8 / 50))
    assert found.compute_s == pytest.approx(1.0)
    assert found.exposed == pytest.approx(1 / (1 + found.communication_s))
    assert found.overlapped == 1.0


def test_one_node_does_not_use_the_network():
    slow = Cluster(network_bytes_per_s=1.0, latency_s=0.0)
    assert efficiency("ddp", 8, {"all_reduce": GIGABYTE}, 1e12, 1, slow).communication_s < 1


def test_hybrid_sends_only_gradients_between_nodes():
    volume = {"all_gather": 4 * GIGABYTE, "reduce_scatter": 2 * GIGABYTE}
    sharded, hybrid = (efficiency(name, 512, volume, 1e12, 10, FAST) for name in ("fsdp2", "hybrid"))
    assert sharded.communication_s == pytest.approx(6 * (7 / 8 / 400 + 63 / 64 / 8 / 50))
    assert hybrid.communication_s == pytest.approx(6 * 7 / 8 / 400 + 2 * 63 / 64 * 2 / 8 / 50)


def test_more_devices_are_never_more_efficient():
    for strategy in ("ddp", "fsdp2", "hybrid"):
        volume = {"all_reduce": GIGABYTE} if strategy == "ddp" else {"all_gather": GIGABYTE, "reduce_scatter": GIGABYTE}
        rows = [efficiency(strategy, devices, volume, 1e13, 24, Cluster()) for devices in DEVICES]
        assert [row.exposed for row in rows] == sorted((row.exposed for row in rows), reverse=True)
        assert all(0 < row.exposed <= row.overlapped <= 1 for row in rows)
    assert "512" in describe(rows, Cluster())


def test_volume_follows_what_trains():
    weights = [Weight("a", (100, 10), trains=True), Weight("b", (100, 10), trains=False)]
    assert volumes(weights, Layout("ddp", 8)) == {"all_reduce": 4000}
    assert volumes(weights, Layout("fsdp2", 8)) == {"all_gather": 8000, "reduce_scatter": 2000}
    assert volumes(weights, Layout("ddp", 1)) == {}
