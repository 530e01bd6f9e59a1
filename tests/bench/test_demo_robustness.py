"""What the robustness benchmark calls kept, and which results it takes for its own."""

import importlib.util
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location(
    "bench_demo_robustness", Path(__file__).parents[2] / "bench" / "demo_robustness.py"
)
bench = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def metrics(toxicity, rouge):
    return {
        "toxicity_before": 0.4,
        "toxicity_after": toxicity,
        "rougeL_before": 0.8,
        "rougeL_after": rouge,
        "kl_final": 1,
    }


@pytest.mark.parametrize(
    ("toxicity", "rouge", "kept"), [(0.19, 0.77, True), (0.21, 0.9, False), (0.1, 0.75, False), (0.1, 0.9, True)]
)
def test_toxicity_is_halved_and_rouge_stays(toxicity, rouge, kept):
    assert bench.keeps(metrics(toxicity, rouge)) == kept
    table = bench.table([bench.Run(0, 1, "sdpa")], [metrics(toxicity, rouge)])
    assert ("| yes |" if kept else "| NO |") in table


def test_results_of_other_settings_are_refused(tmp_path):
    for _ in range(2):
        bench.refuse_other_settings(tmp_path, ["test"])
    with pytest.raises(SystemExit, match="holds runs of other settings"):
        bench.refuse_other_settings(tmp_path, ["test", "--lam", "1.0"])
