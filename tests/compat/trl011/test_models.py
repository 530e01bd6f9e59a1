import json
import logging
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    OPTConfig,
)

from yunque.compat.trl011 import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    create_reference_model,
)
from yunque.errors import InputError

LORA = {"t5": "SEQ_2_SEQ_LM", "gpt2": "CAUSAL_LM"}
AUTO = {"t5": AutoModelForSeq2SeqLM, "gpt2": AutoModelForCausalLM}
WRAPPER = {"t5": AutoModelForSeq2SeqLMWithValueHead, "gpt2": AutoModelForCausalLMWithValueHead}
IDS = torch.tensor([[5, 9, 13, 20]])


def forward(model, **options):
    decoder = {"decoder_input_ids": IDS} if model.is_encoder_decoder else {}
    return model(IDS, **decoder, **options)


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_forward_gives_logits_loss_and_values(wrap, family):
    model = wrap(family, dropout_rate=0.0).eval().to(torch.bfloat16)
    model.v_head.float()
    logits, loss, values = forward(model)
    assert (logits.dtype, values.dtype, loss) == (torch.float32, torch.float32, None)
    assert (logits.shape, values.shape) == ((1, 4, 64), (1, 4))
    assert len(forward(model, return_past_key_values=True)) == 4
    if family == "gpt2":
        assert forward(model, labels=IDS)[1] > 0


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_saved_whole_and_in_shards(wrap, tmp_path, family):
    model = wrap(family)
    for name, options in (("whole", {}), ("sharded", {"max_shard_size": "4KB"})):
        model.save_pretrained(tmp_path / name, **options)
        again = WRAPPER[family].from_pretrained(str(tmp_path / name))
        assert again.state_dict().keys() == model.state_dict().keys()
        for key, weight in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], weight), key
        plain = AUTO[family].from_pretrained(tmp_path / name)
        assert plain.state_dict().keys() == model.pretrained_model.state_dict().keys()
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2


def test_an_adapter_is_saved_with_its_value_head_and_trains_on(wrap, tmp_path):
    tiny.gpt2().save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, task_type="CAUSAL_LM")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "base"), peft_config=lora)
    assert model.is_peft_model
    assert set(model.state_dict()) == {"v_head.summary.weight", "v_head.summary.bias"}
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    model.save_pretrained(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter_model.safetensors", "model.safetensors"}
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == model.state_dict().keys()

    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "out"), is_trainable=True)
    trained = {name for name, weight in again.named_parameters() if weight.requires_grad}
    assert trained == {name for name, weight in model.named_parameters() if weight.requires_grad}
    for name, weight in model.named_parameters():
        assert torch.equal(again.get_parameter(name), weight), name
    frozen = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "out"))
    assert {name for name, weight in frozen.named_parameters() if weight.requires_grad} == {
        "v_head.summary.weight",
        "v_head.summary.bias",
    }


