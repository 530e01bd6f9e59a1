"""What surrounds a rehearsal: profiles by name, memory, ports, traces, and the exit codes of what is launched."""

import json
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from typer.testing import CliRunner

from yunque.cli import app
from yunque.distributed import rehearsal, rehearse
from yunque.distributed.profiles import find_profile, profiles
from yunque.errors import CheckFailed, InputError

ROOT = Path(__file__).parents[2]
GIB = 2**30
RECORD = {
    "rank": 0, "parameter_bytes": 1000, "gradient_bytes": 500, "optimizer_bytes": 2000, "activation_peak_bytes": 70,
    "communication_bytes": {"all_gather": 12345}, "memory_bytes": GIB,
}  # fmt: skip
NO_LOSSES = RECORD | {"losses": [], "start_differences": []}


def wanted(**options):
    return rehearse.Rehearsal(find_profile("fsdp2"), "recipes/finetune.py", **options)


@pytest.fixture
def launches(monkeypatch):
    """Stands in for the processes; what was started, with the ranks that it is to take the rows of."""
    started = []

    def start(command, environment):
        folder, fold = Path(environment[rehearsal.RECORDS]), int(environment[rehearsal.FOLD])
        plain = rehearsal.PLAIN in environment
        ranks = 1 if plain else int(command[command.index("--num_processes") + 1])
        started.append(("plain" if plain else ranks, fold))
        for rank in range(ranks):
            trace = [2.0, 1.0] if plain else [2.5 - rank, 1.0]
            record = RECORD | {"rank": rank, "losses": trace, "start_differences": [0.01 * rank]}
            (folder / f"rank-{rank}.json").write_text(json.dumps(record))
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(rehearse, "_start", start)
    return started


