import json

import numpy as np
import pytest

from yunque.rl.batch import Scored, dump, score_statistics
from yunque.rl.rollout import Response


def row(score, parts, watch=None):
    return Scored("query", Response([5, 1], finished=True), "word", score, parts, watch)


def test_one_summand_is_the_score_and_not_logged_again():
    statistics = score_statistics([row(1.0, {"reward_model": 1.0}), row(4.0, {"reward_model": 4.0})])
    assert statistics == pytest.approx({"scores/raw_mean": 2.5, "scores/raw_std": np.sqrt(4.5)})


def test_summands_and_watch_have_mean_and_unbiased_deviation():
    batch = [row(1.0, {"a": 1.0, "b": 2.0}, 5.0), row(2.0, {"a": 1.0, "b": 4.0}, 6.0)]
    statistics = score_statistics(batch)
    assert statistics == pytest.approx(
        {
            "scores/raw_mean": 1.5, "scores/raw_std": np.sqrt(0.5), "reward/a/mean": 1.0, "reward/a/std": 0.0,
            "reward/b/mean": 3.0, "reward/b/std": np.sqrt(2), "watch/mean_scores": 5.5,
            "watch/std_scores": np.sqrt(0.5),
        }
    )  # fmt: skip


def test_the_only_summand_is_logged_beside_a_watch():
    assert score_statistics([row(1.0, {"a": 1.0}, 5.0)])["reward/a/mean"] == 1.0


def test_a_single_response_has_no_deviation():
    assert score_statistics([row(1.0, {"a": 1.0})])["scores/raw_std"] == 0.0


def test_a_dump_holds_what_one_needs_to_see(tmp_path):
    path = tmp_path / "new" / "dump.jsonl"
    dump(path, [row(1.5, {"a": 1.5}, 0.25), row(float("nan"), {"a": float("nan")})])
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {
        "query": "query", "response": "word", "tokens": [5, 1], "score": 1.5, "finished": True,
        "parts": {"a": 1.5}, "watch": 0.25,
    }  # fmt: skip
    assert np.isnan(second["score"])
