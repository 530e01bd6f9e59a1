import json
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from yunque.errors import InputError
from yunque.evaluation import plots
from yunque.evaluation.before_after import Answers, compare
from yunque.rl.watch import Parting

KEYS = ("ppo/mean_scores", "objective/kl", "objective/kl_coef", "ppo/loss/total", "ppo/loss/policy", "ppo/loss/value")


def entry(step, **changes):
    return {"step": step, "time": "now"} | {key: step + index / 10 for index, key in enumerate(KEYS)} | changes


def write_log(path, entries):
    path.write_text("".join(json.dumps(line) + "\n" for line in entries), encoding="utf-8")
    return path


@pytest.fixture
def figures(monkeypatch):
    """The figures behind the files, by file name."""
    seen = {}
    save = plots._save

    def remember(figure, path):
        seen[path.name] = figure
        return save(figure, path)

    monkeypatch.setattr(plots, "_save", remember)
    return seen


@pytest.mark.parametrize("num_steps", [1, 3, 60])
def test_training_plots_are_written(tmp_path, num_steps):
    log = write_log(tmp_path / "log.jsonl", [entry(step) for step in range(1, num_steps + 1)])
    paths = plots.plot_training(log, tmp_path / "plots")
    assert [path.name for path in paths] == ["reward.png", "kl.png", "loss.png"]
    for path in paths:
        image = matplotlib.image.imread(path)
        assert image.shape[1] >= 1000
        assert image.std() > 0.01


def test_curves_show_the_logged_numbers_and_their_running_mean(tmp_path, figures):
    plots.plot_training(write_log(tmp_path / "log.jsonl", [entry(step) for step in range(1, 31)]), tmp_path)
    for name, keys in {"reward.png": KEYS[:1], "kl.png": KEYS[1:3], "loss.png": KEYS[3:]}.items():
        for axes, key in zip(figures[name].axes, keys, strict=True):
            raw, smooth = axes.lines
            assert raw.get_xdata().tolist() == list(range(1, 31))
            assert raw.get_ydata() == pytest.approx([entry(step)[key] for step in range(1, 31)])
            assert len(smooth.get_ydata()) == 30
            assert axes.get_ylabel()
        assert figures[name].axes[-1].get_xlabel() == "PPO step"


def test_running_mean_worked_by_hand():
    values = np.array([0.0, 3.0, 6.0, 0.0])
    assert plots._running_mean(values, 3) == pytest.approx([1.5, 3.0, 3.0, 3.0])
    assert plots._running_mean(values, 1) == pytest.approx(values)


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path, figures):
    entries = [entry(1), entry(2), entry(3), entry(2, **{"ppo/mean_scores": 9.0})]
    plots.plot_training(write_log(tmp_path / "log.jsonl", entries), tmp_path)
    line = figures["reward.png"].axes[0].lines[0]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([1, 2, 3], [1.0, 9.0, 3.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "log.jsonl: no steps in it"),
        ("\n\n", "log.jsonl: no steps in it"),
        (json.dumps({"step": 1, "objective/kl": 0.5}), "log.jsonl:1: no key 'ppo/mean_scores'"),
        (json.dumps(entry(1)) + '\n{"step": 2, "obj', "log.jsonl:2: not valid JSON"),
        (json.dumps(entry(1, **{"objective/kl": None})), "log.jsonl:1: expected an object of numbers"),
        ("[1, 2]", "log.jsonl:1: expected an object of numbers"),
        (None, "log.jsonl: No such file"),
    ],
)
def test_bad_logs_are_named_and_nothing_is_written(tmp_path, text, message):
    log = tmp_path / "log.jsonl"
    if text is not None:
        log.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        plots.plot_training(log, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_toxicity_plot_shows_before_and_after(tmp_path, figures):
    before = Answers(["a"] * 4, np.zeros(4), np.array([0.97, 0.98, 0.5, 1.0]))
    after = Answers(["a"] * 4, np.zeros(4), np.array([0.0, 0.01, 0.02, 0.5]))
    path = plots.plot_before_after(compare(["q"] * 4, None, before, after, kl=0.0, seed=0), tmp_path / "plots")
    assert path == tmp_path / "plots" / "toxicity.png"
    assert matplotlib.image.imread(path).std() > 0.01
    (axes,) = figures["toxicity.png"].axes
    heights = [[bar.get_height() for bar in side] for side in axes.containers]
    assert (heights[0][-1], heights[1][0]) == (3, 3)
    assert (sum(heights[0]), sum(heights[1])) == (4, 4)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["before (mean 0.863)", "after (mean 0.133)"]


@pytest.mark.parametrize(("num_steps", "parting"), [(1, None), (4, None), (30, Parting(20, 12, 1, 1, 1, 1))])
def test_reward_hacking_plot_shows_both_curves_standardised_and_where_they_part(tmp_path, figures, num_steps, parting):
    steps = np.arange(1, num_steps + 1)
    reward, watch = 5.0 + 2 * np.sin(steps), np.full(num_steps, 3.0)
    path = plots.plot_reward_hacking(steps, reward, watch, parting, tmp_path / "plots")
    assert path == tmp_path / "plots" / "reward_hacking.png"
    assert matplotlib.image.imread(path).std() > 0.01
    (axes,) = figures["reward_hacking.png"].axes
    raw, smooth, flat, _, *mark = axes.lines
    assert raw.get_xdata().tolist() == steps.tolist()
    assert flat.get_ydata() == pytest.approx(np.zeros(num_steps))
    if num_steps == 30:
        assert (raw.get_ydata().mean(), raw.get_ydata().std()) == pytest.approx((0, 1), abs=1e-9)
        assert smooth.get_xdata().tolist() == steps[4:].tolist()
        assert smooth.get_ydata()[-1] == pytest.approx(raw.get_ydata()[-5:].mean())
        assert mark[0].get_xdata() == [20, 20]
    assert len(mark) == (parting is not None)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["reward (trained on)", "unseen scorer", "parted: step 20"][: 2 + len(mark)]


def test_plots_leave_pyplot_alone_and_importing_them_is_cheap():
    script = """
import sys
import yunque.evaluation.plots, yunque.metrics.rouge, yunque.metrics.classification
heavy = {"matplotlib", "rich", "sklearn", "nltk", "rouge_score", "torch"} & set(sys.modules)
assert not heavy, heavy
import json, pathlib, tempfile
keys = yunque.evaluation.plots._TRAINING_PLOTS
folder = pathlib.Path(tempfile.mkdtemp())
entry = {"step": 1} | {key: 1.0 for panels in keys.values() for key, _ in panels}
(folder / "log.jsonl").write_text(json.dumps(entry))
yunque.evaluation.plots.plot_training(folder / "log.jsonl", folder)
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
