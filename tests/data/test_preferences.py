from __future__ import annotations

import pytest

from yunque.data.arguments import PreferenceArguments
from yunque.data.preferences import (
    LoadedPairs,
    holds_pairs,
    load_preference_split,
    load_preferences,
    opening_question,
    split_dialogues,
)
from yunque.errors import InputError

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def args_for(path, **values) -> PreferenceArguments:
    return PreferenceArguments(dataset_name=str(path), **values)


def dialogue(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[number % 2]}: {turn}" for number, turn in enumerate(turns))


def pairs_of(path, **values) -> list[dict]:
    return load_preference_split(args_for(path, **values)).rows.to_list()


def load(path, **values) -> LoadedPairs:
    return load_preferences(args_for(path, **values), 0)


# ---- pairs ----


def test_pairs_under_other_names_with_margin_and_group(write_jsonl):
    rows = [{"q": f"p{number}", "a": "good", "b": "bad", "gap": number, "kind": "k"} for number in range(3)]
    columns = {"prompt_column": "q", "chosen_column": "a", "rejected_column": "b", "group_column": "kind"}
    path = write_jsonl("d.jsonl", rows)
    assert pairs_of(path, margin_column="gap", **columns)[2] == {
        "prompt": "p2", "chosen": "good", "rejected": "bad", "margin": 2.0, "group": "k",
    }  # fmt: skip
    assert "margin" not in pairs_of(path, **columns)[0]


def test_pairs_left_out_are_counted_by_reason(write_jsonl):
    bad = [PAIR | {"chosen": "bad "}, PAIR | {"rejected": ""}, PAIR | {"prompt": None}]
    data = load(write_jsonl("d.jsonl", [PAIR | {"prompt": f"p{n}"} for n in range(10)] + bad))
    assert (len(data.train), len(data.test)) == (9, 1)
    assert data.left_out == {"train": {"pairs with two equal answers": 1, "rows without a prompt or an answer": 2}}
    assert data.dropped_empty == {"train": 3}
    assert "9 pairs" in str(data)
    assert "1 pairs with two equal answers" in str(data)


def test_only_equal_pairs_are_refused(write_jsonl):
    with pytest.raises(InputError, match="holds no usable pair: 2 pairs with two equal answers"):
        load(write_jsonl("d.jsonl", [PAIR | {"rejected": "good"}] * 2))


@pytest.mark.parametrize(
    ("row", "values", "words"),
    [
        ({"prompt": "p", "chosen": "c"}, {}, "rejected_column: no column 'rejected'.* prompt, chosen"),
        ({"prompt": "p", "rejected": "c"}, {}, "chosen_column: no column 'chosen'"),
        (
            PAIR | {"chosen": [{"role": "user"}]},
            {},
            "rejected_column: row 1 .* 'chosen' holds messages",
        ),
        (PAIR, {"margin_column": "gap"}, "margin_column: no column 'gap'"),
        (PAIR | {"gap": -1}, {"margin_column": "gap"}, "margin -1 is below 0; swap chosen and rejected"),
        (PAIR | {"gap": None}, {"margin_column": "gap"}, "margin_column: row 1 .*None is no number"),
        (PAIR | {"gap": "wide"}, {"margin_column": "gap"}, "'wide' is no number"),
        (PAIR, {"margin_from_scores": True}, "margin_from_scores: .* holds no rankings.*margin_column"),
        (PAIR, {"group_column": "kind"}, "group_column: no column 'kind'"),
    ],
)
def test_bad_pairs(row, values, words, write_jsonl):
    with pytest.raises(InputError, match=words):
        load(write_jsonl("d.jsonl", [row]), **values)


# ---- dialogues ----


def test_dialogues_are_split_at_the_last_answer(write_jsonl):
    rows = [{"chosen": dialogue("a?", "b", "c?", "good"), "rejected": dialogue("a?", "b", "c?", "bad")}]
    [pair] = pairs_of(write_jsonl("d.jsonl", rows))
    assert pair == {"prompt": dialogue("a?", "b", "c?") + "\n\nAssistant:", "chosen": " good", "rejected": " bad"}
    assert pair["prompt"] + pair["chosen"] == rows[0]["chosen"]


def test_dialogues_that_cannot_be_split_are_counted(write_jsonl):
    good = [{"chosen": dialogue(f"{n}?", "x"), "rejected": dialogue(f"{n}?", "y")} for n in range(4)]
    bad = [
        {"chosen": dialogue("a?", "x"), "rejected": dialogue("b?", "y")},
        {"chosen": dialogue("a?", "x", "more?", "z"), "rejected": dialogue("a?", "y")},
        {"chosen": dialogue("a?", "x", "bye"), "rejected": dialogue("a?", "y", "bye")},
        {"chosen": dialogue("a?", ""), "rejected": dialogue("a?", "y")},
    ]
    assert load(write_jsonl("d.jsonl", good + bad)).left_out["train"] == {
        "rows whose dialogues differ before the last answer": 2,
        "rows whose dialogues do not end with an answer": 1,
        "rows without a prompt or an answer": 1,
    }


def test_texts_that_are_no_dialogues_are_refused_without_a_prompt(write_jsonl):
    with pytest.raises(InputError, match="no usable pair: 1 rows whose dialogues do not end with an answer"):
        load(write_jsonl("d.jsonl", [{"chosen": "good", "rejected": "bad"}]))


def test_a_human_turn_inside_an_answer_is_no_answer():
    assert split_dialogues("x\n\nAssistant: a", "x\n\nAssistant: b\n\nHuman: c") == (
        "rows whose dialogues do not end with an answer"
    )


