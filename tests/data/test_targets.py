import datasets
import pytest
import tiny
import torch
from tokenizers import processors
from transformers import M2M100Config, M2M100ForConditionalGeneration

from yunque.data.targets import AnswerCollator, encode_answers, encode_targets


def encoded(max_target_length):
    rows = {"references": [["w3 w4 w5", "w9"], ["w6"]], "input_ids": [[5, 6], [7]]}
    return encode_targets(datasets.Dataset.from_dict(rows), tiny.tokenizer(), max_target_length, [1])


def test_the_first_reference_is_the_label():
    rows, report = encoded(8)
    assert rows["labels"] == [[3, 4, 5, 1], [6, 1]]
    assert rows["input_ids"] == [[5, 6], [7]]
    assert report == "answers: 2, cut to 8 tokens: 0 (0 tokens lost)"


def test_a_long_answer_is_cut_and_counted():
    rows, report = encoded(2)
    assert rows["labels"] == [[3, 1], [6, 1]]
    assert report == "answers: 2, cut to 2 tokens: 1 (2 tokens lost)"


def ending(template):
    tokenizer = tiny.tokenizer()
    specials = [("</s>", 1), ("w60", 60)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "eos_ids", "whole", "cut"),
    [
        ("$A", [1, 9], [3, 4, 5, 1], [3, 1]),  # adds none itself
        ("$A </s>", [1, 9], [3, 4, 5, 1], [3, 1]),  # T5
        ("</s> $A </s>", [1], [1, 3, 4, 5, 1], [1, 1]),  # BART, whose start is its end
        ("$A </s> w60", [1], [3, 4, 5, 1, 60], [1, 60]),  # mBART: the language after the end
        ("w60 $A </s>", [1], [60, 3, 4, 5, 1], [60, 1]),  # mBART-50
    ],
)
def test_every_answer_has_one_end_token(template, eos_ids, whole, cut):
    tokenizer = ending(template)
    assert encode_answers(["w3 w4 w5"], tokenizer, eos_ids) == [whole]
    assert encode_answers(["w3 w4 w5"], tokenizer, eos_ids, 2) == [cut]


def test_an_answer_that_ends_itself_gets_no_second_end():
    assert encode_answers(["w3 </s>", "w3 w9"], tiny.tokenizer(), [1, 9]) == [[3, 1], [3, 9]]


def tiny_m2m():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    return M2M100ForConditionalGeneration(M2M100Config(**ids, **sizes, **heads)).eval()


@pytest.mark.parametrize("build", [tiny.t5, tiny.bart, tiny_m2m])
def test_a_decoder_reads_what_the_model_s_own_loss_lets_it_read(build):
    model = build()
    batch = AnswerCollator(tiny.tokenizer(), model)(
        [{"input_ids": [5, 6, 7], "labels": [8, 9, 1]}, {"input_ids": [5], "labels": [8, 1], "row": 3}]
    )
    assert batch["labels"].tolist() == [[8, 9, 1], [8, 1, -100]]
    labels = batch.pop("labels")
    with torch.no_grad():
        own = model(**{name: value for name, value in batch.items() if name != "decoder_input_ids"}, labels=labels)
        torch.testing.assert_close(model(**batch).logits, own.logits)


def test_a_decoder_only_model_gets_no_decoder_inputs():
    batch = AnswerCollator(tiny.tokenizer(), tiny.llama())([{"input_ids": [5, 6], "labels": [-100, 6]}])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
