"""Adapter folders as users bring them: against PEFT on the base, which shares no code with ours."""

import json
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from yunque.errors import InputError
from yunque.models.adapter import adapter_for
from yunque.models.arguments import ModelArguments, PromptTuningArguments
from yunque.models.classifier import load_to_classify, save_classifier
from yunque.models.inference import load_for_inference
from yunque.models.loading import load_classifier, load_model, load_tokenizer, save_model
from yunque.rl.rollout import check_rollouts

TIED = {
    "llama head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "llama embedding": ("llama", {"target_modules": ["embed_tokens"]}),
    "llama both as one": ("llama", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "llama saved whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "llama some tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}),
    "llama dora": ("llama", {"target_modules": ["lm_head"], "use_dora": True}),
    "gpt2 embedding": ("gpt2", {"target_modules": ["wte"]}),
    "gpt2 biases": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "t5 head": ("t5", {"target_modules": ["q", "lm_head"]}),
    "t5 embedding": ("t5", {"target_modules": ["shared", "embed_tokens"]}),
    "bart head": ("bart", {"target_modules": ["lm_head"]}),
    "bart embedding": ("bart", {"target_modules": ["embed_tokens"]}),
}


def auto(family):
    return AutoModelForSeq2SeqLM if family in ("t5", "bart") else AutoModelForCausalLM


def write_base(path, family):
    tied = {"tie_word_embeddings": True} if family == "llama" else {}
    tiny.FAMILIES[family](**tied).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def write_adapter(path, model, config, tokenizer=None):
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    adapted.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return adapted


def logits(model):
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **extra).logits.float()


def load(path, **options):
    args = ModelArguments(model_name_or_path=str(path), **options)
    tokenizer = load_tokenizer(args)
    return load_model(args, tokenizer), tokenizer


@pytest.mark.parametrize("case", TIED)
def test_an_adapter_on_what_is_tied_merges_rolls_out_and_reloads_as_itself(case, tmp_path):
    family, options = TIED[case]
    task = "SEQ_2_SEQ_LM" if family in ("t5", "bart") else "CAUSAL_LM"
    base = write_base(tmp_path / "base", family)
    write_adapter(tmp_path / "adapter", auto(family).from_pretrained(base), LoraConfig(r=4, task_type=task, **options))
    plain = auto(family).from_pretrained(base)
    expected = logits(PeftModel.from_pretrained(auto(family).from_pretrained(base), str(tmp_path / "adapter")))
    assert not torch.allclose(logits(plain), expected, atol=0.02)
    model, tokenizer = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    check_rollouts(model, adapter_for(model, tokenizer), torch.device("cpu"))
    save_model(model, tokenizer, tmp_path / "merged", merge=True)
    merged = auto(family).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    together = "as one" in case or "biases" in case
    if "some tokens" not in case:
        assert config["tie_word_embeddings"] is together


def test_the_embeddings_grow_to_those_of_the_adapter(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    tokenizer = tiny.tokenizer(size=70)
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(70)
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    adapted = write_adapter(tmp_path / "adapter", grown, config, tokenizer)
    model, _ = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(adapted))
    found = load_for_inference(ModelArguments(model_name_or_path=str(tmp_path / "adapter")))
    torch.testing.assert_close(logits(found.model), logits(adapted))
    save_model(model, tokenizer, tmp_path / "merged", merge=True)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(adapted))


def test_a_tokenizer_larger_than_the_model_is_refused_by_every_loader(tmp_path):
    write_base(tmp_path / "base", "llama")
    tiny.tokenizer(size=70).save_pretrained(tmp_path / "base")
    tiny.roberta().save_pretrained(tmp_path / "classifier")
    tiny.tokenizer(size=70).save_pretrained(tmp_path / "classifier")
    with pytest.raises(InputError, match="added tokens resize"):
        load(tmp_path / "base")
    with pytest.raises(InputError, match="added tokens resize"):
        load_for_inference(ModelArguments(model_name_or_path=str(tmp_path / "base")))
    with pytest.raises(InputError, match=r"^reward_model_name_or_path: .*added tokens resize"):
        load_classifier(str(tmp_path / "classifier"))


def test_an_adapter_without_a_tokenizer_takes_its_base_s_wherever_both_moved(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    write_base(tmp_path / "old" / "models" / "base", "llama")
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    write_adapter("models/adapter", AutoModelForCausalLM.from_pretrained("models/base"), config)
    monkeypatch.chdir(tmp_path)
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert load(tmp_path / "new" / "models" / "adapter")[1].pad_token == "<pad>"


@pytest.mark.parametrize("labels", [["negative", "neutral", "very positive"], ["fine", "toxic"], ["reward"]])
def test_the_labels_of_a_classifier_s_adapter_are_those_it_was_trained_with(labels, tmp_path):
    tiny.roberta().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    args = ModelArguments(
        model_name_or_path=str(tmp_path / "base"), use_peft=True, lora_r=2, lora_target_modules=["query"]
    )
    model = load_to_classify(args, tiny.tokenizer(), labels)
    save_classifier(model, tiny.tokenizer(), tmp_path / "saved", merge=False)
    loaded, _ = load_classifier(str(tmp_path / "saved" / "adapter"))
    assert list(loaded.config.id2label.values()) == labels
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_labels_without_names_are_asked_for_and_one_reward_needs_none(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    for count, name in ((3, "three"), (1, "one")):
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=count, pad_token_id=0)
        config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"])
        trained = write_adapter(tmp_path / name, model, config)
    loaded, _ = load_classifier(str(tmp_path / "one"))
    torch.testing.assert_close(logits(loaded), logits(trained), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="do not name its 3 labels") as error:
        load_classifier(str(tmp_path / "three"))
    assert "base that cannot be loaded" not in str(error.value)


def test_prefixes_are_refused_where_nothing_reads_them_and_evaluate(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapted = write_adapter(tmp_path / "prefix", AutoModelForCausalLM.from_pretrained(base), config)
    with pytest.raises(InputError, match="holds virtual tokens"):
        load(tmp_path / "prefix")
    found = load_for_inference(ModelArguments(model_name_or_path=str(tmp_path / "prefix")))
    torch.testing.assert_close(logits(found.model), logits(adapted))


def test_p_tuning_has_nothing_to_train_on(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    write_adapter(tmp_path / "prompt", AutoModelForCausalLM.from_pretrained(base), config)
    args = ModelArguments(model_name_or_path=str(tmp_path / "prompt"))
    with pytest.raises(InputError, match=r"p tuning\) cannot be trained on"):
        load_model(args, load_tokenizer(args), PromptTuningArguments())


@pytest.mark.parametrize(
    ("names", "words"),
    [(["nope", "q_proj"], "nope matches nothing"), (["mlp"], "cannot be adapted")],
)
def test_targets_that_no_adapter_fits_are_one_line(names, words, tmp_path):
    base = write_base(tmp_path / "base", "llama")
    with pytest.raises(InputError, match=f"lora_target_modules: .*{words}.*all-linear"):
        load(base, use_peft=True, lora_target_modules=names)


def test_all_linear_is_peft_s_own_word_and_hints_name_what_gpt2_has(tmp_path):
    base = write_base(tmp_path / "base", "gpt2")
    model, _ = load(base, use_peft=True, lora_target_modules=["all-linear"])
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"c_attn", "c_proj", "c_fc"}
    with pytest.raises(InputError, match="give some of c_attn, c_fc, c_proj, lm_head"):
        load(base, use_peft=True, lora_target_modules=["q_proj"])
