"""The page in a real browser, at the sizes of a desk and a phone, with answers that try to break out of it."""

import json

import evaluated
import numpy as np
import pytest
from chromium import BINARY, PHONE, Chromium

from yunque.artifacts import save_model_folder, sha256_file
from yunque.evaluation.comparison import compare
from yunque.evaluation.evaluations import read_evaluation
from yunque.evaluation.gates import parse_gate
from yunque.evaluation.report import render

ROWS = 60
ATTACK = '</script><script>window.broken=1</script><img src="http://evil.invalid/x" onerror="window.broken=1">\ud800'


def model_folder(folder, stage, parents, steps=0):
    def write(staging):
        (staging / "model.safetensors").write_bytes(b"weights")

    folder.mkdir(parents=True)
    if steps:
        lines = [json.dumps({"step": n, "ppo/mean_scores": n / steps, "objective/kl": 0.1 * n}) for n in range(steps)]
        (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "obj')
    save_model_folder(
        folder, write, stage=stage, parents=parents, seed=3, metrics={"toxicity_after": 0.125},
        data=[{"name": "/some/where/dialogs", "split": "train", "rows": 1234, "sha256": "0"}],
    )  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    sft = model_folder(folder / "models" / "sft", "finetune", ["hub/base-model"])
    judge = model_folder(folder / "models" / "judge", "reward", ["hub/other"])
    ppo = model_folder(folder / "models" / "ppo", "ppo", [sft, judge], steps=40)
    aligned = evaluated.toxicity(ROWS, 0.05, seed=0)
    rouge = np.random.default_rng(0).beta(4, 8, ROWS)
    made = {
        "ppo": ({"toxicity": aligned, "rougeL": rouge}, ppo, 4e6, 50.0),
        "int8 <b>": ({"toxicity": aligned * 0.99, "rougeL": rouge - 0.002}, "/gone/int8", 1e6, 150.0),
        "noised": ({"toxicity": evaluated.toxicity(ROWS, 0.6, 1), "rougeL": rouge / 4}, "/gone/noised", 4e6, 50.0),
    }
    evaluations = []
    for name, (scores, path, size, speed) in made.items():
        answers = [f"a plain answer to {row}" for row in range(ROWS)]
        if name != "ppo":
            answers[7] = f"a needle {ATTACK}"
            answers[8] = ""
        digest = sha256_file(f"{path}/yunque.json") if path == ppo else None
        written = evaluated.write(
            folder / name.partition(" ")[0], scores, answers=answers, references=["wanted"] * ROWS,
            model={"path": path, "manifest_sha256": digest, "bytes": size},
            speed={"tokens_per_s": speed, "fresh_process": {
                "start_s": 2e-6 * size, "load_s": 1e-6 * size, "peak_memory_bytes": 40 * size,
                "first_token_s": 1 / speed, "tokens_per_s": {"1": speed, "32": 20 * speed},
            }},
        )  # fmt: skip
        evaluations.append(read_evaluation(written, name))
    gates = [parse_gate("toxicity<=+0.01"), parse_gate("rougeL>=-1.0")]
    comparison = compare(evaluations[0], evaluations[1:], gates=gates)
    path = folder / "report.html"
    path.write_text(render([comparison], title="Did <i>it</i> survive?"), encoding="utf-8")
    return path


def test_the_file_holds_no_markup_of_answers_and_no_address_to_load(page):
    text = page.read_text(encoding="utf-8")
    assert "<img" not in text
    assert text.count("<script") == 2
    start = text.index('id="answers-data">')
    page_itself = text[:start] + text[text.index("</script>", start) :]
    for loading in ("src=", "<link", "@import", "url("):
        assert loading not in page_itself
    assert "&lt;i&gt;it&lt;/i&gt;" in text
    assert "default-src 'none'" in text


def test_road_gates_charts_and_commands_are_in_it(page):
    text = page.read_text(encoding="utf-8")
    for words in (
        "hub/base-model", "1,234 rows", "toxicity_after", "reward model",  # the road
        "2 of 4 gates passed, 2 failed", "✗", "✓",
        "ROUGE-L against size", "Toxicity against time per token at batch 32", 'class="stack variants"',
        "Reward per answer", "KL to the reference",
        "yunque evaluate /models/noised --dataset_name dialogs",
    ):  # fmt: skip
        assert words in text, words
    road = text[text.index('<ol class="road">') :]
    assert road.index("hub/base-model") < road.index("<b>finetune</b>") < road.index("<b>ppo</b>") < road.index("</ol>")


needs_chromium = pytest.mark.skipif(BINARY is None, reason="no Chromium on this machine; apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with Chromium() as chromium:
        yield chromium


@needs_chromium
def test_it_asks_nothing_of_the_network_and_runs_no_script_of_answers(page, browser):
    browser.requests.clear()
    browser.open(page, hash="#q=needle")
    assert browser.evaluate("document.querySelectorAll('.answer').length") == 1
    assert "</script><script>window.broken=1" in browser.evaluate("document.querySelector('#cards').textContent")
    assert browser.evaluate("window.broken") is None
    asked = {address.partition("#")[0] for address in browser.requests}
    assert asked <= {"about:blank", page.as_uri()}
    assert page.as_uri() in asked
    assert browser.problems == []
    # the page's policy holds even against a script that got in: nothing but the one of the hash may run
    browser.evaluate(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.broken = 2';"
        " document.body.append(s); })()"
    )
    assert browser.evaluate("window.broken") is None
    assert any("Content Security Policy" in problem for problem in browser.problems)
    browser.problems.clear()


@needs_chromium
def test_search_sort_and_choices_work(page, browser):
    browser.open(page)

    def first():
        return browser.evaluate("document.querySelector('.answer h3').firstChild.textContent")

    def change(name, value):
        chosen = f"e.value = {value!r}; e.dispatchEvent(new Event('change'));"
        browser.evaluate(f"(e => {{ {chosen} }})(document.getElementById({name!r}))")

    assert browser.evaluate("document.querySelectorAll('.answer').length") == 25
    browser.click("#more")
    assert browser.evaluate("document.querySelectorAll('.answer').length") == 50
    change("sort", "id")
    assert first() == "Prompt 0"
    ppo, noised = (read_evaluation(page.parent / name).scores["toxicity"] for name in ("ppo", "noised"))
    change("model", "2")
    change("sort", "up")
    assert first() == f"Prompt {np.argmax(noised - ppo)}"
    change("sort", "first")
    assert first() == f"Prompt {np.argmax(ppo)}"
    browser.type("#q", "NEEDLE plain")
    assert browser.evaluate("document.getElementById('count').textContent") == "1 of 60 prompts"
    assert browser.evaluate("document.querySelector('.answer mark').textContent").startswith("needle")
    browser.evaluate("document.getElementById('q').value = ''")
    browser.click("#changed")
    assert browser.evaluate("document.getElementById('count').textContent") == "2 of 60 prompts"
    assert "model=2" in browser.evaluate("location.hash")
    assert browser.problems == []


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_is_readable(page, browser, dark):
    browser.open(page, PHONE, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    wide = "[...document.querySelectorAll('section, .scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    for width in (PHONE[0], 800, 1190, 1210, 1280):
        browser.open(page, (width, 900), dark=dark)
        assert browser.evaluate(wide) == 0, width
    browser.open(page, PHONE, dark=dark)
    unlabelled = (
        "[...document.querySelectorAll('input, select')].filter(e => !e.labels.length).length"
        " + [...document.querySelectorAll('svg')].filter(e => !e.getAttribute('aria-label')).length"
    )
    assert browser.evaluate(unlabelled) == 0
    assert browser.lowest_contrast() >= 4.5  # WCAG 2, level AA
