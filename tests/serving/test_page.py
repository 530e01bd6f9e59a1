import re
import time
from pathlib import Path

import pytest
from chromium import BINARY, DESKTOP, PHONE, Chromium
from standin import Script, serving
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

PAGE = Path(__file__).parents[2] / "src" / "yunque" / "serving" / "page"
REPORT = PAGE.parents[1] / "evaluation" / "page" / "report.css"

pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium on this machine; apt-get install chromium")

# What the server's own policy may be at its strictest while the page still works.
POLICY = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'"
GENERATORS = [
    {"id": "fp32", "kind": "seq2seq", "manifest_sha256": "0123456789abcdef" * 4},
    {"id": "int8", "kind": "seq2seq", "manifest_sha256": "f123456789abcdef" * 4},
]
JUDGE = {"id": "hate-speech", "kind": "classifier", "manifest_sha256": "a" * 64}
EVIL = "</script><script>window.broken=1</script><img src=x onerror='window.broken=1'>"


class Strict:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def guarded(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, guarded)


@pytest.fixture(scope="module")
def browser():
    with Chromium() as chromium:
        yield chromium


@pytest.fixture
def playground(browser):
    """Opens the page over a script; a script of one test never meets another's storage, since ports differ."""
    running = []

    def start(size=DESKTOP, dark=False, **values):
        script = Script(**({"models": [*GENERATORS, JUDGE]} | values))
        files = StaticFiles(directory=PAGE, html=True)
        running.append(serving(script, Mount("/", files, middleware=[Middleware(Strict)])))
        script.address = running[-1].__enter__()
        browser.requests.clear()
        browser.problems.clear()
        browser.open(script.address + "/", size, dark=dark)
        wait(browser, "document.querySelector('#model').options.length > 0 || !document.querySelector('#error').hidden")
        return script

    yield start
    for server in running:
        server.__exit__(None, None, None)


def wait(browser, condition, timeout_s=10):
    end = time.monotonic() + timeout_s
    while not browser.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.02)


def text(browser, selector):
    return browser.evaluate(f"document.querySelector({selector!r}).innerText")


def choose(browser, name, value):
    browser.evaluate(f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('change')); }})({name})")


def press(browser, key, code, modifiers=0):
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=modifiers)


def answered(browser):
    wait(browser, "!document.querySelector('#run').disabled && document.querySelector('#columns article') !== null")


def test_an_answer_streams_in_and_its_speed_is_shown(playground, browser):
    script = playground(answers={"fp32": ["A ", "streamed ", EVIL]}, step_s=0.2)
    browser.type("#prompt", "Summarize: a\nb")
    browser.evaluate("document.querySelector('#parameters').open = true")
    for name, value in {"seed": "7", "stop_at": "END\n###", "temperature": "0.5"}.items():
        browser.evaluate(f"document.querySelector('#{name}').value = {value!r}")
    press(browser, "Enter", 13, modifiers=2)
    wait(browser, "document.querySelector('.text')?.textContent === 'A '")  # the first piece alone: it streams
    assert browser.evaluate("document.querySelector('.answer').getAttribute('aria-busy')") == "true"
    answered(browser)
    wait(browser, "document.querySelector('.answer dl').innerText.includes('Toxicity')")  # scored after its end
    assert text(browser, ".text") == f"A streamed {EVIL}"
    assert browser.evaluate("window.broken") is None
    [asked, judged] = script.asked
    assert asked.pop("stream_options") == {"include_usage": True}
    assert asked == {
        "model": "fp32", "prompt": "Summarize: a\nb", "max_tokens": 128, "temperature": 0.5, "top_p": 1, "seed": 7,
        "stop": ["END", "###"], "stream": True,
    }  # fmt: skip
    assert judged["text"] == [f"A streamed {EVIL}"]
    facts = text(browser, ".answer dl")
    speed = float(re.search(r"Tokens a second\s+([\d.]+)", facts)[1])
    assert 2 < speed < 8  # two more tokens, 0.2 s each
    assert 150 < int(re.search(r"First token\s+(\d+) ms", facts)[1]) < 2_000
    assert re.search(r"Tokens\s+3\b", facts)
    assert re.search(r"End\s+the model ended it", facts)
    assert re.search(r"Toxicity\s+1.0 %, nothate", facts)
    assert {address.rsplit("/", 1)[0] for address in browser.requests if address.startswith("http")} <= {
        script.address, f"{script.address}/v1",
    }  # fmt: skip
    assert browser.problems == []


def test_stop_aborts_the_request_and_keeps_what_came(playground, browser):
    script = playground(answers={"fp32": ["word "] * 500}, step_s=0.02)
    browser.type("#prompt", "Go on")
    browser.click("#run")
    wait(browser, "document.querySelector('.text')?.textContent.length > 10")
    browser.click("#stop")
    answered(browser)
    assert text(browser, "#status") == "Stopped."
    assert "stopped here" in text(browser, ".answer dl")
    assert len(text(browser, ".text")) < 2_000
    end = time.monotonic() + 5
    while not script.left:  # the server saw the client go
        assert time.monotonic() < end
        time.sleep(0.02)
    browser.evaluate("document.querySelector('#prompt').focus()")
    press(browser, "Enter", 13, modifiers=2)
    wait(browser, "document.querySelector('.text')?.textContent.length > 10")
    press(browser, "Escape", 27)
    answered(browser)
    assert text(browser, "#status") == "Stopped."


