"""KL from the aligned model on its own answers: of torch and ONNX folders, encoder-decoder and decoder-only."""

import numpy as np
import pytest
import torch
from evaluating import generations, result
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from yunque.evaluation.divergence import token_divergences


def test_divergence_is_torch_s_and_never_below_0():
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(5, 11)).astype(np.float32) * 3 for _ in range(2))
    logs = [torch.log_softmax(torch.tensor(logits).double(), dim=1) for logits in (first, second)]
    wanted = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="none").sum(dim=1)
    np.testing.assert_allclose(token_divergences(first, second), wanted.numpy(), rtol=1e-9)
    assert (token_divergences(first, first) == 0).all()
    assert token_divergences(first, first + 1e-6).min() >= 0


@pytest.fixture
def measured(evaluate, kinds):
    def run(folder, aligned, **given):
        done = evaluate(
            folder, kl_model_name_or_path=vars(kinds)[aligned], max_test_samples=4, latency_prompts=0, **given
        )
        assert done.code == 0, done.errors
        return result(done.folder), generations(done.folder)

    return run


def distances(rows):
    return [row["scores"]["kl"] for row in rows]


@pytest.mark.parametrize(("folder", "aligned"), [("onnx", "t5"), ("onnx_llama", "llama")])
def test_an_export_is_where_the_aligned_model_is(measured, folder, aligned):
    _, rows = measured(folder, aligned)
    assert 0 < max(distances(rows)) < 1e-6  # the sums differ in their last digits, so it was computed


def test_a_variant_s_distance_is_over_the_aligned_model_s_answers(measured, kinds):
    written, rows = measured("adapter", "t5")
    tokenizer, base = AutoTokenizer.from_pretrained(kinds.t5), AutoModelForSeq2SeqLM.from_pretrained(kinds.t5)
    variant = AutoModelForSeq2SeqLM.from_pretrained(kinds.adapter).eval()
    row = rows[0]
    query = tokenizer(row["prompt"], return_tensors="pt").input_ids
    with torch.inference_mode():
        answer = base.eval().generate(query, max_new_tokens=6, do_sample=False)
        logits = [model(query, decoder_input_ids=answer[:, :-1]).logits[0].numpy() for model in (base, variant)]
    assert distances(rows)[0] == pytest.approx(token_divergences(*logits).mean(), rel=1e-4)
    assert distances(rows)[0] > 0.01
    assert written["kl_model"]["path"] == str(kinds.t5)
    assert written["units"]["kl"].startswith("nats per token")


def test_the_aligned_model_itself_is_at_0_and_others_are_refused(measured, evaluate, kinds):
    assert distances(measured("t5", "t5")[1]) == [0.0] * 4
    done = evaluate("t5", kl_model_name_or_path=kinds.llama, overwrite_output_dir=True)
    assert done.code == 2
    assert "not both encoder-decoder or decoder-only" in done.errors
    done = evaluate("t5", kl_model_name_or_path="/nowhere/else", overwrite_output_dir=True)
    assert done.code == 2
    assert "kl_model_name_or_path" in done.errors
