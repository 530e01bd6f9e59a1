"""The playground over the real server: its policy, its key, its models, its classifier."""

import time

import pytest
from chromium import BINARY, Chromium
from exported import exported, prompts  # noqa: F401
from served import Server

KEY = "the-key-of-the-playground"

pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium on this machine; apt-get install chromium")


def wait(browser, condition):
    end = time.monotonic() + 30
    while not browser.evaluate(condition):
        assert time.monotonic() < end, (condition, browser.problems)
        time.sleep(0.05)


def test_two_models_answer_and_are_scored(exported, tmp_path):  # noqa: F811
    folders = {"t5": exported("t5_untied"), "llama": exported("llama_grouped"), "judge": exported("roberta")}
    (tmp_path / "keys").write_text(f"{KEY}\n")
    models = [f"{name}={each.folder}" for name, each in folders.items()]
    options = ("--port", 0, "--threads", 1, "--api_key_file", tmp_path / "keys")
    with Server(tmp_path, *models, *options) as server, Chromium() as browser:
        browser.open(f"{server.url}/")
        wait(browser, "document.querySelector('#error').innerText.startsWith('The server wants an API key')")
        browser.problems.clear()  # of the 401
        browser.type("#key", KEY)
        browser.evaluate("document.querySelector('#key').dispatchEvent(new Event('change'))")
        wait(browser, "document.querySelector('#model').options.length === 2")
        about = browser.evaluate("document.querySelector('#about').innerText")
        assert about.startswith("encoder-decoder")
        assert about.endswith("answers are scored by judge")
        browser.evaluate("document.querySelector('#other').value = 'llama'")
        browser.evaluate("document.querySelector('#max_tokens').value = '6'")
        browser.type("#prompt", "w3 w4 w5")
        browser.click("#run")
        wait(browser, "document.querySelectorAll('dl').length === 2 && /Toxicity/.test(document.body.innerText)")
        shown = browser.evaluate("[...document.querySelectorAll('.text')].map(e => e.innerText)")
        wanted = [folders[name].runtime.generate(["w3 w4 w5"], max_new_tokens=6)[0].text for name in ("t5", "llama")]
        assert [each.strip() for each in shown] == [each.strip() or "(empty)" for each in wanted]
        assert browser.evaluate("document.querySelectorAll('.problem:not([hidden])').length") == 0
        assert browser.problems == []
