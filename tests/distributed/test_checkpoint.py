import errno
import json
import os
import re
import shutil
import threading

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn

from yunque.distributed import checkpoint as module
from yunque.distributed.checkpoint import Checkpoints, Score, Training
from yunque.errors import InputError


class Net(nn.Module):
    """A frozen layer, one that trains, and a head tied to it."""

    def __init__(self, size=4, *, name="trained"):
        super().__init__()
        self.frozen = nn.Linear(size, size).requires_grad_(False)
        setattr(self, name, nn.Linear(size, size, bias=False))
        self.name = name
        self.head = nn.Linear(size, size, bias=False)
        self.head.weight = getattr(self, name).weight

    def forward(self, x):
        return self.head(getattr(self, self.name)(self.frozen(x)))


class Run:
    """What a training run prepares: model, optimizer and checkpoints."""

    def __init__(self, folder, *, seed=0, keep=2, asynchronous=False, **options):
        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True)
        net = Net(**options)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.1)
        self.net, self.optimizer = self.accelerator.prepare(net, optimizer)
        self.training = Training(self.net, self.optimizer)
        self.checkpoints = Checkpoints(folder, self.accelerator, keep=keep, asynchronous=asynchronous)

    def train(self, steps=1):
        for _ in range(steps):
            self.accelerator.backward(self.net(torch.ones(1, self.net.frozen.in_features)).square().sum())
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, step, state=None, **options):
        self.checkpoints.save(step, self.training, state or {}, **options)

    def load(self):
        found = self.checkpoints.newest()
        self.checkpoints.load(found, self.training)
        return found

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.net.named_parameters()}


@pytest.fixture(params=[False, True], ids=["at once", "in the background"])
def run(request, tmp_path):
    return Run(tmp_path, asynchronous=request.param)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def shard_of(folder):
    (shard,) = folder.glob("*.safetensors")
    return shard


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def test_weights_optimizer_and_state_come_back(run, tmp_path):
    run.train(3)
    run.save(3, {"kl_coef": 0.19})
    saved = run.weights()
    run.train(2)  # while the checkpoint may still be being written
    run.checkpoints.wait()
    other = Run(tmp_path, seed=1)
    assert other.load().state == {"kl_coef": 0.19}
    torch.testing.assert_close(other.weights()["trained.weight"], saved["trained.weight"], rtol=0, atol=0)
    assert other.net.head.weight is other.net.trained.weight
    with torch.no_grad():
        other.net.frozen.load_state_dict(run.net.frozen.state_dict())  # frozen weights are the caller's to rebuild
    other.train(2)  # the same only with Adam's moments
    torch.testing.assert_close(other.weights(), run.weights(), rtol=0, atol=0)


def test_a_learning_rate_that_was_changed_comes_back(run, tmp_path):
    run.train()
    run.optimizer.param_groups[0]["lr"] = 0.025
    run.save(1)
    run.checkpoints.wait()
    other = Run(tmp_path)
    other.load()
    assert other.optimizer.param_groups[0]["lr"] == 0.025


def test_random_states_come_back(run):
    run.save(1)
    drawn = torch.rand(3)
    run.checkpoints.wait()
    run.load()
    assert torch.equal(torch.rand(3), drawn)


def test_a_checkpoint_is_safetensors_and_json_and_holds_what_trains(run, tmp_path):
    run.train()
    run.save(1)
    run.checkpoints.wait()
    folder = tmp_path / "step-000001"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    with safe_open(shard_of(folder), framework="pt") as shard:  # the tied head is the same tensor
        assert set(shard.keys()) == {f"{kind}/trained.weight" for kind in ("weight", "exp_avg", "exp_avg_sq")}
    listed = set(json.loads((folder / "index.json").read_text())["files"])
    assert listed == {path.name for path in folder.iterdir()} - {"index.json"}


def test_no_checkpoint_is_none(run):
    assert run.checkpoints.newest() is None


def test_only_the_newest_are_kept(tmp_path):
    run = Run(tmp_path, keep=2)
    for step in (5, 90, 100, 1000):
        run.save(step)
    assert names(tmp_path) == ["step-000100", "step-001000"]
    assert run.checkpoints.newest().step == 1000


def test_the_best_is_named_and_kept(tmp_path):
    run = Run(tmp_path, keep=1)
    for step, reward in ((1, 0.1), (2, 0.7), (3, 0.2), (4, 0.3)):
        run.save(step, score=Score("reward", reward))
    assert names(tmp_path) == ["best.json", "step-000002", "step-000004"]
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"step": 2, "metric": "reward", "value": 0.7, "path": "step-000002"}
    run.save(5, score=Score("eval_loss", 2.0, higher_is_better=False))
    run.save(6, score=Score("eval_loss", 1.0, higher_is_better=False))
    run.save(7, score=Score("eval_loss", 1.5, higher_is_better=False))
    assert names(tmp_path) == ["best.json", "step-000006", "step-000007"]


def test_a_step_saved_again_replaces_the_former(run, tmp_path):
    run.save(1, {"kl_coef": 0.2})
    run.save(1, {"kl_coef": 0.3})
    run.checkpoints.wait()
    assert run.checkpoints.newest().state == {"kl_coef": 0.3}
    assert names(tmp_path) == ["step-000001"]


# --- faults ---


