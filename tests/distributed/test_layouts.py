"""What the launch profiles carry: the table of docs/layouts.md, the profile a process runs under, refusals."""

from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig, T5Config

from yunque.distributed.layouts import PROFILES, check_layout, current_profile, data_ranks, refusal
from yunque.errors import InputError
from yunque.models.arguments import ModelArguments, PromptTuningArguments
from yunque.models.placement import loading_options

ROOT = Path(__file__).parents[2]
ROWS = {
    "finetune, all weights": ("finetune", "full"),
    "finetune, LoRA": ("finetune", "lora"),
    "finetune, QLoRA": ("finetune", "qlora"),
    "finetune, prompt tuning": ("finetune", "prompt_tuning"),
    "reward_model, all weights": ("reward", "full"),
    "reward_model, LoRA": ("reward", "lora"),
    "dpo, orpo": ("preferences", "lora"),
    "ppo_detox, grpo_detox, ppo_sentiment": ("rl", "lora"),
    "distill": ("distill", "full"),
    "constitutional": ("data", "full"),
}
ENVIRONMENTS = {
    "cpu": {},
    "ddp": {"WORLD_SIZE": "2"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true"},
    "zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "tp": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2", "WORLD_SIZE": "2"},
}
ENVIRONMENTS["zero3_offload"] = ENVIRONMENTS["zero3"] | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}
ENVIRONMENTS["fsdp2_tp"] = ENVIRONMENTS["tp"] | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "3", "WORLD_SIZE": "6"}


@pytest.fixture
def under(monkeypatch):
    """Make this process look as if it had been launched under a profile."""

    def enter(profile):
        for name in {name for environment in ENVIRONMENTS.values() for name in environment}:
            monkeypatch.delenv(name, raising=False)
        for name, value in ENVIRONMENTS[profile].items():
            monkeypatch.setenv(name, value)

    return enter


def table():
    """Cells of the table of methods by method and profile."""
    lines = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| method |"))
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:] if line]
    rows = rows[: len(ROWS)]
    return {
        (row[0], profile.strip("` ")): cell
        for row in rows
        for names, cell in zip(header[1:], row[1:], strict=True)
        for profile in names.split(",")
    }


def test_the_documented_table_is_what_the_code_refuses():
    cells = table()
    assert {profile for _, profile in cells} == set(PROFILES)
    assert {method for method, _ in cells} == set(ROWS)
    for (method, profile), cell in cells.items():
        reason = refusal(profile, *ROWS[method])
        if reason is None:
            assert cell.startswith("yes"), (method, profile)
        else:
            assert cell in ("no", f"no: {reason}"), (method, profile)


def test_every_profile_is_a_file():
    assert {path.stem for path in (ROOT / "launch").glob("*.yaml")} == set(PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_process_knows_its_profile(profile, under):
    under(profile)
    assert current_profile() == profile


def test_an_impossible_pair_is_refused_with_its_reason(under):
    under("zero3")
    check_layout("finetune", ModelArguments(use_peft=True))
    with pytest.raises(InputError, match="launch profile zero3: load_in_4bit: ZeRO-3 cannot split nf4 weights; take"):
        check_layout("finetune", ModelArguments(use_peft=True, load_in_4bit=True))
    under("tp")
    with pytest.raises(InputError, match="launch profile tp: prompt_tuning_tokens: virtual tokens have no plan"):
        check_layout("finetune", ModelArguments(), PromptTuningArguments(prompt_tuning_tokens=20))


def test_tensor_parallel_ranks_share_rows(under):
    under("fsdp2_tp")
    assert [data_ranks(rank, 6) for rank in range(6)] == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3), (2, 3)]
    under("ddp")
    assert [data_ranks(rank, 2) for rank in range(2)] == [(0, 2), (1, 2)]


@pytest.mark.parametrize("config", [T5Config(), GPT2Config()], ids=lambda config: config.model_type)
def test_tensor_parallelism_wants_a_plan(config, under):
    under("ddp")
    assert loading_options(config) == {}
    under("tp")
    with pytest.raises(InputError, match=f"no tensor-parallel plan for {config.model_type}; take fsdp2"):
        loading_options(config)


def test_tensor_parallelism_wants_heads_that_divide(under):
    under("tp")
    options = loading_options(LlamaConfig(num_attention_heads=4, num_key_value_heads=2))
    assert options["distributed_config"].tp_size == 2
    with pytest.raises(InputError, match="num_key_value_heads = 1 does not divide over 2"):
        loading_options(LlamaConfig(num_attention_heads=4, num_key_value_heads=1))
