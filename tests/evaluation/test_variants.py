"""Compressed variants side by side: costs, the KL of 0 of the aligned model itself, Pareto-optimal points."""

import evaluated
import numpy as np
import pytest

from yunque.errors import InputError
from yunque.evaluation.charts import Point, frontier
from yunque.evaluation.comparison import as_json, compare
from yunque.evaluation.evaluations import read_evaluation
from yunque.evaluation.gates import parse_gate
from yunque.evaluation.report import render
from yunque.evaluation.variants import variants_table
from yunque.metrics.bootstrap import Interval

ROWS = 40


def fresh(start_s, peak, first_s, **rates):
    return {
        "start_s": start_s, "load_s": start_s / 10, "loaded_memory_bytes": peak, "peak_memory_bytes": peak,
        "first_token_s": first_s, "tokens_per_s": {size.removeprefix("b"): rate for size, rate in rates.items()},
    }  # fmt: skip


@pytest.fixture
def made(tmp_path):
    """A function to an evaluation: its bytes, fresh process and KL, by default from the model "ppo"."""

    def make(name, size, measured=None, kl=None, aligned="/models/ppo", **model):
        scores = {"rougeL": np.random.default_rng(1).beta(5, 5, ROWS), "toxicity": evaluated.toxicity(ROWS, 0.1, 0)}
        scores |= {"kl": np.abs(np.random.default_rng(2).normal(kl, kl / 10, ROWS))} if kl else {}
        folder = evaluated.write(
            tmp_path / name, scores, model={"path": f"/models/{name}", "bytes": size, **model},
            speed={"tokens_per_s": 9.0, "fresh_process": measured},
            kl_model={"path": aligned, "manifest_sha256": None} if kl else None,
        )  # fmt: skip
        return read_evaluation(folder, name)

    return make


def test_the_table_has_costs_shares_quality_and_gates(made):
    ppo = made("ppo", 4e6, fresh(20.0, 5e8, 0.04, b1=100.0, b8=800.0))
    int8 = made("int8", 1e6, fresh(1.0, 1e8, 0.002, b1=2000.0, b8=4000.0), kl=0.01)
    adapter = made("adapter", 1e5, None, kl=0.2, base_bytes=4e6)  # not measured in a process of its own
    comparison = compare(ppo, [int8, adapter], gates=[parse_gate("kl<=0.05"), parse_gate("toxicity<=+0.01")])
    table = variants_table(comparison)
    assert [label for label, _ in table["header"]] == [
        "On disk", "Start", "Load", "Peak memory", "First token", "Batch 1", "Batch 8", "ROUGE-L", "Toxicity", "KL",
    ]  # fmt: skip
    shown = {row["name"]: [(cell["shown"], cell["note"]) for cell in row["cells"]] for row in table["rows"]}
    assert shown["int8"][:2] == [("1.00", "25 %"), ("1.00", "5 %")]
    assert shown["int8"][5:7] == [("2,000", "2000 %"), ("4,000", "500 %")]
    assert shown["adapter"][:2] == [("4.10", "102 %"), ("-", "")]  # its base is deployed with it
    assert shown["ppo"][-1] == ("0.0000", "")
    best = [cell["best"] for cell in table["rows"][1]["cells"]]
    assert best == [True] * 7 + [False] * 3
    gates = {row["name"]: [gate["status"] for gate in row["gates"]] for row in table["rows"]}
    assert gates == {"ppo": [], "int8": ["passed", "passed"], "adapter": ["failed", "passed"]}
    costs = as_json(comparison)["candidates"][0]["costs"]
    assert costs["bytes"] == 1e6
    assert costs["tokens_per_s_8"] == 4000.0
    page = render([compare(ppo, [int8])])
    for words in ("KL from the aligned model against size", "ROUGE-L against latency of the first token", "at batch 8"):
        assert words in page, words
    assert page.count(' beaten" cx=') == 6  # ppo: int8 scores as well and costs less; only the KL of 0 is its own


def test_without_such_measurements_there_is_no_table(made):
    assert variants_table(compare(made("ppo", 4e6), [made("int8", 1e6)])) is None


def test_kl_of_a_baseline_that_it_was_not_measured_from(made):
    comparison = compare(made("ppo", 4e6), [made("int8", 1e6, kl=0.01, aligned="/models/other")])
    assert "kl" not in comparison.candidates[0].differences
    with pytest.raises(InputError, match=r"KL from different models, /models/ppo and /models/other"):
        compare(made("ppo", 4e6, kl=0.01), [made("int8", 1e6, kl=0.01, aligned="/models/other")])


def test_frontier_is_what_no_cheaper_model_beats():
    def point(name, x, y):
        return Point(name, x, Interval(y, y, y), name, 0)

    points = [point("dear", 5, 90), point("small", 1, 88), point("equal", 3, 89), point("good", 3, 91)]
    assert [each.name for each in frontier(points, higher_is_better=True)] == ["small", "good"]
    assert [each.name for each in frontier(points, higher_is_better=False)] == ["small"]
