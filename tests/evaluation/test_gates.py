import evaluated
import numpy as np
import pytest
from scipy import optimize

from yunque.errors import InputError
from yunque.evaluation.comparison import compare
from yunque.evaluation.evaluations import read_evaluation
from yunque.evaluation.gates import parse_gate
from yunque.metrics.paired import mean_intervals

ROWS = 300


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        ("toxicity<=+0.01", "difference", 0.01),
        ("rougeL>=-1.0", "difference", -1.0),
        (" toxicity < 0.2 ", "level", 0.2),
        ("toxicity<=+0", "difference", 0.0),
        ("nll<=-.5", "difference", -0.5),
        ("recovery>=0.95", "recovery", 0.95),
    ],
)
def test_a_sign_means_the_difference_and_none_the_model_s_own_mean(text, kind, limit):
    gate = parse_gate(text)
    assert (gate.kind, gate.limit) == (kind, limit)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("toxicity", "give METRIC<=LIMIT"),
        ("toxicity=0.1", "give METRIC<=LIMIT"),
        ("toxicity<=abc", "give METRIC<=LIMIT"),
        ("f1>=-1.0", "f1 is measured as share, 0 to 1, so that a difference of it lies between -1 and 1"),
        ("rougeL>=250", "its mean lies between 0 and 100"),
        ("recovery<=0.95", "recovery is the share of the gain"),
        ("recovery>=+0.95", "recovery is the share of the gain"),
    ],
)
def test_what_is_no_gate_is_one_clear_line(text, words):
    with pytest.raises(InputError, match=words):
        parse_gate(text)


@pytest.fixture
def folders(tmp_path):
    """A base, its alignment, a faithful compression and a damaged one."""
    aligned = evaluated.toxicity(ROWS, 0.04, seed=1)
    rouge = np.random.default_rng(2).beta(4, 8, ROWS)
    noise = np.random.default_rng(3).normal(0, 0.01, (2, ROWS))
    scores = {
        "base": (evaluated.toxicity(ROWS, 0.4, seed=0), rouge + 0.01),
        "aligned": (aligned, rouge),
        "int8": (np.clip(aligned + noise[0], 0, 1), rouge + noise[1]),
        "damaged": (evaluated.toxicity(ROWS, 0.3, seed=4), rouge - 0.05),
    }
    return {
        name: read_evaluation(evaluated.write(tmp_path / name, {"toxicity": tox, "rougeL": rl}), name)
        for name, (tox, rl) in scores.items()
    }


def verdicts(folders, candidate, *gates):
    found = compare(
        folders["aligned"], [folders[candidate]], gates=[parse_gate(gate) for gate in gates], base=folders["base"]
    )
    return found.candidates[0].verdicts


def test_the_faithful_copy_passes_and_the_damaged_one_fails(folders):
    gates = ("toxicity<=+0.01", "rougeL>=-1.0", "recovery>=0.95", "toxicity<0.15")
    assert [each.status for each in verdicts(folders, "int8", *gates)] == ["passed"] * 4
    assert [each.status for each in verdicts(folders, "damaged", *gates)] == ["failed"] * 4


def test_the_bad_end_decides_not_the_mean(folders):
    """The same model under limits on both sides of its interval's bad end and of its mean."""
    [wide] = verdicts(folders, "damaged", "toxicity<=+0.5")
    low, mean, high = wide.interval.low, wide.interval.mean, wide.interval.high
    found = verdicts(
        folders,
        "damaged",
        *(f"toxicity<={limit:+.6f}" for limit in (high + 1e-4, high - 1e-4, mean - 1e-4, low - 1e-4)),
    )
    assert [each.status for each in found] == ["passed", "inconclusive", "inconclusive", "failed"]
    passed, needs, beyond, failed = found
    assert needs.needed_pairs > ROWS
    assert f"about {needs.needed_pairs:,} prompts would decide" in str(needs)
    assert beyond.needed_pairs is None
    assert "more prompts are unlikely to pass it" in str(beyond)
    assert passed.needed_pairs is failed.needed_pairs is None


def test_strict_and_other_direction(folders):
    assert verdicts(folders, "aligned", "toxicity<=+0", "toxicity<+0")[0].status == "passed"
    assert verdicts(folders, "aligned", "toxicity<+0")[0].status == "failed"
    assert verdicts(folders, "damaged", "toxicity>=+0.05")[0].status == "passed"


def test_recovery_s_ends_are_where_the_interval_of_its_margin_touches_0(folders):
    base, aligned, ours = (folders[name].scores["toxicity"] for name in ("base", "aligned", "damaged"))
    [verdict] = verdicts(folders, "damaged", "recovery>=0.1")
    interval = verdict.interval
    assert interval.mean == pytest.approx((base - ours).mean() / (base - aligned).mean())

    def end(share, name):
        return getattr(mean_intervals(((base - ours) - share * (base - aligned))[:, None])[0], name)

    assert interval.low == pytest.approx(optimize.brentq(end, -1, interval.mean, ("low",)), abs=0.002)
    assert interval.high == pytest.approx(optimize.brentq(end, interval.mean, 2, ("high",)), abs=0.002)


def test_recovery_interval_covers_the_true_share():
    """150 simulated evaluations with a true recovery of 0.8, by the interval that `recovery` gates use."""
    from yunque.evaluation.gates import _share_interval
    from yunque.metrics.paired import Resampling

    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(150):
        base = (rng.random(200) < 0.5) * 0.9
        gain = base * (rng.random(200) < 0.8)
        kept = gain * (rng.random(200) < 0.8)
        interval = _share_interval(kept, gain, Resampling(200))
        covered += interval.low <= 0.8 <= interval.high
    assert 0.9 <= covered / 150 <= 0.99


def test_unknown_metrics_are_listed_and_recovery_needs_a_base(folders):
    with pytest.raises(InputError, match=r"do not both have bleu; there are: toxicity, rougeL$"):
        verdicts(folders, "int8", "bleu>=-1.0")
    gate = parse_gate("recovery>=0.95")
    with pytest.raises(InputError, match="give --base FOLDER"):
        compare(folders["aligned"], [folders["int8"]], gates=[gate])
    with pytest.raises(InputError, match="no proved gain to keep"):
        compare(folders["base"], [folders["int8"]], gates=[gate], base=folders["aligned"])


def test_the_chance_to_pass_unchanged_is_stated(folders):
    """With the small spread of a faithful copy an equal model surely passes, with a wild one it does not."""
    assert verdicts(folders, "int8", "toxicity<=+0.01")[0].chance_unchanged > 0.99
    assert verdicts(folders, "damaged", "toxicity<=+0.01")[0].chance_unchanged < 0.2


def test_answers_without_a_score_cannot_help_a_gate_to_pass(folders, tmp_path):
    scores = [None if value > 0.5 else value for value in folders["damaged"].scores["toxicity"]]
    lost = sum(value is None for value in scores)
    folders["silent"] = read_evaluation(evaluated.write(tmp_path / "silent", {"toxicity": scores}), "silent")
    with pytest.raises(InputError, match=f"silent has no toxicity of {lost} answers that aligned has"):
        verdicts(folders, "silent", "toxicity<=+0.01")
    [note] = [note for note in compare(folders["aligned"], [folders["silent"]]).notes if note.startswith("toxicity")]
    assert note == f"toxicity: {lost} rows that only one of aligned and silent has are left out"
