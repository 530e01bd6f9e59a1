import itertools
import json

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM

from yunque.errors import InputError
from yunque.models.arguments import ModelArguments
from yunque.models.loading import (
    adapter_config,
    load_classifier,
    load_model,
    load_tokenizer,
    save_model,
    trainable_parameters,
)


@pytest.fixture
def t5_folder(tmp_path):
    folder = tmp_path / "t5"
    tiny.t5().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def load(folder, **options):
    args = ModelArguments(model_name_or_path=str(folder), **options)
    tokenizer = load_tokenizer(args)
    return load_model(args, tokenizer), tokenizer


def logits(model):
    inputs = torch.tensor([[3, 4, 5, 1]])
    with torch.no_grad():
        return model.eval()(input_ids=inputs, decoder_input_ids=torch.tensor([[0, 7, 8]])).logits


def test_a_saved_model_loads_with_the_same_logits(t5_folder):
    model, _ = load(t5_folder)
    torch.testing.assert_close(logits(model), logits(tiny.t5()))


def test_an_untied_head_stays_untied_through_saving(tmp_path):
    model = tiny.t5()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 2)
    model.config.tie_word_embeddings = False
    expected = logits(model)
    model.save_pretrained(tmp_path / "once")
    tiny.tokenizer().save_pretrained(tmp_path / "once")
    loaded, tokenizer = load(tmp_path / "once")
    assert loaded.config.tie_word_embeddings is False
    loaded.tie_weights()  # what FSDP and resize_token_embeddings call, and what ties a head that claims to be tied
    torch.testing.assert_close(logits(loaded), expected)
    save_model(loaded, tokenizer, tmp_path / "twice")
    torch.testing.assert_close(logits(load(tmp_path / "twice")[0]), expected)


def test_lora_trains_only_the_adapter(t5_folder):
    model, _ = load(t5_folder, use_peft=True, lora_r=4, lora_target_modules=["q", "v"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name and (".q." in name or ".v." in name) for name in trained)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable_parameters(model).startswith(f"trainable params: {count:,} || all params: ")


def test_lora_starts_from_the_same_matrices_whatever_else_is_drawn(t5_folder):
    def drawn(seed, *targets):
        torch.manual_seed(seed)
        model, _ = load(t5_folder, use_peft=True, lora_r=4, lora_target_modules=list(targets))
        after = torch.rand(3)
        return {name: value.detach() for name, value in model.named_parameters() if ".lora_A." in name}, after

    few, after_few = drawn(1, "v")
    many, after_many = drawn(1, "q", "v", "lm_head")
    assert 0 < len(few) < len(many)
    assert all(torch.equal(few[name], many[name]) for name in few)
    assert torch.equal(after_few, after_many)
    values = list(many.values())
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(values, 2))
    for matrix in values:  # PEFT's own: uniform in +- 1 / sqrt(inputs)
        bound = matrix.shape[1] ** -0.5
        assert 0.8 * bound < matrix.abs().max() <= bound
        assert matrix.std() == pytest.approx(bound / 3**0.5, rel=0.2)
    assert not any(torch.equal(many[name], value) for name, value in drawn(2, "q", "v", "lm_head")[0].items())


def test_an_adapter_folder_loads_onto_its_base_and_goes_on_training(t5_folder, tmp_path):
    model, tokenizer = load(t5_folder, use_peft=True, lora_r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2)
    save_model(model, tokenizer, tmp_path / "adapter")
    assert adapter_config(str(tmp_path / "adapter"))["base_model_name_or_path"] == str(t5_folder)
    loaded, _ = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model))
    assert any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_merged_folder_is_a_plain_model_with_the_adapter_inside(t5_folder, tmp_path):
    model, tokenizer = load(t5_folder, use_peft=True, lora_r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2)
    expected = logits(model)
    save_model(model, tokenizer, tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    torch.testing.assert_close(
        logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(logits(model), expected)  # the trained model is not touched by saving


def test_classifier_loads_with_its_labels(tmp_path):
    tiny.roberta().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, _ = load_classifier(str(tmp_path))
    assert model.config.id2label == {0: "nothate", 1: "hate"}
    assert not model.training


def test_a_language_model_is_no_classifier(t5_folder):
    with pytest.raises(InputError, match=r"reward_model_name_or_path: .*no trained classification head"):
        load_classifier(str(t5_folder), "reward_model_name_or_path")


def test_a_model_without_pad_token_is_refused_and_pad_token_mends_it(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    tiny.tokenizer(pad_token=None).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model_name_or_path: .*no pad token.*--pad_token"):
        load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))
    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path), pad_token="<unk>"))
    assert tokenizer.pad_token_id == 2
    with pytest.raises(InputError, match="pad_token: 'nothing' is not in the vocabulary"):
        load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path), pad_token="nothing"))


def test_a_tokenizer_of_another_model_is_refused(t5_folder):
    tiny.tokenizer(size=100).save_pretrained(t5_folder)
    with pytest.raises(InputError, match="token ids up to 99, its model only 64"):
        load(t5_folder)


def test_lora_targets_that_match_nothing_list_what_there_is(t5_folder):
    with pytest.raises(InputError, match=r"lora_target_modules: .*nope.* give some of k, lm_head, o, q, v"):
        load(t5_folder, use_peft=True, lora_target_modules=["nope"])


@pytest.mark.parametrize("name", ["/no/such/model", "./nope", "no/such/model"])
def test_a_missing_folder_is_refused_without_asking_the_hub(name):
    with pytest.raises(InputError, match="model_name_or_path: no such model folder"):
        load_tokenizer(ModelArguments(model_name_or_path=name))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(InputError, match=r"folder without config\.json"):
        load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))


def test_a_damaged_folder_is_refused_in_one_line(t5_folder):
    (t5_folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot load") as error:
        load(t5_folder)
    assert "\n" not in str(error.value)


def test_damaged_weights_are_refused_in_one_line(t5_folder):
    (t5_folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(InputError, match="cannot load a language model") as error:
        load(t5_folder)
    assert "\n" not in str(error.value)


def test_an_adapter_without_its_base_is_refused(t5_folder, tmp_path):
    model = get_peft_model(tiny.t5(), LoraConfig(r=4, task_type="SEQ_2_SEQ_LM"))
    save_model(model, tiny.tokenizer(), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/gone/base"}))
    with pytest.raises(InputError, match="/gone/base"):
        load(tmp_path / "adapter")
