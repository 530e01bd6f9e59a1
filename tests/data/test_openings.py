from __future__ import annotations

import collections

import datasets
import pytest
from transformers import AutoTokenizer

from yunque.data.arguments import OpeningArguments
from yunque.data.openings import continuation_decoder, load_texts, prepare_openings
from yunque.errors import InputError
from yunque.rl.loop import Prompts

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def rows_of(*texts: str, first: int = 0) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"number": first + row, "text": text} for row, text in enumerate(texts)])


def arguments(**options):
    return OpeningArguments(**{"min_text_chars": None} | options)


def lengths(prepared):
    return [len(ids) for ids in prepared.dataset["input_ids"]]


def test_prompt_is_the_first_tokens_of_the_text_as_ids_and_text(llama_like):
    prepared = prepare_openings(
        rows_of(*[" ".join(NUMBERS)] * 50), llama_like, arguments(prompt_tokens_low=2, prompt_tokens_high=8), seed=0
    )
    whole = llama_like(" ".join(NUMBERS))["input_ids"]
    for row in prepared.dataset:
        size = len(row["input_ids"]) - 1  # <s> comes on top
        assert row["input_ids"] == whole[: size + 1]
        assert row["query"] == " ".join(NUMBERS[:size])
    assert prepared.dataset.column_names == ["number", "text", "query", "input_ids"]


def test_lengths_are_uniform_over_the_range_both_ends_included(t5_like):
    prepared = prepare_openings(rows_of(*[" ".join(NUMBERS)] * 3500), t5_like, arguments(), seed=0)
    counts = collections.Counter(lengths(prepared))
    assert set(counts) == set(range(2, 9))
    assert max(abs(count - 500) for count in counts.values()) < 5 * 21  # 5 standard deviations of the binomial


def test_end_token_of_the_tokenizer_is_left_out(t5_like):
    prepared = prepare_openings(
        rows_of("one two"), t5_like, arguments(prompt_tokens_low=2, prompt_tokens_high=2), seed=0
    )
    assert prepared.dataset["input_ids"][0] == t5_like("one two", add_special_tokens=False)["input_ids"]


def test_length_depends_on_seed_and_row_number_alone(llama_like):
    text = " ".join(NUMBERS)
    everything = prepare_openings(rows_of(*[text] * 40), llama_like, arguments(), seed=3)
    assert lengths(prepare_openings(rows_of(*[text] * 40), llama_like, arguments(), seed=3)) == lengths(everything)
    some = prepare_openings(rows_of(*[text] * 10, first=30), llama_like, arguments(), seed=3)
    assert lengths(some) == lengths(everything)[30:]
    assert lengths(prepare_openings(rows_of(*[text] * 40), llama_like, arguments(), seed=4)) != lengths(everything)


def test_rows_are_dropped_by_characters_and_by_tokens_and_counted(llama_like):
    texts = ["one two three", "one two three!", "supercalifragilistic", "one"]
    args = arguments(min_text_chars=13, max_text_chars=20, prompt_tokens_low=3, prompt_tokens_high=3)
    prepared = prepare_openings(rows_of(*texts), llama_like, args, seed=0)
    assert prepared.dataset["text"][:] == texts[:2]
    assert (prepared.rows_read, prepared.dropped_chars, prepared.dropped_tokens) == (4, 1, 1)
    assert "4 rows read, 1 dropped by characters, 1 with fewer tokens than their prompt, 2 kept" in str(prepared)


def test_only_reviews_of_more_than_200_characters_by_default(llama_like):
    texts = [("one two " * 30)[:200], ("one two " * 30)[:201]]
    prepared = prepare_openings(rows_of(*texts), llama_like, OpeningArguments(), seed=0)
    assert prepared.dataset["number"][:] == [1]


