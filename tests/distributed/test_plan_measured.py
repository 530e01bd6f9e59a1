"""What ``plan`` says of every rehearsed cell beside what two ranks really held."""

import json
import os
import socket
import subprocess
from pathlib import Path

import memory_cells
import pytest
import tiny
import warm
from accelerate.commands.launch import _validate_launch_command as validated
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from yunque.distributed import plan as planning
from yunque.distributed.plan_layouts import Layout
from yunque.distributed.plan_model import Batch
from yunque.distributed.scaling import volumes
from yunque.models.arguments import ModelArguments

ROOT = Path(__file__).parents[2]
EVERY = [f"{family}-{method}" for family in ("t5", "llama") for method in ("full", "lora", "ppo")]
CELLS = {
    "ddp": [*EVERY, "llama-full-checkpointed", "t5-lora-checkpointed"],
    "fsdp2": EVERY,
    "zero1": ["llama-full"],
    "zero2": EVERY,
    "zero3": EVERY,
    "tp": ["llama-full", "llama-lora"],
}
ALL = [f"{profile}-{cell}" for profile, cells in CELLS.items() for cell in cells]


def variables(profile):
    """What ``accelerate launch`` sets for its processes."""
    path = str(ROOT / "launch" / f"{profile}.yaml")
    options = ["--config_file", path, "--num_processes", "2", "--main_process_port", "0", "script.py"]
    args = launch_command_parser().parse_args(options)
    args, defaults, _ = validated(args)
    args.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
    before = dict(os.environ)
    found = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if before.get(name) != value}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    for family in ("t5", "llama"):
        tiny.FAMILIES[family]().save_pretrained(folder / family)
        tiny.tokenizer().save_pretrained(folder / family)
    (folder / "profiles.json").write_text(json.dumps({name: [variables(name), cells] for name, cells in CELLS.items()}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = warm.environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ranks = []
    for rank in ("0", "1"):
        with (folder / f"log-{rank}").open("w") as log:
            command = [warm.python(), memory_cells.__file__, str(folder)]
            own = common | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
            ranks.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=900) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], (folder / "log-0").read_text()[-3000:]
    return {"folder": folder, "ranks": [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]}


def request_of(folder, family, method):
    return planning.Request(
        ModelArguments(model_name_or_path=str(folder / family), lora_r=memory_cells.LORA_R),
        method=method, devices=2, zero3_persistent=0,  # the rehearsal has ZeRO-3 split small weights too
        batch=Batch(memory_cells.ROWS, memory_cells.PROMPT, memory_cells.ANSWER, padded=False),
    )  # fmt: skip


@pytest.fixture(scope="module")
def planned(measured):
    return {
        (family, method): planning.plan(request_of(measured["folder"], family, method), tuple(CELLS))
        for family in ("t5", "llama")
        for method in ("full", "lora", "ppo")
    }


@pytest.mark.parametrize("name", ALL)
def test_plan_is_what_the_ranks_held(measured, planned, name):
    profile, family, method, *checkpointed = name.split("-")
    layout = planned[family, method].of(profile)
    assert layout.impossible is None
    states = layout.weights + layout.gradients + layout.optimizer + layout.value_head
    activations = layout.activations_checkpointed if checkpointed else layout.activations
    for rank in measured["ranks"]:
        assert "error" not in rank[name], rank[name]
        held = sum(rank[name][f"{part}_bytes"] for part in ("parameter", "gradient", "optimizer"))
        assert states == pytest.approx(held, rel=0.10)
        assert activations == pytest.approx(rank[name]["activation_peak_bytes"], rel=0.25)


@pytest.mark.parametrize("name", ["ddp-t5-full", "ddp-llama-full", "fsdp2-t5-full", "fsdp2-llama-full"])
def test_volumes_are_what_the_ranks_sent(measured, name):
    profile, family, method = name.split("-")
    model = planning._Model(request_of(measured["folder"], family, method))
    steps = 2
    for operation, size in volumes(model.weights, Layout(profile, 2)).items():
        sent = measured["ranks"][0][name]["communication_bytes"][operation] / steps
        assert size == pytest.approx(sent, rel=0.10), operation
