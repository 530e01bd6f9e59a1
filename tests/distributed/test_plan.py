import json
import resource

import pytest
import tiny

from yunque.distributed.plan import PROFILES, Request, plan
from yunque.distributed.plan_layouts import Layout, held
from yunque.distributed.plan_model import Batch, Weight
from yunque.distributed.plan_report import describe, parse_bytes, show_bytes
from yunque.errors import InputError
from yunque.models.arguments import ModelArguments

LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    "eos_token_id": 2,
}  # fmt: skip
FLAN_T5_BASE = {
    "model_type": "t5", "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12,
    "feed_forward_proj": "gated-gelu", "vocab_size": 32128, "tie_word_embeddings": False, "pad_token_id": 0,
    "eos_token_id": 1, "decoder_start_token_id": 0, "is_encoder_decoder": True,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A function that writes a folder which holds nothing but a config.json."""

    def write(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return ModelArguments(model_name_or_path=str(tmp_path), lora_r=8)

    return write


def tiny_config(family):
    return tiny.FAMILIES[family]().config.to_dict()


def test_huge_model_takes_no_memory(folder):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    request = Request(folder(LLAMA_70B), method="full", devices=64, nodes=8)
    found = plan(request, ("ddp", "fsdp2"))
    assert found.parameters == 70_553_706_496  # the model card's 70.6B
    ddp, fsdp2 = found.of("ddp"), found.of("fsdp2")
    assert not ddp.fits
    assert not ddp.fits_checkpointed
    assert ddp.largest_batch_checkpointed == 0
    assert fsdp2.fits_checkpointed
    assert fsdp2.weights == pytest.approx(4 * found.parameters / 64, rel=1e-3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_untied_head_of_flan_t5_counts(folder):
    found = plan(Request(folder(FLAN_T5_BASE)), ())
    assert found.parameters == 247_577_856  # google/flan-t5-base


def test_course_rules_are_a_row(folder):
    found = plan(Request(folder(LLAMA_70B)), ())
    assert found.course_weights_bytes == 4 * found.parameters
    assert found.course_training_bytes == 24 * found.parameters  # 24 GB for 1B parameters
    assert found.chinchilla_tokens == 20 * found.parameters
    assert found.chinchilla_flops == pytest.approx(6 * found.parameters * found.chinchilla_tokens)
    assert found.chinchilla_petaflop_days == pytest.approx(found.chinchilla_flops / 8.64e19)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_largest_batch_is_the_last_that_fits(folder, family):
    args = folder(tiny_config(family))

    def of(rows):
        request = Request(args, device_memory_bytes=2_000_000, batch=Batch(rows, 12, 6))
        return plan(request, ("ddp",)).of("ddp")

    largest = of(1).largest_batch
    assert 2 < largest < 1000
    assert of(largest).fits
    assert not of(largest + 1).fits


def test_method_decides_what_is_beside_the_weights(folder):
    args = folder(tiny_config("llama"))
    found = {
        (method, weights): plan(Request(args, method=method, weights=weights), ("ddp",)).of("ddp")
        for method, weights in (("full", ""), ("lora", ""), ("ppo", "full"), ("ppo", "lora"), ("grpo", "lora"))
    }
    full, lora, ppo_full, ppo_lora, grpo = found.values()
    assert lora.gradients < full.gradients / 5
    assert ppo_full.reference == full.weights
    assert ppo_lora.reference == full.reference == 0
    assert ppo_lora.value_head > grpo.value_head == 0
    assert ppo_lora.kv_cache > 0 == lora.kv_cache


def test_checkpointing_saves_activations(folder):
    found = plan(Request(folder(tiny_config("llama")), batch=Batch(8, 96, 32)), ("fsdp2",)).of("fsdp2")
    assert found.activations_checkpointed < 0.6 * found.activations
    assert found.total_checkpointed < found.total


def test_qlora_packs_linear_layers(folder):
    found = {method: plan(Request(folder(LLAMA_70B), method=method), ("ddp",)) for method in ("lora", "qlora")}
    layers = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    packed = found["qlora"].of("ddp").weights
    assert packed == pytest.approx(layers * 0.516 + 2 * 2 * 8192 * 128256, rel=0.02)  # QLoRA's 0.5 + 0.127 / 8 bytes
    assert packed < found["lora"].of("ddp").weights / 6


def test_impossible_pairs_say_why(folder):
    qlora = plan(Request(folder(tiny_config("llama")), method="qlora", devices=2))
    assert "nf4" in qlora.of("zero3").impossible
    assert "one process" in qlora.of("cpu").impossible
    t5 = plan(Request(folder(tiny_config("t5")), devices=2))
    assert "tensor-parallel plan" in t5.of("tp").impossible
    assert {layout.profile for layout in t5.layouts} == set(PROFILES)
    heads = plan(Request(folder(tiny_config("llama")), devices=8), ("tp",))
    assert "do not divide over 8" in heads.of("tp").impossible
    assert "impossible" in describe(qlora, Request(folder(tiny_config("llama")), method="qlora", devices=2), "zero3")


def test_sharding_divides_and_rounds_up():
    weights = [Weight("layers.0.weight", (10, 4), trains=True), Weight("bias", (3,), trains=False)]
    whole, sharded = (held(weights, Layout("fsdp2", devices)) for devices in (1, 4))
    assert whole.weights == 4 * 43
    assert sharded.weights == 4 * (3 * 4 + 1)  # rank 0 holds three rows of ten, and one number of three
    assert sharded.optimizer == 8 * 3 * 4 + 4
    assert sharded.gradients == 4 * 3 * 4


def test_small_weights_stay_whole_under_zero3():
    weights = [Weight("bias", (64,), trains=True)]
    assert held(weights, Layout("zero3", 2)).weights > held(weights, Layout("zero3", 2, persistent=0)).weights


def test_report_names_the_layout_and_the_batch(folder):
    request = Request(folder(tiny_config("llama")), batch=Batch(8, 12, 6))
    text = describe(plan(request), request, "ddp")
    assert "ddp: fits; the largest batch is" in text
    assert "rule of the course" in text
    small = Request(folder(tiny_config("llama")), batch=Batch(8, 12, 6), device_memory_bytes=10_000)
    assert "does not fit" in describe(plan(small), small, "ddp")


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("24GB", 24 * 10**9), ("24 gb", 24 * 10**9), ("1.5M", 1_500_000), ("8e10", 8 * 10**10)],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text, "device-memory") == size


@pytest.mark.parametrize("text", ["", "eighty", "80 GiX", "-3GB", "0", "1.2.3GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(InputError, match="device-memory"):
        parse_bytes(text, "device-memory")


def test_sizes_are_shown():
    shown = [show_bytes(size) for size in (5, 2048, 3 * 2**20, 5 * 2**40)]
    assert shown == ["5 B", "2.0 KiB", "3.0 MiB", "5,120.0 GiB"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "sft"}, "method: there is no sft; take full, lora"),
        ({"method": "ppo", "weights": "int8"}, "weights: there is no int8"),
        ({"devices": 0}, "devices: 0"),
        ({"devices": 3, "nodes": 2}, "do not divide over 2 nodes"),
        ({"devices": 8, "tensor_ranks": 3}, "tp_size"),
        ({"batch": Batch(0, 1, 2)}, "per_device_train_batch_size"),
        ({"batch": Batch(1, 1, 1)}, "answer_tokens"),
    ],
)
def test_bad_requests_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        Request(ModelArguments(model_name_or_path="x"), **options)


def test_unknown_profile_and_folder_without_config(tmp_path, folder):
    with pytest.raises(InputError, match="profile: there is no deepspeed; take cpu, ddp, fsdp2"):
        plan(Request(folder(tiny_config("llama"))), ("deepspeed",))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"config\.json"):
        plan(Request(ModelArguments(model_name_or_path=str(empty))))
