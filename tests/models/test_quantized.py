"""nf4 weights, virtual tokens: what loads, what is counted, what is merged, what is refused."""

import pytest
import tiny
import torch

from yunque.errors import InputError
from yunque.models.adapter import adapter_for
from yunque.models.arguments import ModelArguments, PromptTuningArguments
from yunque.models.loading import load_model, load_tokenizer, save_model, trainable_parameters
from yunque.models.policy import Policy, Reference
from yunque.models.quantized import is_quantized, parameter_bytes, refuse_if_nothing_is_quantized, weight_bytes

LORA = {"use_peft": True, "lora_r": 4}


@pytest.fixture
def folder(tmp_path):
    """Write a tiny model of a family with its tokenizer."""

    def write(family):
        path = tmp_path / family
        model = tiny.FAMILIES[family]()
        if family == "t5":  # as FLAN-T5's, a head of its own
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.1)
            model.config.tie_word_embeddings = False
        model.save_pretrained(path)
        tiny.tokenizer().save_pretrained(path)
        return path

    return write


def load(path, prompt=None, **options):
    args = ModelArguments(model_name_or_path=str(path), **options)
    tokenizer = load_tokenizer(args)
    return load_model(args, tokenizer, prompt), tokenizer


def logits(model):
    inputs = {"input_ids": torch.tensor([[3, 4, 5, 1]])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 7, 8]])
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def nudge(model, part, size=0.2):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(size)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_adapter_on_nf4_reloads_and_merges(family, folder, tmp_path):
    path = folder(family)
    torch.manual_seed(3)  # of the adapter's first matrices: some make small logits of large parts, whose rounding stays
    model, tokenizer = load(path, load_in_4bit=True, **LORA)
    nudge(model, "lora_B")
    expected = logits(model)
    assert (expected - logits(load(path)[0])).norm() > 0.2 * expected.norm()  # far above the noise below
    save_model(model, tokenizer, tmp_path / "adapter")
    assert torch.equal(logits(load(tmp_path / "adapter", load_in_4bit=True)[0]), expected)
    save_model(model, tokenizer, tmp_path / "merged", merge=True)
    plain = load(tmp_path / "merged")[0]
    assert not any(is_quantized(parameter) for parameter in plain.parameters())
    # bfloat16 keeps 8 bits, and a token meets some 30 of its roundings on the way through two layers
    assert (logits(plain) - expected).norm() < 30**0.5 * 2**-8 * expected.norm()
    assert torch.equal(logits(model), expected)  # training could go on


def test_all_linear_layers_of_t5_are_packed(folder):
    model, _ = load(folder("t5"), load_in_4bit=True, quantize_head=True, **LORA)
    plain = [name for name, weight in model.named_parameters() if weight.dim() == 2 and not is_quantized(weight)]
    assert all("shared" in name or "relative_attention_bias" in name or "lora_" in name for name in plain)
    assert tiny.t5()._keep_in_fp32_modules  # transformers' own setting is left as it was


def test_bytes_and_parameters_are_counted_through_the_packing(folder):
    model, _ = load(folder("llama"), load_in_4bit=True, **LORA)
    (weight,) = [weight for name, weight in model.named_parameters() if name.endswith("layers.0.mlp.up_proj.weight")]
    packed = 16 * 32 // 2
    assert packed < parameter_bytes(weight) <= packed + 2 * 1024 + 16 * 32 // 64 + 256  # two code books, scales
    assert weight_bytes(model) == sum(parameter_bytes(parameter) for parameter in model.parameters())
    total = sum(parameter.numel() for parameter in load(folder("llama"), **LORA)[0].parameters())
    assert f"all params: {total:,} " in trainable_parameters(model)


def test_ppo_s_policy_and_reference_work_on_nf4(folder):
    model, tokenizer = load(folder("llama"), load_in_4bit=True, **LORA)
    policy = Policy(model, adapter_for(model, tokenizer))
    batch = policy.adapter.scoring_batch([[3, 4]], [[5, 6, 1]], torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(policy(batch).logprobs_BR, Reference(policy).score(batch).logprobs_BR)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_virtual_tokens_train_reload_and_train_on(family, folder, tmp_path):
    model, tokenizer = load(folder(family), PromptTuningArguments(prompt_tuning_tokens=20))
    trained = [tuple(weight.shape) for weight in model.parameters() if weight.requires_grad]
    assert trained == [(20, 16)]  # before the encoder's prompt only
    nudge(model, "prompt_encoder")
    save_model(model, tokenizer, tmp_path / "prompt")
    again, _ = load(tmp_path / "prompt", PromptTuningArguments())
    torch.testing.assert_close(logits(again), logits(model))
    assert [tuple(weight.shape) for weight in again.parameters() if weight.requires_grad] == [(20, 16)]
    with pytest.raises(InputError, match="virtual tokens"):
        load(tmp_path / "prompt")  # a recipe that would ignore them
    with pytest.raises(InputError, match="merge_adapter: virtual tokens"):
        save_model(model, tokenizer, tmp_path / "merged", merge=True)


def test_nf4_of_a_model_without_linear_layers_is_refused():
    model = tiny.gpt2()  # its layers are Conv1D; its head is the embedding
    with pytest.raises(InputError, match="load_in_4bit: gpt2 has no linear layers"):
        refuse_if_nothing_is_quantized(model, quantize_head=False)


def test_a_head_that_is_the_embedding_is_not_quantized(folder):
    with pytest.raises(InputError, match=r"quantize_head: .*is its embedding"):
        load(folder("gpt2"), load_in_4bit=True, quantize_head=True, **LORA)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"load_in_4bit": True}, "load_in_4bit: nf4 weights do not train"), ({"quantize_head": True}, "quantize_head: ")],
)
def test_options_that_make_no_sense_are_refused(options, words, folder):
    with pytest.raises(InputError, match=words):
        load(folder("t5"), **options)