def test_a_profile_is_found_by_name_and_by_path(tmp_path):
    (tmp_path / "mine.yaml").write_text("distributed_type: MULTI_GPU\n")
    assert find_profile("zero3") == profiles()["zero3"]
    assert find_profile(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"


def test_an_unknown_profile_lists_the_known_ones():
    process = CliRunner().invoke(app, ["rehearse", "zero4", "recipes/finetune.py"])
    assert isinstance(process.exception, InputError)
    assert "there is no zero4; take cpu, ddp, fsdp2, fsdp2_tp, tp, zero1, zero2, zero3, zero3_offload" in str(
        process.exception
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [({"ranks": 0}, "--ranks 0"), ({"nodes": 0}, "--nodes 0"), ({"ranks": 3, "nodes": 2}, "3 ranks do not divide")],
)
def test_bad_numbers(options, words):
    with pytest.raises(InputError, match=words):
        wanted(**options)


def test_a_script_that_is_no_file():
    with pytest.raises(InputError, match=r"script: recipes/absent.py is no file"):
        rehearse.Rehearsal(find_profile("ddp"), "recipes/absent.py")


def test_more_ranks_than_memory_are_refused_with_the_amount(monkeypatch, launches):
    monkeypatch.setattr(rehearse, "available_bytes", lambda: 8 * GIB)
    with pytest.raises(InputError, match=r"--ranks 100: needs about 68.4 GiB .* 8.0 GiB are free; take 11 or fewer"):
        rehearse.rehearse(wanted(ranks=100))
    assert launches == []
    with pytest.raises(InputError, match=r"--ranks 10: needs about 10.0 GiB \(1.00 GiB a rank by what one held\)"):
        rehearse.rehearse(wanted(ranks=10))
    assert [kind for kind, _ in launches] == ["plain"]


def test_free_memory_is_read():
    assert 0 < rehearse.available_bytes() < 2**50


def test_a_taken_port_is_replaced():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert rehearse.free_port(taken) not in (0, taken)
    assert rehearse.free_port(taken) == taken


def test_traces_are_compared_relative_to_the_loss():
    assert rehearse.largest_difference([4.0, 0.5], [4.2, 0.5]) == pytest.approx(0.2 / 4.2)
    assert rehearse.largest_difference([0.01], [0.02]) == pytest.approx(0.01)  # not twice as large
    assert rehearse.largest_difference([1.0], [1.0, 1.0]) == float("inf")


def test_losses_are_averaged_over_ranks_and_compared_with_a_plain_process(launches):
    report = rehearse.rehearse(wanted(ranks=2))
    assert (report.losses, report.plain_losses) == ([2.0, 1.0], [2.0, 1.0])
    assert report.equal
    assert report.start_difference == 0.01
    assert launches == [("plain", 2), (2, 1)]
    content = json.loads(report.to_json())
    assert [record["rank"] for record in content["per_rank"]] == [0, 1]
    assert content["per_rank"][0]["communication_bytes"] == {"all_gather": 12345}
    assert "losses of 2 backward passes equal those of one plain process" in str(report)
    assert "logits at start equal a plain process's (relative difference 1.0e-02)" in str(report)
    assert "all_gather 12,345" in str(report)


def test_losses_that_differ_fail_the_command(launches):
    arguments = ["rehearse", "fsdp2", "recipes/finetune.py", "--max_steps", "3", "--ranks", "4"]
    process = CliRunner().invoke(app, arguments)  # the stand-in's ranks average to 1, not 2
    assert "DIFFER" in process.output
    assert "fsdp2: losses of 2 backward passes DIFFER from those of one plain process" in str(process.exception)


def test_nothing_to_compare_fails_the_command(launches, monkeypatch):
    monkeypatch.setattr(rehearse, "_records", lambda folder, ranks: [NO_LOSSES | {"rank": 0} for _ in range(ranks)])
    process = CliRunner().invoke(app, ["rehearse", "fsdp2", "recipes/finetune.py"])
    assert isinstance(process.exception, CheckFailed)
    assert str(process.exception) == "fsdp2: no backward pass was counted: there is nothing to compare"


def test_without_comparison_no_plain_process_runs(launches):
    report = rehearse.rehearse(wanted(), compare=False)
    assert launches == [(2, 0)]
    assert report.equal is None


def test_a_plain_process_knows_nothing_of_the_profile(monkeypatch):
    found = []
    monkeypatch.setattr(rehearse, "_start", lambda command, environment: found.append((command, environment)))
    monkeypatch.setattr(rehearse, "_wait", lambda started: None)
    monkeypatch.setattr(
        rehearse, "_records", lambda folder, ranks: [NO_LOSSES | {"losses": [1.0]} for _ in range(ranks)]
    )
    rehearse.rehearse(wanted(launch_options=["--mixed_precision", "no"]))
    (plain, environment), (ranks, _) = found
    assert plain == ["-m", "yunque.distributed.rehearsal", "recipes/finetune.py"]
    assert (environment[rehearsal.PLAIN], environment["ACCELERATE_MIXED_PRECISION"]) == ("1", "no")
    assert "--config_file" in ranks


@dataclass(frozen=True)
class Sampled:
    tokens: list[int]
    logprobs: list[float] | None = field(default=None, compare=False)


def test_ranks_learn_from_the_plain_process_s_answers_where_theirs_are_others(tmp_path, monkeypatch):
    answers = [Sampled([1, 2], [0.5, 0.5]), Sampled([3], [0.5])]
    assert rehearsal.replay([0, 1], answers) is answers
    monkeypatch.setenv(rehearsal.ANSWERS, str(tmp_path / "answers.jsonl"))
    monkeypatch.setenv(rehearsal.RECORDS, str(tmp_path))
    monkeypatch.setenv(rehearsal.PLAIN, "1")
    assert rehearsal.replay([0, 1], answers) is answers
    monkeypatch.delenv(rehearsal.PLAIN)
    monkeypatch.setenv("RANK", "1")
    found = rehearsal.replay([1, 0], [Sampled([3], [0.4]), Sampled([1, 9], [0.6, 0.6])])
    assert found == [Sampled([3]), Sampled([1, 2])]
    assert [row.logprobs for row in found] == [[0.4], None]  # of its own model, or to be computed by it
    assert rehearsal.replay([], []) == []
    assert rehearse._answers(tmp_path) == (1, 2)


@pytest.mark.parametrize(("profile", "ranks", "fold"), [("tp", 2, 1), ("fsdp2_tp", 4, 2), ("zero2", 3, 3)])
def test_a_plain_process_takes_the_rows_of_all(profile, ranks, fold, launches):
    rehearse.rehearse(rehearse.Rehearsal(find_profile(profile), "recipes/finetune.py", ranks=ranks))
    assert launches[0] == ("plain", fold)


SCRIPT = """
from yunque.arguments import parse
from yunque.artifacts import check_output_dir, save_model_folder
from yunque.distributed.arguments import RunArguments
from yunque.errors import run

def main():
    (args,) = parse(RunArguments)
    check_output_dir(args.output_dir, overwrite=False, resume=False)
    save_model_folder(args.output_dir, lambda folder: None, stage="none", parents=[])

run(main)
"""


@pytest.mark.distributed
def test_a_rehearsal_leaves_the_script_s_own_folder_alone(tmp_path, monkeypatch):
    for name, value in warm.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "executable", warm.python())
    monkeypatch.chdir(tmp_path)  # the script's own folder is outputs/run
    (tmp_path / "script.py").write_text(SCRIPT)
    for options, left in ((["--seed", "1"], []), (["--output_dir", "kept"], ["kept"])):
        rehearse.rehearse(rehearse.Rehearsal(find_profile("ddp"), "script.py", options, ranks=1))
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == left


@pytest.mark.distributed
@pytest.mark.parametrize(("code", "expected"), [(75, 75), (3, 1)])
def test_the_launcher_leaves_with_the_script_s_code(code, expected, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.exit({code})")
    options = ["--config_file", "launch/ddp.yaml", "--num_processes", "2", "--main_process_port", "0"]
    command = [warm.python(), "-m", "yunque.distributed.launch", *options, str(script)]
    process = subprocess.run(command, cwd=ROOT, env=warm.environment(), capture_output=True, timeout=120, check=False)
    assert process.returncode == expected
