"""Numbers of TRL 0.11.4, and comparison with them.

The recorded floats have 8 significant digits and come from float32 arithmetic: 1e-5 relative is rounding. Where a
number is a sum that cancels, an absolute tolerance of its terms' rounding stands beside it.
"""

import json
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parents[2] / "shared" / "peers" / "ppo_golden.json"


@pytest.fixture(scope="session")
def golden():
    """What shared/peers/make_ppo_golden.py recorded."""
    if not GOLDEN.is_file():
        pytest.skip(f"no {GOLDEN}")
    return json.loads(GOLDEN.read_text())


@pytest.fixture
def one_thread():
    """The numbers were recorded with one thread; with two, float32 sums come out in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close(ours, theirs, atol=1e-6):
    torch.testing.assert_close(torch.as_tensor(ours).float(), torch.as_tensor(theirs).float(), rtol=1e-5, atol=atol)


def tensors(section, *names):
    return [torch.tensor(section[name]) for name in names]
