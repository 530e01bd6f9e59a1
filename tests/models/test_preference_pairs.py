"""Pairs as token ids: the border between prompt and answer, cuts, what is left out, and padding without effect."""

import datasets
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from yunque.errors import InputError
from yunque.models.adapter import adapter_for
from yunque.models.policy import score_tokens
from yunque.models.preference_arguments import PairArguments
from yunque.models.preference_pairs import PairCollator, answer_tokens, encode_pairs, scoring_batch

EOS = 1
ROWS = [
    {"prompt": "w8 w9", "chosen": " w10 w11 w12", "rejected": " w13"},
    {"prompt": "w20", "chosen": " w10", "rejected": " w13 w14 w15 w16"},
]


def encoded(rows=ROWS, family="llama", tokenizer=None, **options):
    tokenizer = tokenizer or tiny.tokenizer()
    model = tiny.FAMILIES[family]()
    adapter = adapter_for(model, tokenizer)
    pairs, report = encode_pairs(datasets.Dataset.from_list(rows), tokenizer, adapter, PairArguments(**options))
    return model, adapter, pairs, report


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_answers_end_and_prompts_are_as_the_model_reads_them(family):
    _, _, pairs, _ = encoded(family=family, max_completion_length=8)
    assert pairs[0] == {"row": 0, "prompt_ids": [8, 9], "chosen_ids": [10, 11, 12, EOS], "rejected_ids": [13, EOS]}
    assert pairs["row"] == [0, 1]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_tokenizer_without_end_token_takes_the_model_s(family):
    _, _, pairs, _ = encoded(family=family, tokenizer=tiny.tokenizer(eos_token=None), max_completion_length=8)
    assert pairs[0] == {"row": 0, "prompt_ids": [8, 9], "chosen_ids": [10, 11, 12, EOS], "rejected_ids": [13, EOS]}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_batch_scores_each_answer_as_it_is_scored_alone(family):
    model, adapter, pairs, _ = encoded(family=family, max_completion_length=8)
    collate = PairCollator(adapter)

    def sums(rows):
        batch = scoring_batch(collate(rows))
        scores, _ = score_tokens(model, adapter, batch, 1.0, lean=False)
        return (scores.logprobs_BR * batch.mask_BR).sum(dim=1)

    together = sums(list(pairs))
    alone = torch.cat([sums([row]).view(2, 1) for row in pairs], dim=1).flatten()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert [part.tolist() for part in answer_tokens(collate(list(pairs)))] == [[4, 2], [2, 5]]


def test_an_answer_begins_where_the_tokenizer_merges_across_its_border():
    letters = {"a": 2, "b": 3, "c": 4, "ab": 5, "<pad>": 0, "</s>": 1}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    _, _, pairs, _ = encoded([{"prompt": "ca", "chosen": "bc", "rejected": "cc"}], tokenizer=tokenizer)
    # "ca" + "bc" is read as c ab c: the prompt both answers share is c alone
    assert pairs[0] == {"row": 0, "prompt_ids": [4], "chosen_ids": [5, 4, EOS], "rejected_ids": [2, 4, 4, EOS]}


def test_long_answers_are_cut_and_long_prompts_left_out():
    _, _, pairs, report = encoded(max_prompt_length=1, max_completion_length=2)
    assert pairs.to_list() == [{"row": 1, "prompt_ids": [20], "chosen_ids": [10, EOS], "rejected_ids": [13, 14]}]
    assert "left out 1 with prompts over 1 tokens" in report
    assert "1 kept; answers cut: 1" in report


def test_answers_that_the_cut_makes_equal_are_left_out():
    rows = [ROWS[0], {"prompt": "w8", "chosen": " w9 w10", "rejected": " w9 w11"}]
    _, _, pairs, report = encoded(rows, max_completion_length=1)
    assert pairs["row"] == [0]
    assert "1 whose answers are equal as 1 tokens" in report


@pytest.mark.parametrize(
    ("family", "words", "options", "message"),
    [
        ("gpt2", 80, {"max_completion_length": 8}, "max_prompt_length: 1 of 2 prompts have over 56 tokens"),
        ("gpt2", 2, {"max_completion_length": 64}, "max_completion_length: .* 64 positions"),
        ("gpt2", 2, {"max_completion_length": 8, "max_prompt_length": 0}, "max_prompt_length: 0 leaves no prompt"),
        ("t5", 600, {}, "max_prompt_length: 1 of 2 prompts have over 512 tokens"),
        ("llama", 2, {"max_completion_length": 0}, "max_completion_length: 0"),
        ("llama", 2, {"beta": 0}, "beta: 0 is not positive"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(family, words, options, message):
    rows = [ROWS[0], ROWS[1] | {"prompt": " ".join(["w9"] * words)}]
    with pytest.raises(InputError, match=message):
        encoded(rows, family, **options)


def test_no_pair_left_is_an_error():
    with pytest.raises(InputError, match="no pair is left"):
        encoded([ROWS[0]], max_prompt_length=1)
