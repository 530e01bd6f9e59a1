from __future__ import annotations

import datasets
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from yunque.data.arguments import DataArguments
from yunque.data.loading import load_splits
from yunque.data.prompts import prepare_prompts
from yunque.errors import InputError

TEMPLATE = DataArguments().prompt_template
TEMPLATE_TOKENS = 7  # Summarize the following conversation . ... Summary :
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def rows_of(*texts: str) -> datasets.Dataset:
    rows = [{"id": str(number), "text": text, "references": ["r"]} for number, text in enumerate(texts)]
    return datasets.Dataset.from_list(rows)


def numbers(count: int) -> str:
    return " ".join(NUMBERS[:count])


def test_prompt_is_the_template_around_the_text(t5_like):
    prepared = prepare_prompts(rows_of("one two", "{braces} {text}"), t5_like, DataArguments())
    assert prepared.dataset.column_names == ["id", "text", "references", "query", "input_ids"]
    assert prepared.dataset["query"][:] == [
        "Summarize the following conversation.\n\none two\n\nSummary:",
        "Summarize the following conversation.\n\n{braces} {text}\n\nSummary:",
    ]
    assert prepared.dataset["input_ids"][0] == t5_like(prepared.dataset["query"][0])["input_ids"]
    assert str(prepared.report) == "prompts: 2 rows read, 0 dropped by characters, 0 by tokens, 2 kept, none cut"


def test_encoder_decoder_prompt_ends_with_eos_and_decoder_only_does_not(t5_like, llama_like):
    eos, bos = t5_like.eos_token_id, t5_like.bos_token_id
    ids = prepare_prompts(rows_of("one"), t5_like, DataArguments()).dataset["input_ids"][0]
    assert (len(ids), ids[-1], ids.count(eos)) == (TEMPLATE_TOKENS + 2, eos, 1)
    ids = prepare_prompts(rows_of("one"), t5_like, DataArguments(), append_eos=False).dataset["input_ids"][0]
    assert (len(ids), eos in ids) == (TEMPLATE_TOKENS + 1, False)
    ids = prepare_prompts(rows_of("one"), llama_like, DataArguments(), append_eos=False).dataset["input_ids"][0]
    assert (len(ids), ids[0], eos in ids) == (TEMPLATE_TOKENS + 2, bos, False)


@pytest.mark.parametrize("room", [1, 4, 9])
def test_truncation_keeps_the_head_of_the_text_and_the_tail_of_the_template(room, t5_like):
    limit = TEMPLATE_TOKENS + 1 + room
    prepared = prepare_prompts(rows_of(numbers(10), "one"), t5_like, DataArguments(max_prompt_length=limit))
    query, ids = prepared.dataset["query"][0], prepared.dataset["input_ids"][0]
    head, text, tail = query.partition(numbers(room))
    assert (head, text, tail.strip()) == ("Summarize the following conversation.\n\n", numbers(room), "Summary:")
    assert len(ids) == limit
    assert ids[-1] == t5_like.eos_token_id
    assert ids == t5_like(query)["input_ids"]
    assert prepared.dataset["query"][1].endswith("one\n\nSummary:")
    report = prepared.report
    assert (report.truncated, report.tokens_lost, report.rows_kept) == (1, 10 - room, 2)
    assert f"1 cut to {limit} tokens (50.0% of them, {10 - room} tokens lost)" in str(report)


def test_limit_is_the_tokenizers_unless_told_and_never_above_the_models(t5_like):
    t5_like.model_max_length = 14
    lengths = [
        len(prepare_prompts(rows_of(numbers(10)), t5_like, DataArguments(**values), **limits).dataset["input_ids"][0])
        for values, limits in (
            ({}, {}),
            ({"max_prompt_length": 16}, {}),
            ({"max_prompt_length": 16}, {"model_limit": 12}),
            ({}, {"model_limit": 15}),
            ({"max_prompt_length": 100}, {}),
        )
    ]
    assert lengths == [14, 16, 12, 14, 18]