def test_two_variants_answer_side_by_side_with_their_differences_and_toxicity(playground, browser):
    answers = {"fp32": ["You ", "are ", "a ", "kind person."], "int8": ["You ", "are ", "an awful ", "person."]}
    script = playground(answers=answers, toxicity={"You are an awful person.": 0.97})
    choose(browser, "document.querySelector('#other')", "int8")
    browser.type("#prompt", "Who am I?")
    browser.click("#run")
    wait(browser, "document.querySelectorAll('dl').length === 2 && document.querySelector('.flagged') !== null")
    assert {asked["model"] for asked in script.asked[:2]} == {"fp32", "int8"}
    marks = "[...document.querySelectorAll('.answer')].map(e => [...e.querySelectorAll('mark')].map(m => m.innerText))"
    assert browser.evaluate(marks) == [["a kind"], ["an awful"]]
    assert "66 % of the words are the same" in text(browser, "#compared") or "60 %" in text(browser, "#compared")
    shown = browser.evaluate("[...document.querySelectorAll('.answer')].map(e => e.innerText)")
    assert "1.0 %, nothate" in shown[0]
    assert "97.0 %, hate" in shown[1]
    assert browser.evaluate("document.querySelectorAll('.flagged').length") == 1
    assert [each.split("\n")[0] for each in shown] == ["fp32", "int8"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"refusal": (429, "queue full")}, "The server is busy. Try again in 3 s. (queue full)"),
        ({"refusal": (503, "")}, "The server takes no requests now"),
        ({"refusal": (400, "max_tokens: at most 512")}, "max_tokens: at most 512"),
        ({"break_after": 1}, "The connection broke off before the answer's end."),
    ],
)
def test_errors_are_said_in_words(playground, browser, values, words):
    script = playground()
    for name, value in values.items():
        setattr(script, name, value)
    browser.type("#prompt", "Hello")
    browser.click("#run")
    answered(browser)
    assert words in text(browser, ".answer .problem")
    assert text(browser, "#status") == "No whole answer of fp32."


def test_bad_parameters_and_an_empty_prompt_never_leave_the_page(playground, browser):
    script = playground()
    browser.click("#run")
    assert text(browser, "#error") == "Write a prompt first."
    browser.type("#prompt", "Hello")
    browser.evaluate("document.querySelector('#temperature').value = '-1'")
    browser.click("#run")
    assert text(browser, "#error").startswith("Temperature: ")
    assert browser.evaluate("document.activeElement.id") == "temperature"
    assert script.asked == []


def test_the_key_is_asked_for_sent_and_kept_for_the_tab_only(playground, browser):
    script = playground(key="secret")
    assert text(browser, "#error").startswith("The server wants an API key")
    assert browser.evaluate("document.querySelector('#access').open") is True
    browser.type("#key", "secret")
    press(browser, "Enter", 13)
    wait(browser, "document.querySelector('#model').options.length === 2")
    assert browser.evaluate("document.querySelector('#error').hidden") is True
    browser.type("#prompt", "Hello")
    browser.click("#run")
    answered(browser)
    assert text(browser, ".text") == "one two three"
    assert browser.evaluate("[localStorage.length, document.cookie, location.href]") == [0, "", script.address + "/"]
    browser.open(script.address + "/")
    wait(browser, "document.querySelector('#model').options.length === 2")  # the same tab still has it


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_is_readable_and_labelled(playground, browser, dark):
    script = playground(PHONE, dark)
    browser.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    choose(browser, "document.querySelector('#other')", "int8")
    script.answers["int8"] = ["one ", "two ", "four ", "x" * 200]
    browser.type("#prompt", "Hello")
    browser.click("#run")
    wait(browser, "document.querySelector('mark') !== null")
    assert browser.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    assert browser.lowest_contrast() >= 4.5  # WCAG 2, level AA
    fields = "[...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels.length).length"
    assert browser.evaluate(fields) == 0
    small = "[...document.querySelectorAll('button, input, select')].filter(e => e.offsetHeight && e.offsetHeight < 44)"
    assert browser.evaluate(f"{small}.length") == 0


def test_every_control_is_reached_by_the_tab_key(playground, browser):
    playground()
    browser.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    reached = []
    for _ in range(16):
        press(browser, "Tab", 9)
        reached.append(browser.evaluate("document.activeElement.id"))
    wanted = ["model", "other", "prompt", "run", "max_tokens", "temperature", "top_p", "seed", "stop_at", "key"]
    assert [name for name in reached if name in wanted][: len(wanted)] == wanted


def test_it_has_the_colours_of_the_report():
    def colours(path):
        return re.findall(r"--[\w-]+: #\w+", path.read_text())

    assert colours(PAGE / "playground.css") == colours(REPORT)


def test_nothing_in_it_is_inline_or_from_elsewhere():
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|<script>| on\w+=| style=|https?://", html)
    assert not [path for path in PAGE.iterdir() if re.search(r"https?://|innerHTML|eval\(", path.read_text())]