@pytest.mark.parametrize("where", ["while writing", "while hashing", "before the rename"])
def test_a_save_that_fails_leaves_no_trace_and_the_former_checkpoint_intact(run, tmp_path, monkeypatch, where):
    run.train()
    run.save(1)
    run.checkpoints.wait()
    saved = run.weights()
    run.train()

    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "while writing":
        monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", fail)
    else:
        monkeypatch.setattr(module.files, "describe" if where == "while hashing" else "write_index", fail)
    with pytest.raises(OSError, match="No space left"), run.checkpoints:
        run.save(2)
    assert names(tmp_path) == ["step-000001"]
    run.load()
    torch.testing.assert_close(run.weights(), saved, rtol=0, atol=0)
    monkeypatch.undo()
    run.save(2)
    run.checkpoints.wait()
    assert run.checkpoints.newest().step == 2


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    run = Run(tmp_path, asynchronous=True)
    run.train()
    may_write, save = threading.Event(), dcp.state_dict_saver.save

    def slow(*args, **options):
        assert may_write.wait(30)
        return save(*args, **options)

    monkeypatch.setattr(dcp.state_dict_saver, "save", slow)
    with run.checkpoints:
        run.save(1)
        saved = run.weights()
        run.train(2)
        assert names(tmp_path) == [".partial"]
        may_write.set()
    assert names(tmp_path) == ["step-000001"]  # on leaving the context it lies there whole
    run.load()
    torch.testing.assert_close(run.weights(), saved, rtol=0, atol=0)


def test_what_a_kill_left_half_written_is_no_checkpoint_and_in_nobody_s_way(run, tmp_path):
    run.save(1)
    run.checkpoints.wait()
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert run.checkpoints.newest().step == 1
    run.save(2)
    run.checkpoints.wait()
    assert names(tmp_path) == ["step-000001", "step-000002"]


DAMAGE = {
    "truncated": (lambda path: os.truncate(shard_of(path), 100), r"shard-\S+ has 100 bytes instead of \d+"),
    "flipped": (lambda path: flip(shard_of(path)), r"shard-\S+ has other content \(sha256 differs\)"),
    "state flipped": (lambda path: flip(path / "state.json"), r"state.json has other content"),
    "index flipped": (lambda path: flip(path / "index.json"), r"index.json is damaged"),
    "index gone": (lambda path: (path / "index.json").unlink(), r"index.json is missing"),
    "shard gone": (lambda path: shard_of(path).unlink(), r"shard-\S+ is missing"),
    "all gone": (lambda path: (shutil.rmtree(path), path.mkdir()), r"index.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys, kind):
    damage, message = DAMAGE[kind]
    run = Run(tmp_path)
    run.train()
    run.save(1)
    saved = run.weights()
    run.train()
    run.save(2)
    damage(tmp_path / "step-000002")
    assert run.load().step == 1
    torch.testing.assert_close(run.weights(), saved, rtol=0, atol=0)
    error = capsys.readouterr().err
    assert re.search(rf"^resume: \S+step-000002 is damaged: {message}.*the one before", error)
    run.save(2)  # in place of the damaged one
    assert run.checkpoints.newest().step == 2
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_every_byte_of_a_checkpoint_counts(tmp_path):
    run = Run(tmp_path)
    run.train()
    run.save(1)
    for file in sorted((tmp_path / "step-000001").iterdir()):
        for place in (0.0, 0.3, 0.6, 0.999):
            flip(file, place)
            assert module.files.problems(tmp_path / "step-000001"), (file.name, place)
            flip(file, place)
    assert not module.files.problems(tmp_path / "step-000001")


def test_later_checkpoints_that_were_damaged_go_with_the_next_save(tmp_path):
    run = Run(tmp_path, keep=2)
    for step in (2, 4, 6):
        run.save(step)
    flip(shard_of_any(tmp_path / "step-000006"))
    assert run.load().step == 4
    run.save(5)
    assert names(tmp_path) == ["step-000004", "step-000005"]


def shard_of_any(folder):
    return next(path for path in sorted(folder.iterdir()) if path.name != "index.json")


def test_where_all_are_damaged_the_run_says_so(tmp_path):
    run = Run(tmp_path)
    run.save(1)
    (tmp_path / "step-000001" / "state.json").unlink()
    with pytest.raises(InputError, match=r"resume: every checkpoint in .* is damaged; .*--overwrite_output_dir"):
        run.checkpoints.newest()


# --- another model ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 5}, r"size mismatch: trained.weight is \[4, 4\] there and \[5, 5\] here"),
        ({"name": "learned"}, r"it holds no learned.weight"),
    ],
    ids=["size", "name"],
)
def test_a_checkpoint_of_another_model_is_refused(run, tmp_path, options, message):
    run.train()
    run.save(1)
    run.checkpoints.wait()
    other = Run(tmp_path, **options)
    before = other.weights()
    with pytest.raises(InputError, match=rf"resume: .*step-000001 does not fit this run: {message}"):
        other.load()
    torch.testing.assert_close(other.weights(), before, rtol=0, atol=0)


def test_a_checkpoint_that_trained_more_is_refused(run, tmp_path):
    run.net.frozen.requires_grad_(True)
    run.save(1)
    run.checkpoints.wait()
    with pytest.raises(InputError, match=r"it holds frozen.bias, which does not train here"):
        Run(tmp_path).load()


# --- stopped ---


def test_a_stopped_run_is_marked_until_it_goes_on(run, tmp_path):
    run.save(1)
    run.checkpoints.mark_stopped(1, 5)
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"step": 1, "total_steps": 5, "exit_code": 75}
    run.load()
    assert names(tmp_path) == ["step-000001"]