def pickled(folder, sharded=False, whole_format=True):
    """Turn the safetensors of a folder into what TRL 0.11 wrote: pytorch_model.bin, whole or in shards."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not sharded:
        return torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=whole_format)
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    return (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def saved_adapter(wrap, tmp_path):
    model = wrap("gpt2", lora="fresh")
    tiny.gpt2().save_pretrained(tmp_path / "base")
    model.pretrained_model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "out")
    return model


@pytest.mark.parametrize("options", [{}, {"sharded": True}, {"whole_format": False}], ids=["zip", "shards", "legacy"])
@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_a_pickled_value_head_is_read(tmp_path, wrap, caplog, family, options):
    model = wrap(family)
    model.save_pretrained(tmp_path / "out")
    pickled(tmp_path / "out", **options)
    again = WRAPPER[family].from_pretrained(str(tmp_path / "out"))
    for key, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight), key
    assert "no value head" not in caplog.text


def test_a_pickled_value_head_beside_an_adapter_is_read(tmp_path, wrap):
    model = saved_adapter(wrap, tmp_path)
    pickled(tmp_path / "out")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "out"))
    assert torch.equal(again.v_head.summary.weight, model.v_head.summary.weight)


@pytest.mark.parametrize("content", ["code", "cut", "list"])
def test_a_pickle_of_more_than_tensors_is_refused(tmp_path, wrap, content):
    saved_adapter(wrap, tmp_path)
    (tmp_path / "out" / "model.safetensors").unlink()
    path = tmp_path / "out" / "pytorch_model.bin"
    torch.save({"code": {"v_head.summary.weight": Path("x")}, "cut": {"a": IDS}, "list": [IDS]}[content], path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="damaged or holds more than tensors"):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "out"))


def test_a_value_head_of_another_width_is_refused(wrap):
    with pytest.raises(InputError, match="value head: the saved one has"):
        wrap("gpt2").post_init({"v_head.summary.weight": torch.zeros(1, 3), "v_head.summary.bias": torch.zeros(1)})


def test_only_the_value_head_is_no_unexpected_weight(tmp_path, wrap, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = wrap("gpt2")
    model.save_pretrained(tmp_path)
    AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    assert "UNEXPECTED" not in caplog.text
    save_file(load_file(tmp_path / "model.safetensors") | {"stray": IDS}, tmp_path / "model.safetensors")
    AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    assert "stray" in caplog.text
    assert "v_head" not in caplog.text


def test_value_head_options(tmp_path):
    model = tiny.gpt2()
    assert AutoModelForCausalLMWithValueHead.from_pretrained(model).v_head.dropout.p == 0.1
    head = AutoModelForCausalLMWithValueHead.from_pretrained(model, summary_dropout_prob=0.5).v_head
    assert head.dropout.p == 0.5
    normal = AutoModelForCausalLMWithValueHead.from_pretrained(
        model, v_head_init_strategy="normal", v_head_initializer_range=7.0
    ).v_head.summary
    assert not normal.bias.any()
    assert normal.weight.std() > 3
    model.config.summary_dropout_prob = 0.0
    assert isinstance(AutoModelForCausalLMWithValueHead.from_pretrained(model).v_head.dropout, torch.nn.Identity)
    with pytest.raises(ValueError, match="v_head_init_strategy"):
        AutoModelForCausalLMWithValueHead.from_pretrained(model, v_head_init_strategy="xavier")


def test_a_projected_hidden_state_has_a_head_of_its_width():
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16, "do_layer_norm_before": False}
    config = OPTConfig(vocab_size=64, hidden_size=32, word_embed_proj_dim=8, max_position_embeddings=32, **sizes)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(AutoModelForCausalLM.from_config(config))
    assert model.v_head.summary.in_features == 8
    assert forward(model)[2].shape == (1, 4)


def test_what_cannot_be_wrapped(wrap):
    for build, message in [
        (lambda: AutoModelForCausalLMWithValueHead.from_pretrained(tiny.gpt2().transformer), "no language model head"),
        (lambda: AutoModelForCausalLMWithValueHead.from_pretrained(tiny.t5()), "AutoModelForSeq2SeqLMWithValueHead"),
        (lambda: AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny.gpt2()), "AutoModelForCausalLMWithValueHead"),
        (lambda: AutoModelForCausalLMWithValueHead.from_pretrained(torch.nn.Linear(2, 2)), "must be a string"),
        (lambda: AutoModelForCausalLMWithValueHead.from_pretrained(tiny.gpt2(), peft_config={}), "peft_config"),
        (lambda: AutoModelForCausalLMWithValueHead.from_pretrained(tiny.gpt2(), reward_adapter="x"), "PEFT model"),
        (lambda: wrap("gpt2").compute_reward_score(IDS), "reward_adapter"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
    prompts = get_peft_model(tiny.gpt2(), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PromptLearningConfig"):
        AutoModelForCausalLMWithValueHead.from_pretrained(prompts)


def test_loading_options_of_a_loaded_model_are_warned_of():
    with pytest.warns(UserWarning, match="torch_dtype: the model is torch.float32"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny.gpt2(), torch_dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="device_map"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny.gpt2(), device_map="auto")


def test_torch_dtype_is_today_s_dtype(tmp_path):
    tiny.gpt2().save_pretrained(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path), torch_dtype=torch.bfloat16)
    assert model.pretrained_model.dtype == torch.bfloat16
    assert model.v_head.summary.weight.dtype == torch.float32


def test_an_untied_head_stays_untied():
    model = tiny.t5()
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.clone())
    wrapped = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(model)
    wrapped.pretrained_model.tie_weights()
    assert wrapped.pretrained_model.lm_head.weight is not wrapped.pretrained_model.shared.weight


# --- references ---


@pytest.mark.parametrize("lora", [None, "trained"])
def test_a_reference_stays_and_shares_what_does_not_train(wrap, lora):
    model = wrap("gpt2", lora=lora).eval()
    reference = create_reference_model(model)
    before = forward(model)[0]
    own = {id(weight) for weight in reference.parameters()} - {id(weight) for weight in model.parameters()}
    assert len(own) == len([1 for weight in model.parameters() if weight.requires_grad])
    assert not [1 for weight in reference.parameters() if weight.requires_grad]
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    assert not torch.allclose(forward(model)[0], before)
    assert torch.equal(forward(reference)[0], before)


def test_shared_layers_are_frozen_in_the_model_too(wrap):
    model = wrap("gpt2")
    reference = create_reference_model(model, num_shared_layers=1, pattern="transformer.h.{layer}")
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert {name.split(".h.")[1][0] for name in frozen if ".h." in name} == {"0"}
    assert all(reference.get_parameter(name) is model.get_parameter(name) for name in frozen)
    for arguments in ({"num_shared_layers": 7}, {"num_shared_layers": 1, "pattern": "layers.{layer}"}):
        with pytest.raises(ValueError, match="no parameter is named like"):
            create_reference_model(model, **arguments)


# --- a reward adapter, the hub ---


def test_reward_adapter_scores_as_the_reward_model_does(tmp_path):
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "pad_token_id": 0}
    classifier = GPT2ForSequenceClassification(GPT2Config(**sizes))
    classifier.transformer.load_state_dict(tiny.gpt2().transformer.state_dict())
    reward_model = get_peft_model(classifier, LoraConfig(r=4, task_type="SEQ_CLS", init_lora_weights=False)).eval()
    reward_model.save_pretrained(tmp_path)
    policy = get_peft_model(tiny.gpt2(), LoraConfig(r=4, task_type="CAUSAL_LM"))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(policy, reward_adapter=str(tmp_path)).train()
    before = {name for name, weight in model.named_parameters() if weight.requires_grad}
    logits = forward(model.eval())[0]
    torch.testing.assert_close(model.compute_reward_score(IDS)[:, -1], reward_model(IDS).logits)
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == before
    assert torch.equal(forward(model)[0], logits)


def test_push_to_hub_uploads_what_is_saved(wrap, monkeypatch):
    seen = {}

    def create(self, repo_id, **options):
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    def upload(self, repo_id, folder_path, commit_message):
        seen[repo_id] = set(load_file(f"{folder_path}/model.safetensors"))
        return "https://hub/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert wrap("gpt2").push_to_hub("ppo") == "https://hub/commit/1"
    assert {"v_head.summary.bias", "transformer.wte.weight"} <= seen["me/ppo"]
