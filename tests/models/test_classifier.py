"""What a reward model reads of pairs."""

import datasets
import pytest
import tiny

from yunque.errors import InputError
from yunque.models.arguments import ModelArguments
from yunque.models.classifier import encode_pairs, load_to_classify, pair_texts

ROWS = datasets.Dataset.from_dict(
    {"prompt": ["w5 w6", "w7"], "chosen": [" w8", " w9 w10 w11"], "rejected": [" w12", " w9 w13 w11"]}
)


def test_prompt_and_answer_or_the_answer_alone():
    assert pair_texts(ROWS, "chosen", "query_response") == ["w5 w6 w8", "w7 w9 w10 w11"]
    assert pair_texts(ROWS, "rejected", "response") == [" w12", " w9 w13 w11"]


def test_the_end_of_a_long_text_stays():
    encoded, report = encode_pairs(ROWS, tiny.tokenizer(), 3, "query_response")
    assert encoded["chosen_ids"][:] == [[5, 6, 8], [9, 10, 11]]
    assert encoded["rejected_ids"][:] == [[5, 6, 12], [9, 13, 11]]
    assert "texts: 4, cut to their last 3 tokens: 2, pairs alike then: 0" in report


def test_pairs_alike_once_cut_are_counted_and_refused_where_all_are():
    assert "pairs alike then: 1" in encode_pairs(ROWS, tiny.tokenizer(), 1, "query_response")[1]
    with pytest.raises(InputError, match="max_length: of all 1 pairs the last 1 tokens are equal"):
        encode_pairs(ROWS.select([1]), tiny.tokenizer(), 1, "query_response")


def test_margins_stay():
    rows = ROWS.add_column("margin", [0.5, 1.0])
    assert encode_pairs(rows, tiny.tokenizer(), 8, "response")[0]["margin"][:] == [0.5, 1.0]


def test_more_tokens_than_the_model_reads_are_refused():
    with pytest.raises(InputError, match="max_length: 600 is more than the 512"):
        encode_pairs(ROWS, tiny.tokenizer(), 600, "response")


def test_an_encoder_decoder_under_fsdp_is_refused_before_it_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name in ("t5", "llama"):
        getattr(tiny, name)().save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    load_to_classify(ModelArguments(model_name_or_path=str(tmp_path / "llama")), tiny.tokenizer(), ["a", "b"])
    with pytest.raises(InputError, match=r"launch profile fsdp2: reward: .* take zero3"):
        load_to_classify(ModelArguments(model_name_or_path=str(tmp_path / "t5")), tiny.tokenizer(), ["a", "b"])