def test_one_conversation_is_on_one_side(write_jsonl):
    def row(number):
        turns = (f"opening {number % 10}?", f"answer {number}", "and then?")
        return {"chosen": dialogue(*turns, "x"), "rejected": dialogue(*turns, "y")}

    rows = [row(number) for number in range(60)]
    data = load(write_jsonl("d.jsonl", rows), test_size=0.3)
    train, test = ({opening_question(prompt) for prompt in split["prompt"]} for split in (data.train, data.test))
    assert train | test == {f"Human: opening {n}?" for n in range(10)}
    assert not train & test
    assert len(data.test) == 18


def test_one_conversation_alone_cannot_be_split(write_jsonl):
    rows = [{"chosen": dialogue("a?", f"{n}"), "rejected": dialogue("a?", "y")} for n in range(5)]
    with pytest.raises(InputError, match="rows that all belong together cannot be split"):
        load(write_jsonl("d.jsonl", rows))


def test_hh_rlhf_as_published(shared_data):
    data = load(shared_data / "hh-rlhf", train_split="helpful-base.test", test_split="harmless-base.test")
    assert (len(data.train), len(data.test)) == (2_189, 2_053)
    assert data.left_out["helpful-base.test"]["pairs with two equal answers"] == 2
    assert all(prompt.endswith("\n\nAssistant:") for prompt in data.train["prompt"])


# ---- rankings ----


def ranking(**values):
    return {"prompt": "p", "completions": ["a", "b", "c"]} | values


def won(pairs):
    return [(pair["chosen"], pair["rejected"]) for pair in pairs]


def test_ranks_make_all_pairs_and_scores_run_the_other_way(write_jsonl):
    expected = [("b", "a"), ("a", "c"), ("b", "c")]
    assert won(pairs_of(write_jsonl("ranks.jsonl", [ranking(ranks=[2, 1, 3])]))) == expected
    assert won(pairs_of(write_jsonl("scores.jsonl", [ranking(scores=[0.5, 2, -1])]))) == expected
    many = {"prompt": "p", "completions": list("abcdef"), "ranks": [3, 1, 2, 6, 5, 4]}
    assert len(pairs_of(write_jsonl("many.jsonl", [many]))) == 6 * 5 // 2


def test_ties_make_no_pair(write_jsonl):
    data = load(write_jsonl("d.jsonl", [ranking(ranks=[1, 1, 2]), ranking(prompt="q", ranks=[1, 2, 3])]))
    assert len(data.train) + len(data.test) == 5
    assert data.left_out == {"train": {"pairs of tied answers": 1}}


def test_rejects_are_dropped_or_last(write_jsonl):
    path = write_jsonl("d.jsonl", [ranking(ranks=[2, None, 1])])
    assert won(pairs_of(path)) == [("c", "a")]
    assert won(pairs_of(path, unranked="last")) == [("a", "b"), ("c", "a"), ("c", "b")]
    two = write_jsonl("two.jsonl", [ranking(ranks=[None, None, 1])])
    assert won(pairs_of(two, unranked="last")) == [("c", "a"), ("c", "b")]  # two rejects are tied


def test_margins_are_differences_of_scores(write_jsonl):
    path = write_jsonl("d.jsonl", [ranking(scores=[1, 4, None], ranks=[1, 2, 3])])
    assert pairs_of(path, margin_from_scores=True) == [
        {"prompt": "p", "chosen": "b", "rejected": "a", "margin": 3.0}  # by the scores, whatever the ranks
    ]


def test_equal_answers_of_a_ranking_make_no_pair(write_jsonl):
    path = write_jsonl("d.jsonl", [ranking(completions=["a", "a ", "b"], ranks=[1, 2, 3])])
    assert won(pairs_of(path)) == [("a", "b"), ("a ", "b")]


@pytest.mark.parametrize(
    ("row", "values", "words"),
    [
        (ranking(completions=["a"], ranks=[1]), {}, "no usable pair: 1 rankings of fewer than two answers"),
        (ranking(ranks=[1, None, None]), {}, "2 answers without a rank, 1 rankings of fewer than two"),
        (ranking(ranks=[1, 2]), {}, "ranks_column: row 1 .*must be lists of the same length"),
        (ranking(ranks="123"), {}, "must be lists of the same length"),
        (ranking(ranks=[1, 2, "best"]), {}, "'best' is no number"),
        (ranking(ranks=[1, 2, True]), {}, "True is no number"),
        (ranking(), {}, "scores_column: no column 'scores'"),
        ({"completions": ["a", "b"], "ranks": [1, 2]}, {}, "prompt_column: no column 'prompt'"),
        (ranking(ranks=[1, 2, 3]), {"margin_column": "ranks"}, "margin_column: .*set margin_from_scores"),
        (ranking(ranks=[1, 2, 3]), {"margin_from_scores": True}, "scores_column: no column 'scores'"),
    ],
)
def test_bad_rankings(row, values, words, write_jsonl):
    with pytest.raises(InputError, match=words):
        load(write_jsonl("d.jsonl", [row]), **values)


# ---- options ----


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"unranked": "first"}, "unranked: 'first' is unknown; give drop or last"),
        ({"margin_column": "m", "margin_from_scores": True}, "margin_from_scores: margin_column gives"),
        ({"margin_from_scores": True, "unranked": "last"}, "unranked: last gives no score"),
    ],
)
def test_bad_options(values, words):
    with pytest.raises(InputError, match=words):
        PreferenceArguments(**values)


def test_the_columns_tell_pairs_from_labels(write_jsonl):
    assert holds_pairs(args_for(write_jsonl("pairs.jsonl", [PAIR])))
    assert holds_pairs(args_for(write_jsonl("ranks.jsonl", [ranking(ranks=[1, 2, 3])])))
    assert not holds_pairs(args_for(write_jsonl("labels.jsonl", [{"text": "t", "label": 0}])))
