"""A checkpoint of any engine on two ranks is one for any other, and for one rank: the same losses follow."""

import json
import subprocess
from pathlib import Path

import pytest
import warm
from resharding import BF16, CROSSED, ENGINES, STEPS, Run

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that holds a checkpoint of every engine, and the losses of one rank without a break."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run = Run(folder / "single", asynchronous=True)
    run.train(0, STEPS)
    run.save(STEPS)
    return folder, run.train(STEPS, 2 * STEPS)


@pytest.fixture(scope="module")
def losses(saved):
    """Losses of two ranks, before and after a resume, by engines."""
    folder, _ = saved
    output = folder / "losses.json"
    done = subprocess.run(
        [warm.python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(TESTS / "resharding.py"), str(folder), str(output)],
        env=warm.environment(TESTS, GLOO_SOCKET_IFNAME="lo"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_goes_on_exactly_where_it_stopped(losses, engine):
    assert losses[f"{engine} -> {engine}"] == losses[f"{engine} unbroken"]


@pytest.mark.parametrize("engine", BF16)
def test_an_engine_in_bf16_goes_on_exactly_where_it_stopped(losses, engine):
    assert losses[f"{engine} -> {engine} bf16"] == losses[f"{engine} bf16 unbroken"]


@pytest.mark.parametrize("engine", CROSSED)
@pytest.mark.parametrize("source", [*CROSSED, "single"])
def test_every_engine_goes_on_from_every_other(saved, losses, source, engine):
    # sums in another order: float32 rounding, a few 1e-7 of each loss
    assert losses[f"{source} -> {engine}"] == pytest.approx(saved[1], rel=1e-5)


@pytest.mark.parametrize("source", BF16)
@pytest.mark.parametrize("engine", BF16)
def test_in_bf16_the_float32_weights_are_what_is_kept(losses, source, engine):
    # the first loss is of the same weights; then FSDP2 and ZeRO round to bf16 (2^-8) in different places
    first, *rest = losses[f"{source} -> {engine} bf16"]
    expected_first, *expected = losses[f"{source} bf16 unbroken"]
    assert first == pytest.approx(expected_first, rel=1e-3)
    assert rest == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("source", ENGINES)
def test_one_rank_goes_on_from_two(saved, losses, source):
    folder, unbroken = saved
    run = Run(folder / source, seed=1)
    assert run.train(run.resume(), 2 * STEPS) == pytest.approx(unbroken, rel=1e-5)
