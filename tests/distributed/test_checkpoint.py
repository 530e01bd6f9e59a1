import json
import signal

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from yunque.distributed.checkpoint import Checkpoints, StopSignal
from yunque.errors import InputError


class Net(nn.Module):
    """A frozen layer, one that trains, and a head tied to it."""

    def __init__(self, size=4):
        super().__init__()
        self.frozen = nn.Linear(size, size).requires_grad_(False)
        self.trained = nn.Linear(size, size, bias=False)
        self.head = nn.Linear(size, size, bias=False)
        self.head.weight = self.trained.weight

    def forward(self, x):
        return self.head(self.trained(self.frozen(x)))


class Run:
    """What a training run prepares: model, optimizer and checkpoints."""

    def __init__(self, folder, *, seed, keep=2, size=4):
        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True)
        net = Net(size)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.1)
        self.net, self.optimizer = self.accelerator.prepare(net, optimizer)
        self.checkpoints = Checkpoints(folder, self.accelerator, keep=keep)

    def train(self, steps=1):
        for _ in range(steps):
            self.accelerator.backward(self.net(torch.ones(1, self.net.frozen.in_features)).square().sum())
            self.optimizer.step()
            self.optimizer.zero_grad()

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.net.named_parameters()}


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, seed=0)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_weights_optimizer_and_state_come_back(run, tmp_path):
    run.train(3)
    run.checkpoints.save(3, {"kl_coef": 0.19})
    saved = run.weights()
    run.train(2)
    other = Run(tmp_path, seed=1)
    assert other.checkpoints.latest() == {"step": 3, "kl_coef": 0.19}
    other.checkpoints.load(3)
    torch.testing.assert_close(other.weights()["trained.weight"], saved["trained.weight"], rtol=0, atol=0)
    assert other.net.head.weight is other.net.trained.weight
    with torch.no_grad():
        other.net.frozen.load_state_dict(run.net.frozen.state_dict())  # frozen weights are the caller's to rebuild
    other.train(2)  # the same only with Adam's moments
    torch.testing.assert_close(other.weights(), run.weights(), rtol=0, atol=0)


def test_random_states_come_back(run):
    run.checkpoints.save(1, {})
    drawn = torch.rand(3)
    run.checkpoints.load(1)
    assert torch.equal(torch.rand(3), drawn)


def test_frozen_weights_are_not_saved_and_not_touched_by_loading(run, tmp_path):
    run.checkpoints.save(1, {})
    (weights,) = (tmp_path / "step-000001").glob("*.safetensors")
    assert set(load_file(weights)) == {"trained.weight"}  # the tied head is the same tensor
    with torch.no_grad():
        run.net.frozen.weight.fill_(7.0)
    run.checkpoints.load(1)
    assert (run.net.frozen.weight == 7.0).all()


def test_no_checkpoint_is_none(run):
    assert run.checkpoints.latest() is None


def test_only_the_newest_are_kept(tmp_path):
    run = Run(tmp_path, seed=0, keep=2)
    for step in (5, 90, 100, 1000):
        run.checkpoints.save(step, {})
    assert names(tmp_path) == ["step-000100", "step-001000"]
    assert run.checkpoints.latest()["step"] == 1000


def test_a_step_saved_again_replaces_the_former(run, tmp_path):
    run.checkpoints.save(1, {"kl_coef": 0.2})
    run.checkpoints.save(1, {"kl_coef": 0.3})
    assert run.checkpoints.latest() == {"step": 1, "kl_coef": 0.3}
    assert names(tmp_path) == ["step-000001"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=lambda e: type(e).__name__
)
def test_a_save_that_fails_leaves_no_trace_and_the_former_checkpoint_intact(run, tmp_path, monkeypatch, error):
    run.train()
    run.checkpoints.save(1, {})
    saved = run.weights()
    run.train()
    save_state = run.accelerator.save_state

    def fail(folder):
        save_state(folder)
        raise error

    monkeypatch.setattr(run.accelerator, "save_state", fail)
    with pytest.raises(type(error)):
        run.checkpoints.save(2, {})
    assert names(tmp_path) == ["step-000001"]
    assert run.checkpoints.latest()["step"] == 1
    run.checkpoints.load(1)
    torch.testing.assert_close(run.weights(), saved, rtol=0, atol=0)


def test_what_a_kill_left_half_written_is_no_checkpoint_and_in_nobody_s_way(run, tmp_path):
    run.checkpoints.save(1, {})
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "step-000009").mkdir()  # without its state
    assert run.checkpoints.latest()["step"] == 1
    run.checkpoints.save(2, {})
    assert not (tmp_path / ".partial").exists()
    assert (tmp_path / "step-000002" / "model.safetensors").stat().st_size > 4


def test_a_checkpoint_of_another_model_is_refused(run, tmp_path):
    run.train()
    run.checkpoints.save(1, {})
    with pytest.raises(InputError, match=r"(?s)resume: .*step-000001 does not fit this run: .*size mismatch"):
        Run(tmp_path, seed=0, size=5).checkpoints.load(1)


def test_the_state_is_json_beside_the_weights(run, tmp_path):
    run.checkpoints.save(7, {"kl_coef": 0.2, "config": {"learning_rate": 1e-5}})
    state = json.loads((tmp_path / "step-000007" / "state.json").read_text())
    assert state == {"step": 7, "kl_coef": 0.2, "config": {"learning_rate": 1e-5}}


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_is_noted_and_former_handlers_come_back(number):
    accelerator, former = Accelerator(cpu=True), signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.agreed(accelerator)
        signal.raise_signal(number)
        assert stop.agreed(accelerator)
    assert signal.getsignal(number) is former


def test_repeated_sigterm_is_patient_and_a_second_interrupt_is_not():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.noted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
