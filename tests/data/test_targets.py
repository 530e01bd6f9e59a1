import datasets
import tiny

from yunque.data.targets import encode_targets


def encoded(max_target_length):
    rows = {"references": [["w3 w4 w5", "w9"], ["w6"]], "input_ids": [[5, 6], [7]]}
    return encode_targets(datasets.Dataset.from_dict(rows), tiny.tokenizer(), max_target_length)


def test_the_first_reference_is_the_label():
    rows, report = encoded(8)
    assert rows["labels"] == [[3, 4, 5], [6]]
    assert rows["input_ids"] == [[5, 6], [7]]
    assert report == "answers: 2, cut to 8 tokens: 0 (0 tokens lost)"


def test_a_long_answer_is_cut_and_counted():
    rows, report = encoded(2)
    assert rows["labels"] == [[3, 4], [6]]
    assert report == "answers: 2, cut to 2 tokens: 1 (1 tokens lost)"
