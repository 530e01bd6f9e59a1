"""Scripts as commands: what reaches the script, what reaches the launcher, what the shell completes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from yunque.cli import scripts
from yunque.errors import InputError

COMMAND = Path(sys.executable).with_name("yunque")


@pytest.mark.parametrize(
    ("argv", "launch", "rest"),
    [
        (["--config", "a.yaml", "--beta=1"], {}, ["--config", "a.yaml", "--beta=1"]),
        (
            ["--profile", "ddp", "--seed", "1", "--num_processes=2"],
            {"--profile": "ddp", "--num_processes": "2"},
            ["--seed", "1"],
        ),
        (
            ["--num_machines", "2", "--main_process_ip", "node1"],
            {"--num_machines": "2", "--main_process_ip": "node1"},
            [],
        ),
    ],
)
def test_launch_options_stand_anywhere(argv, launch, rest):
    assert scripts._launch_options(argv) == (launch, rest)


@pytest.mark.parametrize("argv", [["--profile"], ["--profile="], ["--num_processes", "--seed", "1"]])
def test_a_launch_option_wants_a_value(argv):
    with pytest.raises(InputError, match=rf"^{argv[0].rstrip('=')}: give a value"):
        scripts._launch_options(argv)


def test_launch_options_want_a_profile():
    with pytest.raises(InputError, match="--num_processes: wants a launch profile; add --profile NAME"):
        scripts.run_script("dpo", ["--num_processes", "2"])


def test_an_unknown_profile_is_named():
    with pytest.raises(InputError, match="profile: there is no dpd; take cpu, ddp, fsdp2"):
        scripts.run_script("dpo", ["--profile", "dpd"])


def test_a_profile_takes_the_launcher_s_place(monkeypatch):
    def execv(program, words):
        raise ChildProcessError([program, *words])

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(ChildProcessError) as started:
        scripts.run_script("grpo-detox", ["--seed", "3", "--profile", "zero2", "--num_processes", "4"])
    ((program, *words),) = started.value.args
    assert program == words[0] == sys.executable
    assert words[1:4] == ["-m", "yunque.distributed.launch", "--config_file"]
    assert Path(words[4]).name == "zero2.yaml"
    assert words[5:7] == ["--num_processes", "4"]
    assert Path(words[7]).parts[-2:] == ("recipes", "grpo_detox.py")
    assert words[8:] == ["--seed", "3"]


def test_help_names_the_command_and_both_kinds_of_options():
    done = subprocess.run([COMMAND, "ppo-detox", "--help", "--profile", "ddp"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: yunque ppo-detox [-h]")
    assert "--init_kl_coef" in done.stdout
    assert done.stdout.index("launch options:") > done.stdout.index("--init_kl_coef")


def test_bad_input_is_one_line_and_2():
    done = subprocess.run([COMMAND, "prune", "--model", "a"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown argument --model; --help lists the known ones\n"


def completed(words):
    """What bash would offer for the last word."""
    environment = os.environ | {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [COMMAND], env=environment | {"_YUNQUE_COMPLETE": "complete_bash"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_shell_completes_commands_options_and_profiles():
    assert completed(["yunque", "ppo"]) == ["ppo-detox", "ppo-sentiment"]
    assert completed(["yunque", "ppo-detox", "--init_k"]) == ["--init_kl_coef"]
    assert completed(["yunque", "dpo", "--seed", "1", "--num_p"]) == ["--num_processes"]
    assert completed(["yunque", "dpo", "--profile", "zero3"]) == ["zero3", "zero3_offload"]
    assert completed(["yunque", "quantize", "--sch"]) == ["--scheme"]
