"""Every launch profile is read by Accelerate's own loader and says what it is for."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

PROFILES = sorted((Path(__file__).parents[1] / "launch").glob("*.yaml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_accelerate_accepts_profile(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert isinstance(config, ClusterConfig)
    wanted = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {name: config.to_dict()[name] for name in wanted} == wanted


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profile_begins_with_its_purpose_and_command(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert lines[: len(header)] == header
    assert len(header[0]) > 20
    assert any(f"accelerate launch --config_file launch/{path.name}" in line for line in header)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_setting_is_one_that_the_launcher_knows(path):
    # accelerate passes over keys of the nested groups that it does not know
    known = vars(launch_command_parser().parse_args(["script.py"]))
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for group in ("fsdp_config", "deepspeed_config", "parallelism_config"):
        assert set(content.get(group, {})) <= set(known)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_sharded_profiles_say_when_to_choose_them_and_how_to_rehearse(path):
    header = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    if path.stem != "cpu":
        assert "Choose it" in header
        assert "--num_machines 2" in header
        assert f"yunque rehearse {path.stem} " in header
        assert "mixed_precision: bf16" in path.read_text(encoding="utf-8")
