import datasets
import pytest
import tiny
from tokenizers import processors

from yunque.data.targets import encode_answers, encode_targets


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