def test_no_room_beside_the_template(t5_like):
    with pytest.raises(InputError, match=r"max_prompt_length: 8 tokens leave no room .* takes 8"):
        prepare_prompts(rows_of(numbers(10)), t5_like, DataArguments(max_prompt_length=8))


def test_filters_count_characters_then_tokens_of_the_whole_prompt(t5_like):
    texts = [numbers(1), numbers(3), numbers(6), "q" * 60]
    args = DataArguments(min_text_chars=4, max_text_chars=50, max_prompt_tokens=TEMPLATE_TOKENS + 1 + 5)
    prepared = prepare_prompts(rows_of(*texts), t5_like, args)
    assert prepared.dataset["text"][:] == [numbers(3)]
    report = prepared.report
    assert (report.rows_read, report.dropped_chars, report.dropped_tokens, report.rows_kept) == (4, 2, 1, 1)
    assert "4 rows read, 2 dropped by characters, 1 by tokens, 1 kept" in str(report)


def test_filter_limits_are_inclusive(t5_like):
    args = DataArguments(min_text_chars=3, max_text_chars=3, min_prompt_tokens=9, max_prompt_tokens=9)
    assert len(prepare_prompts(rows_of("one"), t5_like, args).dataset) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_text_chars": 50}, "min_text_chars=50: no row of 2 is left; the lengths run from 3 to 13 characters"),
        (
            {"min_text_chars": 4, "max_text_chars": 12},
            "min_text_chars=4 and max_text_chars=12: no row of 2 is left; the lengths run from 3 to 13 characters",
        ),
        (
            {"min_text_chars": 4, "min_prompt_tokens": 50},
            "min_prompt_tokens=50: no row of 1 is left; the lengths run from 11 to 11 tokens of the prompt",
        ),
    ],
)
def test_filter_that_leaves_nothing_is_named_with_what_there_is(values, message, t5_like):
    with pytest.raises(InputError) as caught:
        prepare_prompts(rows_of("one", "one two three"), t5_like, DataArguments(**values))
    assert str(caught.value) == message


def test_no_rows(t5_like):
    with pytest.raises(InputError, match="no rows"):
        prepare_prompts(rows_of("one").select([]), t5_like, DataArguments())


def test_slow_tokenizer_and_characters_of_several_tokens():
    tokenizer = ByT5Tokenizer()
    prepared = prepare_prompts(rows_of("é€" * 200), tokenizer, DataArguments(max_prompt_length=101))
    query, ids = prepared.dataset["query"][0], prepared.dataset["input_ids"][0]
    assert query.endswith("\n\nSummary:")
    assert ids == tokenizer(query)["input_ids"]
    assert 101 - 3 < len(ids) <= 101  # the next character would have needed up to 3 tokens


def test_real_dialogues_and_tokenizer(shared_data, shared_models):
    tokenizer = AutoTokenizer.from_pretrained(shared_models / "stories260K")
    data = load_splits(DataArguments(dataset_name=str(shared_data / "dialogsum"), max_train_samples=1000), 0)
    args = DataArguments(min_text_chars=200, max_text_chars=1000, max_prompt_length=300)
    prepared = prepare_prompts(data.train, tokenizer, args, append_eos=False)
    report, rows = prepared.report, prepared.dataset
    assert report.rows_read == 1000
    assert report.rows_kept == len(rows) == sum(200 <= len(text) <= 1000 for text in data.train["text"])
    assert 0 < report.truncated < len(rows)
    head, tail = TEMPLATE.split("{text}")
    cut = 0
    for row in rows:
        assert row["input_ids"] == tokenizer(row["query"])["input_ids"]
        assert len(row["input_ids"]) <= 300
        kept = row["query"].removeprefix(head).removesuffix(tail)
        assert row["query"] == head + kept + tail
        assert row["text"].startswith(kept)
        cut += kept != row["text"]
    assert cut == report.truncated
    lost = sum(len(tokenizer(head + row["text"] + tail)["input_ids"]) - len(row["input_ids"]) for row in rows)
    assert lost == report.tokens_lost
