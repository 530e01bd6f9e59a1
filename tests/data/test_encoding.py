"""No text gets a beginning that it has already, wherever texts become tokens."""

import datasets
import pytest
import tiny
import torch
from tokenizers import processors

from yunque.data.arguments import DataArguments, OpeningArguments
from yunque.data.encoding import encode
from yunque.data.openings import prepare_openings
from yunque.data.prompts import prepare_prompts
from yunque.models.adapter import adapter_for
from yunque.models.preference_arguments import PairArguments
from yunque.models.preference_pairs import encode_pairs
from yunque.rl.rewards import ClassifierScorer


@pytest.fixture
def beginning():
    """A tokenizer that puts w3 before every text, as Llama's puts <s>."""
    tokenizer = tiny.tokenizer(bos_token="w3")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="w3 $A", special_tokens=[("w3", 3)]
    )
    return tokenizer


def test_one_beginning(beginning):
    assert encode(beginning, ["w5 w6", "w3 w5", "w5 w3", ""]) == [[3, 5, 6], [3, 5], [3, 5, 3], [3]]
    assert encode(beginning, ["w3 w5"], add_special_tokens=False) == [[3, 5]]
    assert encode(beginning, []) == []
    assert encode(tiny.tokenizer(), ["w3 w3 w5"]) == [tiny.tokenizer()("w3 w3 w5")["input_ids"]]


def test_one_beginning_of_openings(beginning):
    rows = datasets.Dataset.from_list([{"number": 0, "text": "w3 w5 w6 w7"}, {"number": 1, "text": "w5 w6 w7"}])
    args = OpeningArguments(min_text_chars=None, prompt_tokens_low=2, prompt_tokens_high=2)
    assert prepare_openings(rows, beginning, args, seed=0).dataset["input_ids"][:] == [[3, 5, 6], [3, 5, 6]]


def test_one_beginning_of_prompts(beginning):
    rows = datasets.Dataset.from_list([{"text": "w5 w6"}, {"text": "w3 w5 w6"}])
    args = DataArguments(prompt_template="{text}", min_prompt_tokens=None)
    assert prepare_prompts(rows, beginning, args).dataset["input_ids"][:] == [[3, 5, 6]] * 2


def test_one_beginning_of_pairs(beginning):
    pair = {"chosen": " w8", "rejected": " w9"}
    rows = datasets.Dataset.from_list([{"prompt": "w5", **pair}, {"prompt": "w3 w5", **pair}])
    found, _ = encode_pairs(rows, beginning, adapter_for(tiny.llama(), beginning), PairArguments())
    assert found["prompt_ids"][:] == [[3, 5]] * 2
    assert found["chosen_ids"][:] == [[8, 1]] * 2


def test_one_beginning_of_what_rewards_read(beginning):
    scorer = ClassifierScorer(tiny.roberta(), beginning, batch_size=2, device=torch.device("cpu"))
    same = scorer.logits(["w5 w6", "w3 w5 w6"])
    assert (same[0] == same[1]).all()
