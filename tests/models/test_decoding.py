"""Lean decoders against the model's own forward pass, on queries of unequal length."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from yunque.models import decoding
from yunque.models.adapter import adapter_for
from yunque.models.decoders import ModelDecoder, decoder_for
from yunque.models.decoding import length_batches
from yunque.models.decoding_causal import GPT2Decoder, LlamaDecoder
from yunque.models.decoding_t5 import T5Decoder

CPU = torch.device("cpu")
QUERIES = [[3, 4, 5], [6, 7, 8, 9, 10, 12, 13], [11], [14, 15]]
RESPONSES = torch.tensor([[20, 21, 22, 23], [30, 31, 32, 33], [40, 41, 42, 43], [50, 51, 52, 53]])

MODELS = {
    "t5": (lambda: tiny.t5(), T5Decoder),
    "t5-gated-untied": (lambda: tiny.t5(feed_forward_proj="gated-gelu", is_gated_act=True), T5Decoder),
    "gpt2": (lambda: tiny.gpt2(), GPT2Decoder),
    "gpt2-inverse-layer": (lambda: tiny.gpt2(scale_attn_by_inverse_layer_idx=True), GPT2Decoder),
    "llama": (lambda: tiny.llama(), LlamaDecoder),
    "llama-grouped": (lambda: tiny.llama(num_key_value_heads=1), LlamaDecoder),
    "bart": (lambda: tiny.bart(), ModelDecoder),
    "gpt2-own-forward": (lambda: tiny.gpt2(reorder_and_upcast_attn=True), ModelDecoder),
    "llama-own-forward": (lambda: tiny.llama(model_type="unknown"), ModelDecoder),
}


@pytest.fixture(params=MODELS)
def case(request, monkeypatch):
    monkeypatch.setattr(decoding, "_PASS_TOKENS", {"cpu": 8})  # several prefill passes for these few queries
    build, decoder = MODELS[request.param]
    model = build()
    if request.param == "t5-gated-untied":
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.config.scale_decoder_outputs = False
    return model, decoder


@torch.no_grad()
def expected(model, row, length):
    """Logits and hidden state that predict response token ``length`` of a row, without cache or padding."""
    adapter = adapter_for(model, tiny.tokenizer())
    response = [*RESPONSES[row, :length].tolist(), 1]
    logits, hidden = adapter.score(model, adapter.scoring_batch([QUERIES[row]], [response], CPU))
    return logits[0, -1], hidden[0, -1]


@torch.no_grad()
def test_every_step_is_that_of_the_whole_sequence(case):
    model, kind = case
    decoder = decoder_for(model, adapter_for(model, tiny.tokenizer()), QUERIES, 5, CPU)
    assert type(decoder) is kind
    logits, hidden = decoder.first()
    for length in range(4):
        for row in range(len(QUERIES)):
            wanted_logits, wanted_hidden = expected(model, row, length)
            torch.testing.assert_close(logits[row], wanted_logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(hidden[row], wanted_hidden, rtol=1e-4, atol=1e-5)
        logits, hidden = decoder.step(RESPONSES[:, length])


@torch.no_grad()
def test_dropped_rows_leave_the_others_as_they_were(case):
    model, _ = case
    decoder = decoder_for(model, adapter_for(model, tiny.tokenizer()), QUERIES, 5, CPU)
    decoder.first()
    decoder.step(RESPONSES[:, 0])
    rows = torch.tensor([1, 3])
    decoder.keep(rows)
    logits, _ = decoder.step(RESPONSES[rows, 1])
    decoder.keep(torch.tensor([1]))
    later, _ = decoder.step(RESPONSES[3:, 2])
    for index, row in enumerate(rows.tolist()):
        torch.testing.assert_close(logits[index], expected(model, row, 2)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(later[0], expected(model, 3, 3)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "gpt2", "llama"])
def test_half_precision_decodes_like_the_forward_pass(family):
    model = tiny.FAMILIES[family]().bfloat16()
    decoder = decoder_for(model, adapter_for(model, tiny.tokenizer()), QUERIES, 5, CPU)
    decoder.first()
    logits, _ = decoder.step(RESPONSES[:, 0])
    assert logits.dtype == torch.bfloat16
    for row in range(len(QUERIES)):
        torch.testing.assert_close(logits[row], expected(model, row, 1)[0], rtol=0.1, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "gpt2", "llama"])
def test_autocast_decodes_like_the_forward_pass(family):
    model = tiny.FAMILIES[family]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoder = decoder_for(model, adapter_for(model, tiny.tokenizer()), QUERIES, 5, CPU)
        decoder.first()
        logits, _ = decoder.step(RESPONSES[:, 0])
        for row in range(len(QUERIES)):
            torch.testing.assert_close(logits[row].float(), expected(model, row, 1)[0].float(), rtol=0.1, atol=0.1)


@torch.no_grad()
def test_an_adapter_takes_part():
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(), LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    decoder = decoder_for(model, adapter_for(model, tiny.tokenizer()), QUERIES, 5, CPU)
    assert isinstance(decoder, LlamaDecoder)
    decoder.first()
    logits, _ = decoder.step(RESPONSES[:, 0])
    torch.testing.assert_close(logits[0], expected(model, 0, 1)[0], rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(logits[0], expected(model, 0, 1)[0], atol=1e-2)


def test_length_batches_hold_neighbours_within_the_budget(monkeypatch):
    monkeypatch.setattr(decoding, "_PASS_TOKENS", {"cpu": 6})

    def batches(*lengths, **options):
        return list(length_batches([[7] * length for length in lengths], CPU, **options))

    assert batches(5, 1, 9, 2, 2) == [[1, 3, 4], [0], [2]]
    assert batches() == []
    assert batches(3, 3, 3, 3) == [[0, 1], [2, 3]]
    assert batches(1, 1, 1, 1, 1, most_rows=2) == [[0, 1], [2, 3], [4]]