def test_nothing_left_and_too_long(llama_like):
    with pytest.raises(InputError, match=r"min_text_chars=99, .* no row of 2 is left"):
        prepare_openings(rows_of("one two", "three"), llama_like, arguments(min_text_chars=99), seed=0)
    args = arguments(prompt_tokens_low=4, prompt_tokens_high=4)
    with pytest.raises(InputError, match="prompt_tokens_high: prompts of 5 tokens, but the model has room for 4"):
        prepare_openings(rows_of("one two three four"), llama_like, args, seed=0, model_limit=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens_low": 0}, "prompt_tokens_low: 0 is not a limit"),
        ({"prompt_tokens_low": 9}, "prompt_tokens_low: 9 is more than prompt_tokens_high=8"),
        ({"min_text_chars": 300, "max_text_chars": 200}, "min_text_chars: 300 is more than max_text_chars=200"),
        ({"test_split": "train"}, "test_split: 'train' is also the train_split"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        OpeningArguments(**options)


def test_rows_keep_their_number_in_the_file(write_jsonl):
    path = write_jsonl("train.jsonl", [{"text": "a"}, {"text": " "}, {"text": "b"}, {"text": "c"}])
    data = load_texts(OpeningArguments(dataset_name=str(path), test_size=0.4), 0)
    rows = [*data.train, *data.test]
    assert sorted((row["number"], row["text"]) for row in rows) == [(0, "a"), (2, "b"), (3, "c")]
    assert data.dropped_empty == {"train": 1}
    with pytest.raises(InputError, match=r"text_column: no column 'review' .* it has text"):
        load_texts(OpeningArguments(dataset_name=str(path), text_column="review"), 0)


@pytest.fixture
def stories(shared_models):
    return AutoTokenizer.from_pretrained(shared_models / "stories260K")


def test_real_reviews_and_tokenizer(shared_data, stories):
    data = load_texts(OpeningArguments(dataset_name=str(shared_data / "imdb"), max_train_samples=200), 0)
    assert (data.train.num_rows, data.test.num_rows) == (200, 2500)
    prepared = prepare_openings(data.train, stories, OpeningArguments(), seed=0)
    assert prepared.rows_read - prepared.dropped_chars == len(prepared.dataset) > 190
    for row in prepared.dataset:
        assert len(row["text"]) > 200
        assert row["input_ids"][0] == stories.bos_token_id
        assert 2 <= len(row["input_ids"]) - 1 <= 8
        assert row["text"].startswith(row["query"].rstrip("\ufffd"))  # a character of several bytes may be cut


def test_continuation_keeps_the_space_before_its_first_word(stories):
    text = "This movie was great. é€ "
    ids = stories(text, add_special_tokens=False)["input_ids"]
    decode = continuation_decoder(stories)
    for cut in range(3, 10):
        assert stories.decode(ids[:cut]) + decode(ids[cut:]) == text
    assert stories.decode(ids[3:]) == "movie was great. é€ "  # what a plain decoding makes of it
    assert decode([]) == ""
    assert decode([*ids[3:6], stories.eos_token_id]) == decode(ids[3:6])


def test_the_file_s_own_columns_stay_with_the_prompts_for_reward_functions(t5_like, tmp_path):
    (tmp_path / "reviews.jsonl").write_text(
        "".join(f'{{"text": "{name} one two three", "stars": {n}}}\n' for n, name in enumerate(NUMBERS))
    )
    options = arguments(dataset_name=str(tmp_path / "reviews.jsonl"), prompt_tokens_low=2, prompt_tokens_high=2)
    data = load_texts(options, 0, keep_columns=True)
    prompts = Prompts.of(prepare_openings(data.train, t5_like, options, seed=0).dataset)
    assert len(prompts.texts) == len(prompts.columns["stars"]) > 5
    for query, stars in zip(prompts.texts, prompts.columns["stars"], strict=True):
        assert query.startswith(NUMBERS[stars])
    assert not Prompts.of(prepare_openings(load_texts(options, 0).train, t5_like, options, seed=0).dataset).columns
