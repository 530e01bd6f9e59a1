import pytest

from yunque.rl.constitution import Constitution, Frames, Principle
from yunque.rl.judge import Pair, judge

FRAMES = Frames(preference="{prompt}|{question}|{first}|{second}")
PAIRS = [Pair("p", "kind words", "rude"), Pair("p", "rude", "kind words")]


def constitution(*ranks):
    principles = [Principle(name, priority, "c", "r", name) for name, priority in ranks]
    return Constitution(tuple(principles), FRAMES, "")


class FakeJudge:
    identity = source = "fake"

    def __init__(self, odds):
        self.odds, self.asked = odds, []

    def log_odds(self, prompts, max_new_tokens):
        self.asked += prompts
        return [self.odds(*prompt.split("|")[1:]) for prompt in prompts]


def kind(question, first, second):
    return float(len(first) - len(second))


def verdicts(odds, *ranks, pairs=PAIRS, min_margin=0.1):
    writer = FakeJudge(odds)
    return judge(pairs, constitution(*(ranks or [("q", 1)])), writer, min_margin=min_margin, max_new_tokens=8), writer


def test_the_better_answer_wins_in_either_place():
    found, _ = verdicts(kind)
    assert [(one.preferred, one.margin) for one in found] == [("a", 6.0), ("b", -6.0)]


@pytest.mark.parametrize("says", [1.0, 5.0, -3.0])
def test_a_judge_that_always_says_the_same_letter_abstains(says):
    found, _ = verdicts(lambda *texts: says)
    assert [(one.preferred, one.margin, one.unreadable) for one in found] == [(None, 0.0, 0)] * 2


def test_a_leaning_to_one_place_cancels_out():
    found, _ = verdicts(lambda question, first, second: kind(question, first, second) + 20)
    assert [one.preferred for one in found] == ["a", "b"]
    assert [one.margin for one in found] == [6.0, -6.0]


def test_small_margins_abstain():
    assert [one.preferred for one in verdicts(kind, min_margin=6.0)[0]] == [None, None]
    assert [one.preferred for one in verdicts(kind, min_margin=5.9)[0]] == ["a", "b"]


def test_an_unreadable_comparison_is_counted_and_does_not_leave_one_order_alone():
    found, _ = verdicts(lambda question, first, second: None if first == "rude" else 1.0)
    assert [(one.preferred, one.unreadable) for one in found] == [(None, 1), (None, 1)]


def test_a_lower_priority_decides_only_what_the_higher_leaves_open():
    def odds(question, first, second):
        sign = {"high": 1, "low": -1}[question]
        return sign * kind(question, first, second) if question == "low" or "kind words" in (first, second) else 0.0

    pairs = [PAIRS[0], Pair("p", "rude", "ruder!")]
    found, writer = verdicts(odds, ("high", 1), ("low", 2), pairs=pairs)
    assert [(one.preferred, one.principles) for one in found] == [("a", ("high",)), ("a", ("low",))]
    assert len(writer.asked) == 2 * 2 + 2  # both pairs in both orders; then the open pair


def test_equal_priorities_are_averaged():
    votes = {"x": 1.0, "y": 1.0, "z": -1.0}

    def odds(question, first, second):
        return votes[question] * (1 if first == "kind words" else -1)

    (first, second), _ = verdicts(odds, ("x", 1), ("y", 1), ("z", 1))
    assert first.preferred == "a"
    assert first.margin == pytest.approx(1 / 3)
    assert second.margin == pytest.approx(-1 / 3)
