import hmac
import random
import statistics
import time

import pytest

from yunque.errors import InputError
from yunque.serving import schemas, security
from yunque.serving.problems import Problem
from yunque.serving.security import KeyRing, parse, read_keys, request_id

KEYS = [f"key-number-{number:04d}-of-this-test" for number in range(40)]


def compared(monkeypatch, ring, key):
    """How many keys a check compares, and what it finds."""
    calls = []
    real = hmac.compare_digest
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: calls.append(1) or real(a, b))
    found = ring.holds(key.encode())
    monkeypatch.undo()
    return len(calls), found


@pytest.mark.parametrize(("key", "held"), [(KEYS[0], True), (KEYS[-1], True), (KEYS[0][:-1], False), ("", False)])
def test_every_key_is_compared_whichever_matches(monkeypatch, key, held):
    assert compared(monkeypatch, KeyRing(KEYS), key) == (len(KEYS), held)


def test_time_tells_nothing_of_a_key():
    ring = KeyRing(KEYS)
    kinds = {
        "first": KEYS[0], "last": KEYS[-1], "near": KEYS[0][:-1] + "?", "far": "?" * len(KEYS[0]),
    }  # fmt: skip
    times = {kind: [] for kind in kinds}
    order = list(kinds) * 400
    random.Random(0).shuffle(order)  # a disturbance of the machine meets all kinds alike
    for kind in order:
        given = kinds[kind].encode()
        began = time.perf_counter_ns()
        ring.holds(given)
        times[kind].append(time.perf_counter_ns() - began)
    medians = [statistics.median(each) for each in times.values()]
    assert max(medians) < 1.25 * min(medians)  # leaving at the first match: 1 key of 40, 20-fold


@pytest.mark.parametrize(
    "values",
    [[], [b""], [b"Bearer"], [b"Bearer "], [b"Basic " + KEYS[0].encode()], [KEYS[0].encode()],
     [b"Bearer " + KEYS[0].encode()] * 2, [b"Bearer " + KEYS[0].encode() + b"x"], [b"Bearer \xff\x00"]],
)  # fmt: skip
def test_what_is_no_key(values):
    with pytest.raises(Problem) as error:
        KeyRing(KEYS).check(values)
    assert error.value.status == 401
    KeyRing(KEYS).check([b"bearer " + KEYS[3].encode()])


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# of the team\n\n" + KEYS[0] + "\n  " + KEYS[1] + "  \n")
    monkeypatch.setenv("SOME_KEYS", f" {KEYS[2]} ,")
    assert read_keys(file, "SOME_KEYS", "api_key_file") == [KEYS[2], KEYS[0], KEYS[1]]
    file.write_text("# nothing\n")
    with pytest.raises(InputError, match="holds no key"):
        read_keys(file, "SOME_KEYS", "api_key_file")
    file.write_text("short\n")
    with pytest.raises(InputError, match="shorter than 16"):
        read_keys(file, "OTHER_KEYS", "api_key_file")
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "none", "OTHER_KEYS", "api_key_file")


@pytest.mark.parametrize("given", [b"a" * 65, b"a b", b"a\r\nset-cookie: x", b"", b"\xc3\xa4", b"../etc", b"<script>"])
def test_only_harmless_request_ids_are_echoed(given):
    assert request_id([(b"x-request-id", given)]) != given.decode("latin-1")
    assert request_id([(b"x-request-id", b"Run_7.a-b")]) == "Run_7.a-b"


HELLO = '"model": "m", "prompt": "hello"'


@pytest.mark.parametrize(
    ("content", "param", "words"),
    [
        ('{"prompt": "x"}', "model", "required"),
        ('{"model": "m"}', "prompt", "required"),
        ('{"model": "m", "prompt": ["a", 1]}', "prompt", "none of them empty"),
        ('{"model": "m", "prompt": [[]]}', "prompt", "none of them empty"),
        ('{"model": "m", "prompt": [1, -1]}', "prompt", "token ids"),
        (f'{{{HELLO}, "n": "2"}}', "n", "integer"),
        (f'{{{HELLO}, "n": true}}', "n", "integer"),
        (f'{{{HELLO}, "n": 1.5}}', "n", "integer"),
        (f'{{{HELLO}, "temperature": NaN}}', "temperature", "finite"),
        (f'{{{HELLO}, "temperature": -Infinity}}', "temperature", "finite"),
        (f'{{{HELLO}, "temperature": 1e999}}', "temperature", "finite"),
        (f'{{{HELLO}, "seed": 1.5}}', "seed", "integer"),
        (f'{{{HELLO}, "seed": {"9" * 400}}}', "seed", "less than"),
        (f'{{{HELLO}, "stop": ["a", ""]}}', "stop", "1 to 256"),
        (f'{{{HELLO}, "frequency_penalty": 0.5}}', "frequency_penalty", "not supported"),
        (f'{{{HELLO}, "logit_bias": {{"5": 1}}}}', "logit_bias", "not supported"),
        (f'{{{HELLO}, "echo": true}}', "echo", "not supported"),
        (f'{{{HELLO}, "best_of": 3}}', "best_of", "not supported"),
        (f'{{{HELLO}, "surprise": 1}}', "surprise", "not supported"),
    ],
)
def test_the_field_at_fault_is_named(content, param, words):
    with pytest.raises(Problem) as error:
        parse(schemas.CompletionRequest, content.encode())
    assert (error.value.status, error.value.param) == (400, param)
    assert error.value.message.startswith(f"{param}: ")
    assert words in error.value.message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"\xff", b"[" * 10_000, b'{"a":' * 10_000, b'{"prompt": "\\ud800"}', b"9" * 9999],
)
def test_what_is_no_json_object(content):
    with pytest.raises(Problem) as error:
        parse(schemas.CompletionRequest, content)
    assert error.value.status == 400


def test_neutral_values_are_taken():
    neutral = (
        '"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "echo": false,'
        ' "suffix": null, "user": "me", "n": null, "stream": false, "logprobs": null, "stop": null'
    )
    assert parse(schemas.CompletionRequest, f"{{{HELLO}, {neutral}}}".encode()).prompt == "hello"
